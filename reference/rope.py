"""RoPE frequencies, and how models trained on short texts stretch them to long ones."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import plain_fields, require, require_integer, require_one_of, require_positive

ROPE_SCALINGS = ("linear", "llama3", "yarn")


@dataclass(frozen=True)
class RopeScaling:
    """Rotation of a model's channel pairs on texts `factor` times as long as those it was
    trained on.

    - "linear" (Chen et al. 2023) slows every pair down by `factor`.
    - "yarn" (Peng et al. 2023) and "llama3" (Llama 3.1) slow down the pairs that make fewer than
      `slow` turns within `original_context` tokens, keep those that make more than `fast`, and ramp
      in between. yarn also multiplies cosines and sines by `amplitude`, which makes attention
      sharper.
    """

    kind: str
    factor: float
    original_context: int = 8192  # tokens
    slow: float = 1.0  # turns
    fast: float = 4.0  # turns
    amplitude: float = 1.0
    whole_pairs: bool = True  # yarn's ramp begins and ends at whole pairs

    def __post_init__(self) -> None:
        plain_fields(self)
        require_one_of("kind", self.kind, ROPE_SCALINGS)
        for name in ("factor", "slow", "fast", "amplitude"):
            require_positive(name, getattr(self, name))
        require(self.slow < self.fast, "slow", self.slow, f"less than fast = {self.fast}")
        require_integer("original_context", self.original_context, 1)


def rotary_frequencies(
    size: int, theta: float, scaling: RopeScaling | None, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Radians per position of each of `size` / 2 channel pairs: theta^(−2i/size), scaled."""
    # The order of these operations matters: trained models had their frequencies rounded this way.
    plain = 1.0 / theta ** (torch.arange(0, size, 2, device=device, dtype=dtype) / size)
    if scaling is None:
        return plain

    # `kept` is 1 for pairs that keep their frequency, 0 for pairs slowed down by the whole factor.
    if scaling.kind == "linear":
        kept = torch.zeros_like(plain)
    elif scaling.kind == "llama3":  # a ramp over a pair's turns within the original context
        turns = scaling.original_context * plain / (2 * math.pi)
        kept = ((turns - scaling.slow) / (scaling.fast - scaling.slow)).clamp(0, 1)
    else:  # yarn: a ramp over pairs, between those that make `fast` and `slow` turns
        first, last = (
            size
            * math.log(scaling.original_context / (turns * 2 * math.pi))
            / (2 * math.log(theta))
            for turns in (scaling.fast, scaling.slow)
        )
        if scaling.whole_pairs:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, size - 1)
        pair = torch.arange(size // 2, device=device, dtype=dtype)
        kept = 1 - ((pair - first) / max(last - first, 0.001)).clamp(0, 1)
    return plain * kept + plain / scaling.factor * (1 - kept)


def rotary_angles(
    positions: Tensor, size: int, theta: float, scaling: RopeScaling | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each position's angle per channel pair; positions [B, Q] → [B, 1, Q,
    size/2]."""
    frequencies = rotary_frequencies(size, theta, scaling, positions.device, dtype)
    angles = positions.to(dtype)[:, None, :, None] * frequencies
    amplitude = 1.0 if scaling is None else scaling.amplitude
    return angles.cos() * amplitude, angles.sin() * amplitude


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate channel i of the first half with channel i of the second; x [B, H, Q, D]."""
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(x.dtype)
