"""The two configurations: how to decode (`ReSAConfig`) and what the model looks like (`GPTConfig`).

Both are frozen and checked when they are made, so that every later file of the path can rely on
them: `config → blocks → sketch → attention → operations → cache → model → sampling → generate`.
"""

from dataclasses import dataclass

from . import checks
from .rope import RopeScaling

SCHEDULES = ("fused", "paper")
SELECTIONS = ("bounds", "sketch")


@dataclass(frozen=True)
class ReSAConfig:
    """Settings of decoding: which blocks a step reads (eq. 5), and when a dense pass comes.

    Dense and plain sparse decoding are corners of this one configuration:

    - `interval=1` (fused): every step is a dense pass, so this is dense decoding;
    - `interval=None`: sparse decoding that is never rectified;
    - `interval=1, schedule="paper"`: *decode-only*, sparse steps over a cache that is always exact;
    - `active_ratio=1`: every step reads every block, so every interval gives dense results.
    """

    # Which blocks a step reads.
    block_size: int = 16  # b, tokens per block
    active_ratio: float = 0.1  # p, the share of blocks that a step reads, not the share left out
    min_blocks: int = 16  # n_min: up to n_min · b = 256 tokens a step reads everything
    local_blocks: int = 1  # n_local, newest blocks that every step reads

    # When a dense pass rectifies the cache.
    interval: int | None = 32  # f: a dense pass over the newest f tokens, every f tokens; or never
    schedule: str = "fused"  # "paper": Algorithm 1; "fused": the pass also decodes a token

    # Options of the paper's tables, and of the Triton path.
    dense_layers: int = 0  # first layers that read everything, in sparse steps too (Table 1)
    eight_bit_bounds: bool = False  # bounds rounded outward to 8 bits; the Triton path alone

    # How blocks are scored.
    selection: str = "bounds"  # the paper's (eq. 3 and 4), or "sketch": this project's own
    sketch_bits: int = 2  # bits per channel of a sketch, 1 or 2

    def __post_init__(self) -> None:
        checks.plain_fields(self)
        checks.require_integer("block_size", self.block_size, 1)
        checks.require_share("active_ratio", self.active_ratio)
        n_local = checks.require_integer("local_blocks", self.local_blocks, 1)
        checks.require_integer("min_blocks", self.min_blocks, n_local, "local_blocks = ")
        checks.require_one_of("selection", self.selection, SELECTIONS)
        checks.require_one_of("sketch_bits", self.sketch_bits, (1, 2))
        checks.require_optional("interval", self.interval, 1, "never")
        checks.require_one_of("schedule", self.schedule, SCHEDULES)
        checks.require_integer("dense_layers", self.dense_layers, 0)
        checks.require_flag("eight_bit_bounds", self.eight_bit_bounds)
        has_bounds = self.selection == "bounds" or not self.eight_bit_bounds
        checks.require(has_bounds, "eight_bit_bounds", True, "False: sketches have no bounds")

    @property
    def kept_bits(self) -> int | None:
        """Bits per channel of the sketches that a cache keeps; None: it keeps bounds."""
        return self.sketch_bits if self.selection == "sketch" else None

    @property
    def drift_limit(self) -> int | None:
        """Most tokens that sparse steps may write before a dense pass is due; None: no limit.

        A pass covers f tokens. Under "paper" all of them are in the cache by then. Under "fused"
        the last one is the next input, which the pass itself feeds: the limit is f − 1.
        """
        if self.interval is None:
            return None
        return self.interval - 1 if self.schedule == "fused" else self.interval

    def is_pass_due(self, n_drifted: int) -> bool:
        """True if a dense pass comes next, after sparse steps wrote the newest `n_drifted` tokens.

        >>> [w for w in range(5) if ReSAConfig(interval=4, schedule="paper").is_pass_due(w)]
        [4]
        >>> [w for w in range(5) if ReSAConfig(interval=4, schedule="fused").is_pass_due(w)]
        [3, 4]
        """
        return self.drift_limit is not None and n_drifted >= self.drift_limit


@dataclass(frozen=True)
class GPTConfig:
    """Shape of a pre-norm GPT with RMSNorm, RoPE, grouped-query attention and SwiGLU.

    Options make the Qwen2 (`qkv_bias`), Qwen3 (`qk_norm`) and Llama (neither) families one model.
    """

    vocab_size: int
    n_layer: int
    n_head: int  # Hq
    n_kv_head: int  # Hkv; each serves G = n_head / n_kv_head query heads
    head_dim: int  # D, channels; even, because RoPE rotates them in pairs
    hidden_size: int
    intermediate_size: int
    context: int = 8192  # tokens: the longest sequence that the model was trained for
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    qkv_bias: bool = False
    qk_norm: bool = False
    tied_embeddings: bool = True
    rope_scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        checks.plain_fields(self)
        sizes = ("vocab_size", "n_layer", "n_head", "n_kv_head", "head_dim", "hidden_size")
        for name in (*sizes, "intermediate_size", "context"):
            checks.require_integer(name, getattr(self, name), 1)
        n_head, n, size = self.n_head, self.n_kv_head, self.head_dim
        checks.require(n_head % n == 0, "n_head", n_head, f"a multiple of n_kv_head = {n}")
        checks.require(size % 2 == 0, "head_dim", size, "even: RoPE rotates pairs")
        for name in ("rope_theta", "norm_eps"):
            checks.require_positive(name, getattr(self, name))
        for name in ("qkv_bias", "qk_norm", "tied_embeddings"):
            checks.require_flag(name, getattr(self, name))
        is_known = self.rope_scaling is None or isinstance(self.rope_scaling, RopeScaling)
        checks.require(is_known, "rope_scaling", repr(self.rope_scaling), "a RopeScaling or None")
