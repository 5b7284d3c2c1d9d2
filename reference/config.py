"""The two configurations: the shape of a GPT and how it decodes.

Both are frozen and checked on construction, so that everything to the right of this file
(`cache → blocks → attention → model → sampling → speculate → generate`) can rely on them.
"""

from __future__ import annotations

from dataclasses import dataclass

from .checks import is_integer, require

SCHEDULES = ("fused", "paper")
ROPE_SCALINGS = ("linear", "llama3", "yarn")


@dataclass(frozen=True)
class RopeScaling:
    """How a model trained on short texts turns its channel pairs on texts `factor` times as long.

    "linear" slows every pair down by `factor` (Chen et al. 2023). "yarn" (Peng et al. 2023) and "llama3" (Llama 3.1)
    slow down the pairs that make fewer than `slow` turns within `original_context` tokens, leave alone those that make
    more than `fast`, and ramp in between; yarn also multiplies cosines and sines by `amplitude`, which makes attention
    sharper.
    """

    kind: str
    factor: float
    original_context: int = 8192  # tokens
    slow: float = 1.0  # turns
    fast: float = 4.0
    amplitude: float = 1.0
    whole_pairs: bool = True  # yarn's ramp begins and ends at whole pairs

    def __post_init__(self) -> None:
        require(self.kind in ROPE_SCALINGS, "kind", repr(self.kind), " or ".join(map(repr, ROPE_SCALINGS)))
        for name in ("factor", "slow", "fast", "amplitude"):
            value = getattr(self, name)
            require(isinstance(value, (int, float)) and 0 < value < float("inf"), name, value, "a finite number > 0")
        require(self.slow < self.fast, "slow", self.slow, f"less than fast = {self.fast}")
        require(is_integer(self.original_context, 1), "original_context", self.original_context, "an integer ≥ 1")


@dataclass(frozen=True)
class GPTConfig:
    """Shape of a pre-norm GPT with RMSNorm, RoPE, grouped-query attention and SwiGLU.

    The optional parts make the Qwen2 (`qkv_bias`), Qwen3 (`qk_norm`) and Llama (neither) families
    configurations of one model.
    """

    vocab_size: int
    n_layer: int
    n_head: int  # Hq
    n_kv_head: int  # Hkv; G = n_head // n_kv_head query heads share one KV head
    head_dim: int  # D, channels; even, because RoPE turns them in pairs
    hidden_size: int
    intermediate_size: int
    context: int = 8192  # tokens: the longest sequence the model was trained for
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    qkv_bias: bool = False
    qk_norm: bool = False
    tied_embeddings: bool = True
    rope_scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "n_layer", "n_head", "n_kv_head", "head_dim", "hidden_size", "intermediate_size")
        for name in (*sizes, "context"):
            require(is_integer(getattr(self, name), 1), name, getattr(self, name), "an integer ≥ 1")
        require(self.n_head % self.n_kv_head == 0, "n_head", self.n_head, f"a multiple of n_kv_head = {self.n_kv_head}")
        require(self.head_dim % 2 == 0, "head_dim", self.head_dim, "an even number, because RoPE turns pairs")
        for name in ("rope_theta", "norm_eps"):
            value = getattr(self, name)
            require(isinstance(value, (int, float)) and 0 < value < float("inf"), name, value, "a finite number > 0")
        for name in ("qkv_bias", "qk_norm", "tied_embeddings"):
            require(isinstance(getattr(self, name), bool), name, getattr(self, name), "True or False")
        is_known = self.rope_scaling is None or isinstance(self.rope_scaling, RopeScaling)
        require(is_known, "rope_scaling", self.rope_scaling, "a RopeScaling or None")


@dataclass(frozen=True)
class ReSAConfig:
    """How to decode: block selection (eq. 5) and the rhythm of rectification (Algorithm 1).

    Dense and plain sparse decoding are corners of this one configuration:

    - `interval=1` (fused): dense decoding;
    - `interval=None`: sparse decoding that is never rectified;
    - `interval=1, schedule="paper"`: *decode-only*, sparse steps over a cache that is always exact;
    - `active_ratio=1`: every block is attended, so that every interval gives dense results.
    """

    block_size: int = 16  # b, tokens per block
    active_ratio: float = 0.1  # p, the share of blocks attended (not the share left out)
    min_blocks: int = 16  # n_min
    local_blocks: int = 1  # n_local: newest blocks, always attended
    interval: int | None = 32  # f, tokens re-encoded per rectification; None: never
    schedule: str = "fused"  # "fused": the dense pass also decodes the pending token; "paper": Algorithm 1
    dense_below: int = 0  # tokens: a sequence whose cache is shorter decodes densely
    dense_layers: int = 0  # the first so many layers attend to everything, in sparse steps too (paper, Table 1)

    def __post_init__(self) -> None:
        require(is_integer(self.block_size, 1), "block_size", self.block_size, "an integer ≥ 1")
        ratio = self.active_ratio
        is_number = isinstance(ratio, (int, float)) and not isinstance(ratio, bool)
        require(is_number and 0 < ratio <= 1, "active_ratio", ratio, "0 < active_ratio ≤ 1")
        require(is_integer(self.local_blocks, 1), "local_blocks", self.local_blocks, "an integer ≥ 1")
        is_enough = is_integer(self.min_blocks, 1) and self.min_blocks >= self.local_blocks
        require(is_enough, "min_blocks", self.min_blocks, f"an integer ≥ local_blocks = {self.local_blocks}")
        is_interval = self.interval is None or is_integer(self.interval, 1)
        require(is_interval, "interval", self.interval, "an integer ≥ 1, or None for never")
        require(self.schedule in SCHEDULES, "schedule", repr(self.schedule), " or ".join(map(repr, SCHEDULES)))
        for name in ("dense_below", "dense_layers"):
            require(is_integer(getattr(self, name), 0), name, getattr(self, name), "an integer ≥ 0")
