"""Rectified sparse attention inside vLLM: an example of how it enters an engine.

    python -m vllm.entrypoints.openai.api_server --model … \\
        --scheduler-cls resa.fast.vllm.scheduler.ReSAScheduler --no-async-scheduling \\
        --additional-config '{"resa": {"interval": 32, "active_ratio": 0.1}}'

The engine brings paging, continuous batching and preemption. `scheduler.py` decides which steps are
dense, `attention.py` computes both kinds. Read them in this order. Importing anything else of this
project never imports vLLM.
"""


def register() -> None:
    """Take the place of vLLM's CPU attention; called by vLLM, in each of its processes.

    Without options under "resa" everything goes to the engine's own attention as before.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CPU_ATTN, "resa.fast.vllm.attention.ReSABackend")
