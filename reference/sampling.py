"""Choosing a token from logits: the likeliest, or one drawn with a single uniform number."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import is_number, plain_fields, require, require_optional, require_share


@dataclass(frozen=True)
class Sampling:
    """Temperature, then top-k, then top-p. Temperature 0 takes the most likely token."""

    temperature: float = 0.0
    top_p: float = 1.0  # keep the fewest most likely tokens whose probabilities add up to top_p
    top_k: int | None = None  # keep the top_k likeliest tokens (ties: the lower id); None: all

    def __post_init__(self) -> None:
        plain_fields(self)
        is_finite = is_number(self.temperature) and 0 <= self.temperature < float("inf")
        require(is_finite, "temperature", repr(self.temperature), "a finite number ≥ 0")
        require_share("top_p", self.top_p)
        require_optional("top_k", self.top_k, 1, "all tokens")

    def token(self, logits: Tensor, generator: torch.Generator | None) -> int:
        """Choose a token from logits [V]. Uses one uniform number, at temperature 0 none."""
        require(logits.dim() == 1, "logits", f"shape {list(logits.shape)}", "[V], of one sequence")
        if self.temperature == 0:
            return int(logits.argmax())  # ties: the lower id
        # The uniform number picks by cumulative mass, renormalised to the tokens that are kept.
        ids, mass = self.kept(logits)
        return int(ids[place(mass, uniform(generator))])

    def kept(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens that may be chosen from logits [V], likeliest first, and their cumulative mass."""
        # Subtract the largest logit first: a tiny temperature then gives −∞ at worst, never ∞ − ∞.
        ranked, ids = logits.sort(descending=True, stable=True)
        wide = (ranked[: self.top_k].double() - ranked[0].double()) / self.temperature
        probabilities = torch.softmax(wide, dim=-1)
        mass = probabilities.cumsum(dim=-1)

        # Keep tokens until their cumulative probability reaches top_p; 1e-12 absorbs rounding.
        kept = max(int((mass - probabilities < self.top_p - 1e-12).sum()), 1)
        return ids[:kept], mass[:kept]


def uniform(generator: torch.Generator | None) -> float:
    """One uniform number in [0, 1); None is torch's default generator."""
    device = "cpu" if generator is None else generator.device
    return torch.rand((), dtype=torch.float64, device=device, generator=generator).item()


def place(mass: Tensor, number: float) -> int:
    """First index whose cumulative mass exceeds the share `number` of the total."""
    return min(int(torch.searchsorted(mass, number * mass[-1], right=True)), len(mass) - 1)
