"""Rectification in vLLM's scheduler: a counter that is set back.

A request's `num_computed_tokens` says how many of its tokens are in the cache. When f − 1 of them
were written by sparse steps, it goes back by so many. The engine then schedules them and the
pending token as one chunk, as it does with a prompt. The chunk overwrites the same slots with exact
keys and values, and its last logits give the next token: a rectification of the schedule "fused".
"""

from math import ceil
from typing import Any

import torch
from torch import Tensor
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

    Invariant: the first `exact[id]` tokens of every running request are as dense prefill writes
    them. At most f − 1 tokens follow, which sparse steps wrote. Only pages of exact tokens are
    published to the prefix cache.
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
        """Set back the requests that are due, schedule as usual, and note what is exact then."""
        for request in self._due():
            request.num_computed_tokens = self.exact[request.request_id]
        output = super().schedule(*arguments, **options)
        self._note(output.num_scheduled_tokens)
        return output

    def _due(self) -> list[Request]:
        """Requests that rectify next: all that must, and with `spread` some that may."""
        drifted = {r: r.num_computed_tokens - self.exact[r.request_id] for r in self.running}
        decoding = [r for r in self.running if r.num_tokens - r.num_computed_tokens == 1]
        due = [r for r in decoding if self.resa.config.is_pass_due(drifted[r])]
        if self.resa.spread and self.resa.config.interval is not None:
            n_more = ceil(len(decoding) / self.resa.config.interval) - len(due)
            may = [r for r in decoding if r not in due and drifted[r] > 0]
            due += sorted(may, key=drifted.get, reverse=True)[: max(n_more, 0)]
        return due

    def _reserve_prefill_lookahead(self, request: Request, start: int, n_tokens: int) -> int:
        """Put a chunk off where it must not be cut. vLLM asks about every chunk.

        A window comes as a whole. A part of one token would look like a sparse step.
        """
        n_tokens = super()._reserve_prefill_lookahead(request, start, n_tokens)
        left = request.num_tokens - start
        is_window = start >= request.num_prompt_tokens and left <= (self.resa.config.interval or 1)
        is_alone = self.resa.is_sparse(n_tokens, start, request.num_prompt_tokens)
        return 0 if n_tokens < left and (is_window or is_alone) else n_tokens

    def _allocate_slots(
        self, request: Request, num_new_tokens: int, num_new_computed_tokens: int = 0,
        *arguments: Any, **options: Any,
    ) -> Any:  # fmt: skip
        """Give a request slots. After a sparse step nothing is published."""
        start = request.num_computed_tokens + num_new_computed_tokens
        if self.resa.is_sparse(num_new_tokens, start, request.num_prompt_tokens):
            options["delay_cache_blocks"] = True
        given = request, num_new_tokens, num_new_computed_tokens, *arguments
        return self._allocate(*given, **options)

    def _note(self, scheduled: dict[str, int]) -> None:
        """Note what is exact after this step. The engine has advanced its counters already."""
        lengths = []
        for request_id, n_tokens in scheduled.items():
            request = self.requests[request_id]
            end = request.num_computed_tokens
            start = end - n_tokens
            if self.resa.is_sparse(n_tokens, start, request.num_prompt_tokens):
                self.exact.setdefault(request_id, start)
                lengths.append(end)
            else:
                self.exact[request_id] = end
                self.counts["resa:rectifications"] += start >= request.num_prompt_tokens
        self._count_sparse(torch.tensor(lengths))

    def _count_sparse(self, lengths: Tensor) -> None:
        """Count sparse steps by their requests' lengths."""
        self.counts["resa:sparse_steps"] += len(lengths)
        self.counts["resa:blocks_read"] += int(active_blocks(lengths, self.resa.config).sum())
        self.counts["resa:blocks_held"] += int((lengths / self.resa.config.block_size).ceil().sum())

    def _preempt_request(self, request: Request, *arguments: Any, **options: Any) -> None:
        """Preempt. The request comes back as a prompt: all its tokens are computed again."""
        self.exact.pop(request.request_id, None)
        super()._preempt_request(request, *arguments, **options)

    def _update_request_as_session(self, session: Request, *arguments: Any) -> None:
        """Let a session that gets more input go on from where it is exact."""
        super()._update_request_as_session(session, *arguments)
        end = session.num_computed_tokens
        session.num_computed_tokens = self.exact.get(session.request_id, end)

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
