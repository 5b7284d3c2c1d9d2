"""Rectification in vLLM's scheduler: a counter that is set back.

A request's `num_computed_tokens` says how many of its tokens are in the cache. When f − 1 of them
were written by sparse steps, it goes back by so many. The engine then schedules them and the
pending token as one chunk, as it does with a prompt. The chunk overwrites the same slots with exact
keys and values, and its last logits give the next token: a rectification of the schedule "fused".
"""

from collections.abc import Iterator
from math import ceil
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.request import Request

from resa.reference.blocks import active_blocks

from .metrics import COUNTERS
from .options import options_of

logger = init_logger("vllm.resa")


class ReSAScheduler(Scheduler):
    """vLLM's scheduler, with rectifications.

    Invariant: of every running request the first `exact[id]` tokens are as dense prefill writes
    them, and at most f − 1 follow that sparse steps wrote. Only pages of exact tokens are published
    to the prefix cache.
    """

    def __init__(self, vllm_config: Any, *arguments: Any, **options: Any) -> None:
        self.resa = options_of(vllm_config)
        if self.resa is None:
            raise ValueError('additional_config is without "resa", which ReSAScheduler goes by')
        super().__init__(vllm_config, *arguments, **options)
        self.exact: dict[str, int] = {}
        self.counts = dict.fromkeys(COUNTERS, 0)  # since the last report
        self._allocate = self.kv_cache_manager.allocate_slots
        self.kv_cache_manager.allocate_slots = self._allocate_slots
        logger.info("Rectified sparse attention is on: %s", self.resa)

    def schedule(self, *arguments: Any, **options: Any) -> SchedulerOutput:
        """Set back the requests that are due, then schedule as usual, then count."""
        for request in self._due():
            request.num_computed_tokens = self.exact[request.request_id]
        output = super().schedule(*arguments, **options)
        scheduled = output.num_scheduled_tokens
        sparse = [r for r, n in scheduled.items() if not self._is_dense(self.requests[r], n)]
        lengths = torch.tensor([self.requests[r].num_computed_tokens for r in sparse])
        self.counts["resa:sparse_steps"] += len(sparse)
        self.counts["resa:blocks_read"] += int(active_blocks(lengths, self.resa.config).sum())
        self.counts["resa:blocks_held"] += int((lengths / self.resa.config.block_size).ceil().sum())
        return output

    def _due(self) -> Iterator[Request]:
        """Requests that rectify next: all that must, and with `spread` some that may."""
        drifted = {r: r.num_computed_tokens - self.exact[r.request_id] for r in self.running}
        decoding = [r for r in self.running if r.num_tokens - r.num_computed_tokens == 1]
        must = [r for r in decoding if self.resa.config.is_pass_due(drifted[r])]
        yield from must
        if self.resa.spread and self.resa.config.interval is not None:
            may = sorted((r for r in decoding if r not in must and drifted[r]), key=drifted.get)
            n_each = ceil(len(decoding) / self.resa.config.interval)
            yield from may[max(0, len(may) - n_each + len(must)) :] if n_each > len(must) else []

    def _reserve_prefill_lookahead(self, request: Request, start: int, n_tokens: int) -> int:
        """Schedule a window as a whole or not at all. (vLLM calls this with every chunk.)

        A window's last token alone would look like a sparse step.
        """
        n_tokens = super()._reserve_prefill_lookahead(request, start, n_tokens)
        left = request.num_tokens - start
        is_window = start >= request.num_prompt_tokens and left <= (self.resa.config.interval or 1)
        return 0 if is_window and n_tokens < left else n_tokens

    def _allocate_slots(
        self, request: Request, num_new_tokens: int, num_new_computed_tokens: int = 0,
        *arguments: Any, **options: Any,
    ) -> Any:  # fmt: skip
        """Give a request slots. After a sparse step nothing is published."""
        start = request.num_computed_tokens + num_new_computed_tokens
        if self.resa.is_sparse(num_new_tokens, start, request.num_prompt_tokens):
            options["delay_cache_blocks"] = True
        allocated = request, num_new_tokens, num_new_computed_tokens, *arguments
        return self._allocate(*allocated, **options)

    def _is_dense(self, request: Request, n_tokens: int) -> bool:
        """True if a scheduled chunk is dense. Notes what is exact after it.

        The engine has advanced `num_computed_tokens` already.
        """
        end, request_id = request.num_computed_tokens, request.request_id
        start = end - n_tokens
        if self.resa.is_sparse(n_tokens, start, request.num_prompt_tokens):
            self.exact.setdefault(request_id, start)
            return False
        self.counts["resa:rectifications"] += start >= request.num_prompt_tokens
        self.exact[request_id] = end
        return True

    def _preempt_request(self, request: Request, *arguments: Any, **options: Any) -> None:
        """Preempt. The request comes back with exact tokens alone: its pages are computed again."""
        self.exact.pop(request.request_id, None)
        super()._preempt_request(request, *arguments, **options)

    def _free_request(self, request: Request, *arguments: Any, **options: Any) -> Any:
        self.exact.pop(request.request_id, None)
        return super()._free_request(request, *arguments, **options)

    def make_stats(self, *arguments: Any, **options: Any) -> SchedulerStats | None:
        """Report the counters since the last time, beside vLLM's own."""
        stats = super().make_stats(*arguments, **options)
        if stats is not None:
            # The one field of numbers by name that vLLM carries to the server's process.
            stats.num_kv_fetch_reqs_by_stage |= self.counts
            self.counts = dict.fromkeys(COUNTERS, 0)
        return stats
