"""Self-speculation: sparse steps draft, and the dense pass that would rectify them decides
(Appendix B).

The pass re-encodes the drafted tokens and so predicts, densely, what should have followed each of
them. Drafts are kept up to the first that dense decoding would not have chosen. That one is chosen
anew, what follows it is cut from the cache, and drafting starts again there. Tokens and cache are
then exact. `generate` keeps every token instead, and repairs only the cache.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from .checks import require
from .config import ReSAConfig
from .generate import Generation, dense_pass, prefill, sparse_step
from .model import GPT
from .requests import check_request, open_caches, sequence_generators
from .sampling import Sampling, place, uniform


def speculate(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    config: ReSAConfig | None = None,
    sampling: Sampling | None = None,
    *,
    generators: torch.Generator | Sequence[torch.Generator] | None = None,
    stop_tokens: Collection[int] = (),
    on_token: Callable[[int, int, int], None] | None = None,
    resume: Generation | None = None,
) -> list[Generation]:
    """Continue every prompt with exactly what dense decoding would write, drafted by sparse steps.

    The arguments are those of `generate`; the interval must not be None. Greedy output equals that
    of dense decoding, sampled output has its distribution. `on_token` is called after each dense
    pass.

    A draft costs one uniform number, its acceptance another, and a rejection a third. Discarded
    drafts cost theirs too.
    """
    config = ReSAConfig() if config is None else config
    sampling = Sampling() if sampling is None else sampling
    check_request(model, prompts, max_new_tokens, config, sampling, stop_tokens, resume, generators)
    max_new_tokens = int(max_new_tokens)
    require(config.interval is not None, "config.interval", None, "an integer, to speculate")
    opened = open_caches(model, prompts, max_new_tokens, config, resume)
    own = sequence_generators(len(prompts), sampling, generators)

    generations = []
    for index, ((cache, feed), generator) in enumerate(zip(opened, own, strict=True)):
        generation, logits = Generation([], cache), prefill(model, feed, cache)
        tell = partial(on_token, index) if on_token is not None else lambda *_: None
        speculation = Speculation(
            model, generation, config, sampling, generator, max_new_tokens, stop_tokens, tell
        )
        speculation.run(logits)
        generations.append(generation)
    return generations


def distribution(sampling: Sampling, logits: Tensor) -> Tensor:
    """The probability with which `sampling` chooses each token: logits [V] → [V] float64."""
    probabilities = torch.zeros(len(logits), dtype=torch.float64, device=logits.device)
    if sampling.temperature == 0:
        probabilities[logits.argmax()] = 1.0
        return probabilities
    ids, mass = sampling.kept(logits)
    probabilities[ids] = mass.diff(prepend=mass.new_zeros(1)) / mass[-1]
    return probabilities


@dataclass(frozen=True)
class Draft:
    """A token that a sparse step chose, and the distribution it was drawn from."""

    token: int
    distribution: Tensor  # [V] float64


def confirm(
    drafts: Sequence[Draft], logits: Tensor, sampling: Sampling, generator: torch.Generator | None
) -> list[int]:
    """Decide which tokens to keep after a dense pass: drafts, and at most one chosen anew.

    logits [n, V]: row i predicts in place of drafts[i]. One row more, where the last draft was fed
    too, chooses a token beyond the drafts if all of them are confirmed.

    A draft is accepted with probability min(1, p/q), p its dense and q its sparse probability;
    otherwise a token is drawn from max(p − q, 0), normalised. So tokens have the distribution p. At
    temperature 0 all probabilities are 0 or 1: the result is the dense choice, and no number is
    drawn.
    """

    def number() -> float:
        return 0.0 if sampling.temperature == 0 else uniform(generator)

    kept: list[int] = []
    for draft, row in zip(drafts, logits, strict=False):
        dense = distribution(sampling, row)
        if number() * draft.distribution[draft.token] < dense[draft.token]:
            kept.append(draft.token)
            continue
        rest = (dense - draft.distribution).clamp(min=0)
        return [*kept, place(rest.cumsum(dim=0), number())]
    if len(logits) > len(drafts):
        kept.append(sampling.token(logits[-1], generator))
    return kept


@dataclass
class Speculation:
    """One sequence: `generation` holds what is certain, `drafts` what is not."""

    model: GPT
    generation: Generation
    config: ReSAConfig
    sampling: Sampling
    generator: torch.Generator | None
    max_new_tokens: int
    stop_tokens: Collection[int]
    on_token: Callable[[int, int], None]  # (position, token)
    drafts: list[Draft] = field(default_factory=list)  # since the last dense pass

    @torch.no_grad()
    def run(self, logits: Tensor) -> None:
        """Decode from the prefill's last logits [V] to the end."""
        if self.max_new_tokens == 0:
            return
        first = self.sampling.token(logits, self.generator)
        goes_on = self.keep([first], self.generation.cache.length)
        while goes_on:
            if self.config.is_pass_due(len(self.drafts)) or self.is_ended():
                goes_on = self.decide()
            else:
                self.draft()

    def is_ended(self) -> bool:
        """True if the last draft may not be fed: a stop token never is, nor is the last of all."""
        room = self.max_new_tokens - len(self.generation.tokens)
        is_stopped = len(self.drafts) > 0 and self.drafts[-1].token in self.stop_tokens
        return is_stopped or len(self.drafts) == room

    def draft(self) -> None:
        """Choose one more token by a sparse step."""
        state = self.generation
        newest = self.drafts[-1].token if self.drafts else state.tokens[-1]
        logits = sparse_step(self.model, newest, state.cache, self.config)
        state.n_drifted += 1
        token = self.sampling.token(logits, self.generator)
        self.drafts.append(Draft(token, distribution(self.sampling, logits)))

    def decide(self) -> bool:
        """Run a dense pass and keep what it confirms; returns whether decoding goes on."""
        state, cache = self.generation, self.generation.cache
        start, fed = cache.length - state.n_drifted, self.fed()
        logits = self.model.output(dense_pass(self.model, fed, cache, start))
        state.n_drifted = 0
        drafts, self.drafts = self.drafts, []
        kept = confirm(drafts, logits, self.sampling, self.generator)

        # The last token kept is pending; whatever was fed after the others is forgotten.
        goes_on = self.keep(kept, start + 1)
        cache.truncate(start + len(kept))
        return goes_on

    def fed(self) -> list[int]:
        """The tokens that the dense pass encodes: the certain one, and the drafts after it.

        The last draft is fed as well where the window is full under "fused", unless it may not be.
        """
        is_full = self.config.is_pass_due(len(self.drafts))
        is_fused = self.config.schedule == "fused" or not self.drafts
        is_last_fed = is_fused and is_full and not self.is_ended()
        tokens = [self.generation.tokens[-1], *(draft.token for draft in self.drafts)]
        return tokens if is_last_fed else tokens[:-1]

    def keep(self, tokens: Sequence[int], position: int) -> bool:
        """Append certain tokens from `position` on; returns whether decoding goes on."""
        state = self.generation
        for token in tokens:
            state.tokens.append(token)
            self.on_token(position, token)
            position += 1
        return tokens[-1] not in self.stop_tokens and len(state.tokens) < self.max_new_tokens
