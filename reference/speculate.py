"""Self-speculation: sparse steps draft, and the dense pass that would rectify them decides (Appendix B of the paper).

The pass re-encodes the drafted tokens and so predicts, densely, what should have followed each of them. Drafts are kept
up to the first that dense decoding would not have chosen; that one is chosen anew, what comes after it is cut from the
cache, and drafting begins again from there. What is left is exact: the tokens, and the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .cache import Generation, pad_tokens
from .config import ReSAConfig
from .model import GPT
from .sampling import Choice, draw


@dataclass(frozen=True)
class Draft:
    """A token that a sparse step chose, and the distribution that it was drawn from."""

    token: int
    distribution: Tensor  # [V] float64


def confirm(
    drafts: Sequence[Draft], logits: Tensor, choice: Choice, generator: torch.Generator | None
) -> tuple[list[int], int]:
    """The tokens to keep after a dense pass, and how many of them are drafts.

    logits [n, V], row i predicting in place of drafts[i], and one row more where the last draft was fed as well: then
    a pass that confirms all of them chooses one token beyond. A draft is accepted with probability min(1, p/q), p its
    dense and q its sparse probability; else a token is drawn from max(p − q, 0), normalised. So tokens are distributed
    as by p; at temperature 0, both being one or zero, they are the dense choice, and no number is drawn.
    """
    kept: list[int] = []
    for draft, row in zip(drafts, logits, strict=False):
        dense = choice.distribution(row)
        if choice.uniform(generator) * draft.distribution[draft.token] < dense[draft.token]:
            kept.append(draft.token)
            continue
        rest = (dense - draft.distribution).clamp(min=0)
        return [*kept, draw(rest, choice.uniform(generator))], len(kept)
    if len(logits) > len(drafts):
        kept.append(choice.token(logits[-1], generator))
    return kept, len(drafts)


@dataclass
class Speculation:
    """One generation: `generation` holds what is certain, `drafts` what is not; both change as it runs."""

    model: GPT
    generation: Generation
    config: ReSAConfig
    choice: Choice
    generators: Sequence[torch.Generator | None]
    max_new_tokens: int
    stop_tokens: Collection[int]
    on_token: Callable[[int, int, int], None] | None = None
    on_pass: Callable[[int, int, int], None] | None = None  # (sequence, tokens drafted, tokens accepted)
    drafts: list[list[Draft]] = field(default_factory=list)  # per sequence, since its last dense pass

    @torch.no_grad()
    def run(self, logits: Tensor) -> None:
        """From the prefill's last logits [B, V] to the end."""
        active = torch.full((len(logits),), self.max_new_tokens > 0, device=logits.device)
        self.drafts = [[] for _ in logits]
        for sequence in active.nonzero()[:, 0].tolist():
            first = self.choice.token(logits[sequence], self.generators[sequence])
            active[sequence] = self.keep(sequence, [first])
        while active.any():
            due = torch.tensor([self.is_due(sequence) for sequence in range(len(active))], device=active.device)
            if (active & due).any():
                self.decide(active, active & due)
            elif active.any():
                self.draft(active)

    def is_due(self, sequence: int) -> bool:
        """Whether the drafts fill a window, or can't go on: a stop token is never fed, nor is the last of all."""
        return self.is_full(sequence) or self.is_ended(sequence)

    def is_full(self, sequence: int) -> bool:
        """Whether the window is as long as the interval has it; schedule "fused" counts the pending token."""
        count = len(self.drafts[sequence]) + (self.config.schedule == "fused")
        is_short = int(self.generation.cache.lengths[sequence]) < self.config.dense_below
        return is_short or count >= self.config.interval

    def is_ended(self, sequence: int) -> bool:
        """Whether the last draft may not be fed."""
        drafts, room = self.drafts[sequence], self.max_new_tokens - len(self.generation.tokens[sequence])
        return len(drafts) == room or (len(drafts) > 0 and drafts[-1].token in self.stop_tokens)

    def draft(self, active: Tensor) -> None:
        """A sparse step of every active sequence [B], whose choice is pending and not yet certain."""
        state = self.generation
        tokens = state.pending.clamp(min=0)  # finished sequences may have none
        logits = self.model.output(self.model.sparse_pass(tokens, state.cache, active, self.config))
        state.window += active
        for sequence in active.nonzero()[:, 0].tolist():
            token = self.choice.token(logits[sequence], self.generators[sequence])
            self.drafts[sequence].append(Draft(token, self.choice.distribution(logits[sequence])))
            state.pending[sequence] = token

    def decide(self, active: Tensor, due: Tensor) -> None:
        """A dense pass over the windows of the sequences that are due [B], and what follows from it."""
        state = self.generation
        windows = [self.fed(sequence) if is_due else [] for sequence, is_due in enumerate(due.tolist())]
        tokens, counts = pad_tokens("windows", windows, state.cache)
        start = torch.where(due, state.cache.lengths - state.window, state.cache.lengths)
        hidden = self.model.dense_pass(tokens, state.cache, start, counts)
        state.window[due] = 0
        lengths = state.cache.lengths.clone()
        for sequence in due.nonzero()[:, 0].tolist():
            logits = self.model.output(hidden[sequence, : counts[sequence]])
            drafts, self.drafts[sequence] = self.drafts[sequence], []
            kept, accepted = confirm(drafts, logits, self.choice, self.generators[sequence])
            lengths[sequence] = start[sequence] + len(kept)  # the last one kept is pending
            active[sequence] = self.keep(sequence, kept, int(start[sequence]) + 1)
            if self.on_pass is not None:
                self.on_pass(sequence, len(drafts), accepted)
        state.cache.truncate(lengths)

    def fed(self, sequence: int) -> list[int]:
        """What the dense pass encodes: the token that was certain, and the drafts after it, the last one if it may."""
        drafts = [draft.token for draft in self.drafts[sequence]]
        is_fused = self.config.schedule == "fused" or not drafts
        is_last_fed = is_fused and self.is_full(sequence) and not self.is_ended(sequence)
        return [self.generation.tokens[sequence][-1], *drafts][: None if is_last_fed else -1]

    def keep(self, sequence: int, tokens: Sequence[int], position: int | None = None) -> bool:
        """Tokens that are certain from now on, the first at `position` (None: next to be fed); whether it goes on."""
        state = self.generation
        position = int(state.cache.lengths[sequence]) if position is None else position
        for i, token in enumerate(tokens):
            state.tokens[sequence].append(token)
            if self.on_token is not None:
                self.on_token(sequence, position + i, token)
        state.pending[sequence] = tokens[-1]
        return tokens[-1] not in self.stop_tokens and len(state.tokens[sequence]) < self.max_new_tokens
