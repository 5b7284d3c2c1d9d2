"""Engines of vLLM in this process, a tiny random model for them, and what the reference says of it."""

import functools
import gc
import os
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_USE_V2_MODEL_RUNNER="0",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_LOGGING_LEVEL="WARNING",
    VLLM_NO_USAGE_STATS="1",
)

import tokenizers
import transformers
from vllm import LLM, RequestOutput, SamplingParams
from vllm.config import VllmConfig
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import RequestOutputKind

from resa.reference import GPT, ReSAConfig, generate
from resa.reference.weights.pretrained import load_pretrained

SCHEDULER = "resa.fast.vllm.scheduler.ReSAScheduler"
VOCABULARY = 300


def save_model(folder: Path) -> Path:
    """Write a tiny Llama with random weights, large enough that its tokens vary."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, **shape, **heads, max_position_embeddings=4096, initializer_range=0.3
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@functools.cache
def model_of(folder: Path) -> GPT:
    return load_pretrained(folder)


def prompts_of(lengths: Sequence[int], seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def expected(folder: Path, prompt: list[int], n_tokens: int, resa: dict) -> list[int]:
    """The tokens of a request that decodes alone, by the reference."""
    resa = {name: value for name, value in resa.items() if name != "spread"}
    (generation,) = generate(model_of(folder), [prompt], n_tokens, ReSAConfig(**resa))
    return generation.tokens


def settings_of(resa: dict, **settings) -> dict:
    """Arguments of `LLM`; `settings` go before."""
    return {
        "dtype": "float32", "block_size": 16, "max_model_len": 1024, "max_num_seqs": 8,
        "max_num_batched_tokens": 512, "enforce_eager": True, "skip_tokenizer_init": True,
        "scheduler_cls": SCHEDULER, "additional_config": {"resa": resa}, "async_scheduling": False,
    } | settings  # fmt: skip


def engine_config(folder: Path, resa: dict, **settings) -> VllmConfig:
    """The configuration of such an engine, which is not started."""
    return EngineArgs(str(folder), **settings_of(resa, **settings)).create_engine_config()


@contextmanager
def engine(folder: Path, resa: dict, **settings):
    """A running engine."""
    llm = LLM(str(folder), **settings_of(resa, **settings))
    try:
        yield llm.llm_engine
    finally:
        del llm
        cleanup_dist_env_and_memory()
        gc.collect()


def scheduler_of(engine):
    return engine.engine_core.engine_core.scheduler


def add(engine, name: str, prompt: list[int], n_tokens: int, **settings) -> None:
    greedy = {"temperature": 0, "max_tokens": n_tokens, "ignore_eos": True, "detokenize": False}
    greedy |= {"output_kind": RequestOutputKind.FINAL_ONLY}
    engine.add_request(name, {"prompt_token_ids": prompt}, SamplingParams(**greedy | settings))


def run(engine, arrivals: dict[int, list[tuple[str, list[int], int]]], after_step=None) -> dict[str, RequestOutput]:
    """Add requests at their steps, and step until all have ended → outputs by name."""
    outputs, step = {}, 0
    while engine.has_unfinished_requests() or any(at >= step for at in arrivals):
        for request in arrivals.get(step, ()):
            add(engine, *request)
        outputs |= {output.request_id: output for output in engine.step()}
        if after_step is not None:
            after_step(step)
        step += 1
    return outputs


def tokens_of(outputs: dict[str, RequestOutput]) -> dict[str, list[int]]:
    return {name: list(output.outputs[0].token_ids) for name, output in outputs.items()}


def save_tokenizer(folder: Path) -> Path:
    """Write a tokenizer beside the model whose words are the numbers of its tokens."""
    words = tokenizers.models.WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="0")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="0").save_pretrained(folder)
    return folder
