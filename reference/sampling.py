"""How a token is chosen from logits: greedily, or by one uniform number from the likeliest tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import is_integer, require


def sample_token(
    logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None, top_k: int | None = None
) -> int:
    """Choose a token from logits [V], by one uniform number where the temperature is above 0.

    Top-k keeps the `top_k` likeliest tokens (ties: the lower id first). Top-p keeps the shortest prefix of those, by
    falling probability, whose mass reaches `top_p` of theirs; the uniform number picks from that prefix by its
    cumulative mass.
    """
    if temperature == 0:
        return int(logits.argmax())  # the first of equals
    ids, mass = _kept(logits, temperature, top_p, top_k)
    return int(ids[_place(mass, uniform(generator))])


def distribution(logits: Tensor, temperature: float, top_p: float, top_k: int | None = None) -> Tensor:
    """The probability with which `sample_token` chooses each token: logits [V] → [V] float64."""
    probabilities = torch.zeros(len(logits), dtype=torch.float64, device=logits.device)
    if temperature == 0:
        probabilities[logits.argmax()] = 1.0
        return probabilities
    ids, mass = _kept(logits, temperature, top_p, top_k)
    probabilities[ids] = mass.diff(prepend=mass.new_zeros(1)) / mass[-1]
    return probabilities


def draw(probabilities: Tensor, number: float) -> int:
    """The token that a uniform number picks by the cumulative mass of probabilities [V], in the order of ids."""
    return _place(probabilities.cumsum(dim=0), number)


def uniform(generator: torch.Generator | None) -> float:
    """One uniform number in [0, 1); None is torch's default generator."""
    device = "cpu" if generator is None else generator.device
    return torch.rand((), dtype=torch.float64, device=device, generator=generator).item()


def _kept(logits: Tensor, temperature: float, top_p: float, top_k: int | None) -> tuple[Tensor, Tensor]:
    """The tokens that may be chosen, by falling probability, and the mass up to and with each of them, float64."""
    ranked, ids = logits.sort(descending=True, stable=True)
    # Less the largest, so that a division by the smallest temperature overflows to −∞ alone, never to ∞ − ∞.
    probabilities = torch.softmax((ranked[:top_k].double() - ranked[0].double()) / temperature, dim=-1)
    mass = probabilities.cumsum(dim=0)
    # The tokens before which the mass has not been reached; less a little, for the rounding of the sums.
    kept = max(int((mass - probabilities < top_p - 1e-12).sum()), 1)
    return ids[:kept], mass[:kept]


def _place(mass: Tensor, number: float) -> int:
    """The first place at which the cumulative mass exceeds that share of the whole."""
    return min(int(torch.searchsorted(mass, number * mass[-1], right=True)), len(mass) - 1)


@dataclass(frozen=True)
class Choice:
    """The settings of `sample_token`."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None

    def token(self, logits: Tensor, generator: torch.Generator | None) -> int:
        """As `sample_token`."""
        return sample_token(logits, self.temperature, self.top_p, generator, self.top_k)

    def distribution(self, logits: Tensor) -> Tensor:
        """As `distribution`."""
        return distribution(logits, self.temperature, self.top_p, self.top_k)

    def uniform(self, generator: torch.Generator | None) -> float:
        """A number for a decision; at temperature 0 nothing is left to chance, and none is drawn."""
        return 0.0 if self.temperature == 0 else uniform(generator)


def sequence_generators(
    batch: int,
    temperature: float,
    top_p: float,
    top_k: int | None,
    generator: torch.Generator | Sequence[torch.Generator] | None,
) -> list[torch.Generator | None]:
    """One generator for each sequence, so that none draws from another's (law 9), after checking the sampling."""
    is_number = isinstance(temperature, (int, float)) and not isinstance(temperature, bool)
    is_number = is_number and 0 <= temperature < float("inf")
    require(is_number, "temperature", temperature, "a finite number ≥ 0")
    is_share = isinstance(top_p, (int, float)) and not isinstance(top_p, bool) and 0 < top_p <= 1
    require(is_share, "top_p", top_p, "0 < top_p ≤ 1")
    require(top_k is None or is_integer(top_k, 1), "top_k", top_k, "an integer ≥ 1, or None for all tokens")
    is_generator = generator is None or isinstance(generator, (torch.Generator, Sequence))
    require(is_generator, "generator", generator, "a torch.Generator, one per prompt, or None")
    if isinstance(generator, Sequence):
        are_generators = all(isinstance(each, torch.Generator) for each in generator)
        require(are_generators, "generator", repr(generator)[:60], "torch.Generators")
        require(len(generator) == batch, "generator", f"{len(generator)} generators", f"one, or {batch}")
        is_own = len({id(each) for each in generator}) == batch
        require(is_own, "generator", "the same generator for two prompts", "one for each prompt, or one in all")
        return list(generator)
    if temperature == 0:
        return [None] * batch
    base = torch.default_generator if generator is None else generator
    # Drawn one by one, so that the seed of prompt i does not depend on how many follow.
    seeds = [torch.randint(2**63 - 1, (), generator=base, device=base.device).item() for _ in range(batch)]
    return [torch.Generator().manual_seed(seed) for seed in seeds]
