"""Choosing tokens for a whole batch, on the device, without waiting for it.

The reference's `Sampling.token` draws one uniform number per token from a sequence's generator.
Here all that may be needed are drawn ahead, so that a captured step finds its own on the device.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from resa.reference.sampling import Sampling, uniform

from .gpu.draw import draw_tokens


class Sampler:
    """`Sampling.token` for a batch: the same token from the same logits and generator.

    The numbers come from copies of the generators. `advance_generators` then moves the generators
    themselves by as many numbers as tokens were chosen.
    """

    def __init__(
        self, sampling: Sampling, generators: Sequence[torch.Generator | None],
        max_new_tokens: int, device: torch.device,
    ) -> None:  # fmt: skip
        self.sampling, self.generators = sampling, generators
        if sampling.temperature > 0:
            ahead = [_uniforms(each.clone_state(), max_new_tokens) for each in generators]
            self.uniforms = torch.stack(ahead).to(device)  # [B, N]
            # A kernel takes Python's numbers as float32, and tensors as they are.
            settings = [sampling.temperature, sampling.top_p]
            self.temperature_and_top_p = torch.tensor(settings, dtype=torch.float64, device=device)

    def __call__(self, logits: Tensor, n_chosen: Tensor) -> Tensor:
        """Choose a token per sequence, its n_chosen[s]-th: logits [B, V], n_chosen [B] → [B]."""
        if self.sampling.temperature == 0:
            return logits.argmax(dim=-1)  # the first of equals

        # Logits of 16 bits have few values, which are counted. Others are sorted, and take longer.
        if logits.dtype.itemsize == 2:
            settings, top_k = self.temperature_and_top_p, self.sampling.top_k
            return draw_tokens(logits, settings, top_k, self.uniforms, n_chosen)
        ranked, ids = logits.sort(dim=-1, descending=True, stable=True)
        wide = ranked[:, : self.sampling.top_k].double()
        probabilities = torch.softmax((wide - wide[:, :1]) / self.sampling.temperature, dim=-1)
        mass = probabilities.cumsum(dim=-1)

        # Keep tokens until their cumulative probability reaches top_p; 1e-12 absorbs rounding.
        is_kept = mass - probabilities < self.sampling.top_p - 1e-12
        kept = is_kept.sum(dim=-1, keepdim=True).clamp(min=1)  # [B, 1]

        # Take the first token whose cumulative mass exceeds the uniform number's share of it.
        last = self.uniforms.shape[1] - 1
        uniform = self.uniforms.gather(1, n_chosen.clamp(max=last)[:, None])
        place = (mass <= uniform * mass.gather(1, kept - 1)).sum(dim=-1, keepdim=True)
        return ids.gather(1, torch.minimum(place, kept - 1))[:, 0]

    def advance_generators(self, n_chosen: Sequence[int]) -> None:
        """Let every generator have drawn one number per token that its sequence has chosen."""
        if self.sampling.temperature > 0:
            for generator, n in zip(self.generators, n_chosen, strict=True):
                _uniforms(generator, n)


def _uniforms(generator: torch.Generator, n: int) -> Tensor:
    """Draw n uniform numbers as the reference does, one by one: a single draw of n gives others."""
    numbers = [uniform(generator) for _ in range(n)]
    return torch.tensor(numbers, dtype=torch.float64, device="cpu")
