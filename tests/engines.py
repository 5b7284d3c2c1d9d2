"""Engines of vLLM in this process, a tiny random model for them, and what the reference says of it."""

import functools
import gc
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
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
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request

from resa.reference import GPT, ReSAConfig, generate, prefill, sparse_step
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


def config_of(resa: dict) -> ReSAConfig:
    """The decoder's part of the settings under "resa"."""
    return ReSAConfig(**{name: value for name, value in resa.items() if name != "spread"})


def expected(folder: Path, prompt: list[int], n_tokens: int, resa: dict) -> list[int]:
    """The tokens of a request that decodes alone, by the reference."""
    (generation,) = generate(model_of(folder), [prompt], n_tokens, config_of(resa))
    return generation.tokens


def replayed(
    folder: Path, prompt: list[int], tokens: list[int], chunks: list[tuple[int, int]], resa: dict
) -> list[int]:
    """The tokens that the reference chooses after an engine's, if its steps are dense where the engine's were.

    Each dense step rectifies all that has drifted, whatever the engine did.
    """
    model, config, text, chosen, exact = model_of(folder), config_of(resa), prompt + tokens, [], 0
    cache = model.new_cache(len(text), config.block_size, config.kept_bits)
    for start, end in chunks:
        if end - start == 1 and start >= len(prompt) and config.interval != 1:
            logits = sparse_step(model, text[start], cache, config)
        else:
            cache.truncate(min(start, exact))
            logits = prefill(model, text[cache.length : end], cache)
            exact = end
        if end == len(prompt) + len(chosen):
            chosen.append(int(logits.argmax()))
    return chosen


def settings_of(resa: dict, **settings) -> dict:
    """Arguments of `LLM`; `settings` go before."""
    return {
        "dtype": "float32", "block_size": 16, "max_model_len": 1024, "max_num_seqs": 8,
        "max_num_batched_tokens": 512, "num_gpu_blocks_override": 520, "enforce_eager": True,
        "skip_tokenizer_init": True,
        "scheduler_cls": SCHEDULER, "additional_config": {"resa": resa}, "async_scheduling": False,
    } | settings  # fmt: skip


def engine_config(folder: Path, resa: dict, **settings) -> VllmConfig:
    """The configuration of such an engine, which is not started."""
    return EngineArgs(str(folder), **settings_of(resa, **settings)).create_engine_config()


@contextmanager
def engine(folder: Path, resa: dict, **settings):
    """A running engine."""
    gc.freeze()  # starting and stopping, vLLM collects garbage nine times: let it not look at all of its modules
    llm = LLM(str(folder), **settings_of(resa, **settings))
    try:
        yield llm.llm_engine
    finally:
        del llm
        cleanup_dist_env_and_memory()
        gc.collect()


def scheduler_of(engine):
    return engine.engine_core.engine_core.scheduler


def chunks_of(output: SchedulerOutput) -> Iterator[tuple[str, int, int]]:
    """Take a step apart: each request's name, its first token in the step, and the one past its last."""
    cached = output.scheduled_cached_reqs
    starts = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
    starts |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    for request_id, n_tokens in output.num_scheduled_tokens.items():
        yield request_id, starts[request_id], starts[request_id] + n_tokens


def record_chunks(engine) -> dict[str, list[tuple[int, int]]]:
    """Chunks by the names of requests; grows while the engine runs."""
    scheduler, chunks = scheduler_of(engine), defaultdict(list)
    schedule = scheduler.schedule

    def schedule_and_note(*arguments, **options):
        output = schedule(*arguments, **options)
        for request_id, start, end in chunks_of(output):
            chunks[name_of(request_id)].append((start, end))
        return output

    scheduler.schedule = schedule_and_note
    return chunks


def name_of(request_id: str) -> str:
    """The name under which a request was added; vLLM appends to it."""
    return request_id.partition("-")[0]


def keys_and_values(engine, request: Request) -> torch.Tensor:
    """Read a request's keys and values from the engine's pages: [layers, Hkv, T, 2·D]."""
    runner = engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    (pages,) = scheduler_of(engine).kv_cache_manager.get_block_ids(request.request_id)
    width = 2 * runner.model_config.get_head_size()
    layers = [cache[pages, ..., :width].transpose(0, 1).flatten(1, 2) for cache in runner.kv_caches]
    return torch.stack(layers)[:, :, : request.num_computed_tokens]


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
