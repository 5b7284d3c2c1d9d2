"""Options of a serving run, and what is refused before work starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from resa.reference import checks
from resa.reference.config import ReSAConfig

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@dataclass(frozen=True)
class Options:
    """Settings under `additional_config["resa"]`: how to decode, and whether passes are spread."""

    config: ReSAConfig
    spread: bool = False  # rectify some requests early, so that few are due in one step

    def is_sparse(self, n_tokens: int, start: int, n_prompt_tokens: int) -> bool:
        """True if tokens `start` … `start + n_tokens − 1` of a request are a sparse step.

        Scheduler and attention both go by this rule. The last token of a prompt comes alone as
        well, after a prefix hit or as the last chunk. It is dense.
        """
        return n_tokens == 1 and start >= n_prompt_tokens and self.config.interval != 1


def options_of(vllm_config: VllmConfig) -> Options | None:
    """Options of an engine's configuration, checked; None where it has none."""
    given = vllm_config.additional_config
    if not isinstance(given, dict) or "resa" not in given:
        return None
    settings = dict(given["resa"])
    spread = settings.pop("spread", False)
    checks.require_flag("spread", spread)
    config = ReSAConfig(**settings)
    checks.require_one_of("schedule", config.schedule, ("fused",))
    checks.require(config.dense_layers == 0, "dense_layers", config.dense_layers, "0")
    checks.require(not config.eight_bit_bounds, "eight_bit_bounds", True, "False")
    check_engine(vllm_config, config)
    return Options(config, spread)


def check_engine(engine: VllmConfig, config: ReSAConfig) -> None:
    """Refuse settings of the engine under which a rectification would not be exact."""
    from .scheduler import ReSAScheduler

    scheduler, cache = engine.scheduler_config, engine.cache_config
    scheduler_cls = scheduler.scheduler_cls and scheduler.get_scheduler_cls()
    own = scheduler_cls and issubclass(scheduler_cls, ReSAScheduler)
    parallel, model = engine.parallel_config, engine.model_config
    n_least = max(config.interval or 2, 2)  # the longest window, or two tokens
    n_kv_heads = model.get_total_num_kv_heads()
    threshold, budget = scheduler.long_prefill_token_threshold, scheduler.max_num_batched_tokens
    name = f"{ReSAScheduler.__module__}.{ReSAScheduler.__qualname__}"
    device = engine.device_config.device_type
    refused = {
        "scheduler_cls": (not own, f"{name}: it says which steps are dense"),
        "async_scheduling": (scheduler.async_scheduling, "off: a token would be sampled twice"),
        "speculative_config": (engine.speculative_config, "None: drafts are not rectified"),
        "kv_transfer_config": (engine.kv_transfer_config, "None: pages would leave inexact"),
        "VLLM_USE_V2_MODEL_RUNNER": (engine.use_v2_model_runner, "0: it keeps a count of its own"),
        "pipeline_parallel_size": (parallel.pipeline_parallel_size > 1, "1"),
        "decode_context_parallel_size": (parallel.decode_context_parallel_size > 1, "1"),
        "tensor_parallel_size": (
            n_kv_heads % parallel.tensor_parallel_size,
            f"a divisor of the model's {n_kv_heads} KV heads: ranks that share one would not agree",
        ),
        "kv_cache_dtype": (cache.cache_dtype not in ("auto", str(model.dtype)[6:]), "auto"),
        "attention_chunk_size": (
            getattr(model.hf_text_config, "attention_chunk_size", None), "none: chunks are windows"
        ),
        "block_size": (
            cache.block_size % config.block_size,
            f"a multiple of block_size = {config.block_size} under \"resa\"",
        ),
        "long_prefill_token_threshold": (
            0 < threshold < n_least, f"0, or at least {n_least}: a window comes as a whole"
        ),
        "max_num_batched_tokens": (
            budget < scheduler.max_num_seqs + n_least - 1,
            f"at least {scheduler.max_num_seqs + n_least - 1}: a rectification fits beside a token"
            " of every other request",
        ),
        "device": (device != "cpu", "cpu: on a GPU it was never served"),
    }  # fmt: skip
    for name, (is_wrong, wanted) in refused.items():
        if is_wrong:
            raise ValueError(f"{name} is not served with ReSA, expected {wanted}")


def check_layer(
    scale: float, head_size: int, alibi: object, window: object, cap: object, sinks: object,
    kind: str, shared: object,
) -> None:  # fmt: skip
    """Refuse attention that selection and rectification do not know."""
    refused = {
        "scale": abs(scale - head_size**-0.5) > 1e-6 * scale,
        "ALiBi": alibi is not None,
        "a sliding window": window is not None,
        "a soft cap": bool(cap),
        "sinks": sinks is not None,
        f"the type {kind}": kind != "decoder",
        "a cache shared by layers": shared is not None,
    }
    for name, is_there in refused.items():
        if is_there:
            raise ValueError(f"the model's attention has {name}, which ReSA does not have")
