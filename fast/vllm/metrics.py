"""Counters of sparse decoding among the metrics of vLLM's server (`/metrics`)."""

from functools import cache
from typing import Any

from prometheus_client import Counter
from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.metrics.stats import SchedulerStats

COUNTERS = {
    "resa:sparse_steps": "Tokens decoded by a sparse step.",
    "resa:rectifications": "Dense passes over decoded tokens.",
    "resa:blocks_read": "Blocks attended by sparse steps, per layer and KV head.",
    "resa:blocks_held": "Blocks that these steps would have attended densely.",
}


@cache
def prometheus_counter(name: str) -> Counter:
    """The counter of this name; a process may register it once."""
    return Counter(name, COUNTERS[name], ["engine"])


class ReSAStatLogger(StatLoggerBase):
    """Takes the scheduler's counters out of its report, before vLLM's own loggers look at it."""

    def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
        self.engine_index = engine_index

    def record(
        self, scheduler_stats: SchedulerStats | None, *arguments: Any, **options: Any
    ) -> None:
        """Add up what the scheduler counted since its last report."""
        carried = scheduler_stats.num_kv_fetch_reqs_by_stage if scheduler_stats else {}
        for name in COUNTERS.keys() & carried.keys():
            prometheus_counter(name).labels(self.engine_index).inc(carried.pop(name))

    def log_engine_initialized(self) -> None:
        """Say nothing: the scheduler has said that ReSA is on."""
