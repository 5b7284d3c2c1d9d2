"""Hypothesis strategies: they draw structure and a seed, never numbers; `Case.build` makes the tensors.

A failing example then shrinks to a small shape and prints as one line. Slots past a sequence's length hold NaN
unless a test asks for other garbage, so that an operation that reads them cannot pass.
"""

import os
from dataclasses import dataclass, replace

import torch
from hypothesis import settings
from hypothesis import strategies as st

NAN, INF = float("nan"), float("inf")

# Where the Triton kernels run: "cpu", interpreted, or "cuda", compiled.
DEVICE = os.environ.get("RESA_TEST_DEVICE", "cpu")
IS_INTERPRETED = DEVICE == "cpu"

# Kernels take these. Strategies draw all of it where they are compiled, the small end where they are interpreted.
HEAD_DIMS, BLOCK_SIZES = (16, 32, 64, 128, 256), (8, 16, 32, 64, 128)
FAST_HEAD_DIMS = HEAD_DIMS[:2] if IS_INTERPRETED else HEAD_DIMS
FAST_BLOCK_SIZES = BLOCK_SIZES[:2] if IS_INTERPRETED else BLOCK_SIZES
# The interpreter computes with the bits of bfloat16 as if they were whole numbers.
FAST_DTYPES = (torch.float32, torch.float16, *(() if IS_INTERPRETED else (torch.bfloat16,)))


def examples(interpreted, effort=None):
    """Settings for so many of the profile's 40 examples, as interpreted launches are slow; compiled, for twice."""
    effort = (1 if IS_INTERPRETED else 2) if effort is None else effort
    return settings(max_examples=max(1, round(settings.default.max_examples / 40 * interpreted * effort)))


# Kinds of valid keys.
KEY_KINDS = {
    "normal": "independent standard normal channels",
    "equal": "all keys of a head the same, so every block scores the same",
    "few": "drawn from three vectors, so some blocks tie",
    "grid": "whole numbers -2 ... 2: sums of products are exact in every order, so ties are true ties",
    "spike": "one key per sequence thirty times as long as the others",
    "clusters": "each block near a centre of its own, so bounds are tight",
    "abyss": "one channel, -2**60: with such queries every logit is the same -2**120 * D**-0.5",
}
# The log-sum-exp of the abyss has no digits left for laws that compute with it.
ORDINARY_KEYS = tuple(kind for kind in KEY_KINDS if kind != "abyss")
QUERY_KINDS = {
    "normal": "independent standard normal channels",
    "opposed": "heads of a group in pairs q, -q that pool to zero (an odd one out stays)",
    "grid": "whole numbers -2 ... 2",
    "sparse": "most channels exactly zero, of either sign",
}
# Powers of two on keys and on queries: they round nothing. Huge keys meet tiny queries, because a logit of 1e30 is all
# rounding error.
SIZES = {"plain": (0, 0), "huge": (100, -100), "tiny": (-100, 0)}
# Whole numbers: a mean of 1, 2, 4, 8 or 16 heads and every sum after it are exact, in every order of summation.
WHOLE = {"keys": ("grid",), "queries": ("grid",), "sizes": ("plain",), "groups": (2, 4, 8, 1, 16)}

GARBAGE = ("zero", "NaN", "inf", "-inf", "huge", "lowest")


def garbage(kind, dtype):
    """A number for memory that nothing should read; "huge" and "lowest" are the dtype's largest and smallest."""
    finite = torch.finfo(dtype)
    return {"zero": 0.0, "NaN": NAN, "inf": INF, "-inf": -INF, "huge": finite.max, "lowest": finite.min}[kind]


@dataclass(frozen=True)
class Inputs:
    """Tensors of one case: query [B, Hq, D] or [B, Hq, Q, D], keys and values [B, Hkv, T_max, D], lengths [B]."""

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    lengths: torch.Tensor
    block_size: int

    @property
    def attention(self):
        """The first three arguments of both attention operations."""
        return self.query, self.keys, self.values

    @property
    def n_blocks(self):
        """Blocks in each sequence."""
        return [-(-length // self.block_size) for length in self.lengths.tolist()]

    def but(self, **changes):
        """A copy with some tensors replaced."""
        return replace(self, **changes)


@dataclass(frozen=True)
class Case:
    """The structure of one example; `seed` decides the numbers."""

    seed: int
    kv_heads: int
    group: int
    head_dim: int
    block_size: int
    lengths: tuple[int, ...]
    capacity: int
    key_kind: str = "normal"
    query_kind: str = "normal"
    size: str = "plain"

    @property
    def exact_logits(self):
        """True where a logit carries one rounding at most, the same for all: then its size costs no accuracy."""
        return self.key_kind == "abyss"

    def build(self, dtype=torch.float64, slack=NAN, n_queries=None):
        """The tensors in `dtype`, with `slack` in every slot of keys and values past the length."""
        generator = torch.Generator().manual_seed(self.seed)
        batch, shape = len(self.lengths), (len(self.lengths), self.kv_heads, self.capacity, self.head_dim)
        keys = self._keys(generator, shape)
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        query = self._query(generator, (batch, self.kv_heads, self.group, n_queries or 1, self.head_dim))
        abyss, (key_power, query_power) = 2.0**60, SIZES[self.size]
        if dtype == torch.float16:  # its exponents end at 15
            abyss, key_power, query_power = 2.0**15, key_power // 12, query_power // 12
        if self.key_kind == "abyss":
            keys = torch.zeros(shape, dtype=torch.float64)
            keys[..., 0] = -abyss
            query[..., 0] = abyss
        else:
            keys, query = keys * 2.0**key_power, query * 2.0**query_power
        past = torch.arange(self.capacity)[:, None] >= torch.tensor(self.lengths).view(-1, 1, 1, 1)  # [B, 1, T_max, 1]
        query = query.flatten(1, 2)  # [B, Hq, Q, D]
        return Inputs(
            query=(query if n_queries is not None else query[:, :, 0]).to(dtype),
            keys=keys.to(dtype).masked_fill(past, slack),
            values=values.to(dtype).masked_fill(past, slack),
            lengths=torch.tensor(self.lengths, dtype=torch.int32),
            block_size=self.block_size,
        )

    def indices(self, share=0.5, width=None):
        """A random selection [B, Hkv, N], ascending with -1 at the end: each block with probability `share`."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        n_blocks = -(-self.capacity // self.block_size)
        taken = torch.rand(len(self.lengths), self.kv_heads, n_blocks, generator=generator) < share
        blocks = torch.arange(n_blocks)
        taken &= blocks * self.block_size < torch.tensor(self.lengths).view(-1, 1, 1)
        rows = torch.where(taken, blocks, n_blocks).sort(dim=-1).values
        rows = torch.where(rows == n_blocks, -1, rows).to(torch.int32)
        spare = torch.full((*rows.shape[:2], (width or n_blocks) - n_blocks), -1, dtype=torch.int32)
        return torch.cat([rows, spare], dim=-1)

    def _keys(self, generator, shape):
        def normal(*size):
            return torch.randn(size, generator=generator, dtype=torch.float64)

        def whole(low, high, size):
            return torch.randint(low, high + 1, size, generator=generator)

        batch, kv_heads, capacity, head_dim = shape
        keys = normal(*shape)
        if self.key_kind == "equal":
            keys[:] = keys[:, :, :1].clone()
        elif self.key_kind == "few":
            which = whole(0, 2, (batch, kv_heads, capacity, 1)).expand(shape)
            keys = normal(batch, kv_heads, 3, head_dim).gather(2, which)
        elif self.key_kind == "grid":
            keys = whole(-2, 2, shape).double()
        elif self.key_kind == "spike":
            for s, length in enumerate(self.lengths):
                if length:
                    keys[s, :, int(whole(0, length - 1, ()))] *= 30
        elif self.key_kind == "clusters":
            centres = 4 * normal(batch, kv_heads, -(-capacity // self.block_size), head_dim)
            keys = 0.05 * keys + centres.repeat_interleave(self.block_size, dim=2)[:, :, :capacity]
        return keys

    def _query(self, generator, shape):
        query = torch.randn(shape, generator=generator, dtype=torch.float64)  # [B, Hkv, G, Q, D]
        grid = torch.randint(-2, 3, shape, generator=generator).double()
        if self.query_kind == "opposed":
            pairs = self.group // 2
            query[:, :, pairs : 2 * pairs] = -query[:, :, :pairs]
        elif self.query_kind == "grid":
            query = grid
        elif self.query_kind == "sparse":
            query = torch.where(grid.abs() < 2, 0.0 * query, query)  # 0 * -1 is -0
        if self.key_kind == "abyss":
            query = torch.zeros(shape, dtype=torch.float64)
        return query


def shuffled(indices, seed):
    """Every row of [B, Hkv, N] in another order, so that -1 stands anywhere."""
    order = torch.rand(indices.shape, generator=torch.Generator().manual_seed(seed)).argsort(dim=-1)
    return indices.gather(2, order)


def lengths(block_size, max_blocks, min_length=0):
    """Token counts at and around the edges of blocks: 0, 1, b - 1, b, b + 1, 2b, ..., and the middles."""
    edges = {i * block_size + step for i in range(max_blocks + 1) for step in (-1, 0, 1, block_size // 2)}
    return st.sampled_from(sorted(n for n in edges if min_length <= n <= max_blocks * block_size))


@st.composite
def cases(draw, *, head_dims, block_sizes, groups, keys=tuple(KEY_KINDS), queries=tuple(QUERY_KINDS),
          sizes=tuple(SIZES), min_length=0, max_blocks=6, max_batch=3):  # fmt: skip
    """Shapes in which mix-ups show: groups and key-value heads differ in number, lengths are ragged.

    The capacity is seldom a multiple of the block size and may leave blocks without a token.
    """
    block_size = draw(st.sampled_from(block_sizes))
    tokens = draw(st.lists(lengths(block_size, max_blocks, min_length), min_size=1, max_size=max_batch))
    return Case(
        seed=draw(st.integers(0, 2**32 - 1)),
        kv_heads=draw(st.sampled_from([2, 1, 3])),
        group=draw(st.sampled_from(groups)),
        head_dim=draw(st.sampled_from(head_dims)),
        block_size=block_size,
        lengths=tuple(tokens),
        capacity=max(1, max(tokens) + draw(st.integers(0, block_size + 1))),
        key_kind=draw(st.sampled_from(keys)),
        query_kind=draw(st.sampled_from(queries)),
        size=draw(st.sampled_from(sizes)),
    )


@st.composite
def windows(draw, case):
    """(Q, query_lengths or None): Q queries per sequence, of which each sequence uses some, 0 and all included."""
    n_queries = min(draw(st.sampled_from([3, 1, 2, 5, case.capacity + 1])), 20)
    if draw(st.booleans()):
        return n_queries, None
    return n_queries, draw(st.lists(st.integers(0, n_queries), min_size=len(case.lengths), max_size=len(case.lengths)))


@st.composite
def decoding(draw, block_size, max_local=3):
    """Fields of a ReSAConfig that selection reads, as keyword arguments."""
    local_blocks = draw(st.integers(1, max_local))
    ratios = st.one_of(*(st.integers(1, parts).map(lambda n, parts=parts: n / parts) for parts in (10, 100)))
    return {
        "block_size": block_size,
        "active_ratio": draw(st.one_of(ratios, st.floats(0.01, 1.0))),
        "min_blocks": local_blocks + draw(st.integers(0, 4)),
        "local_blocks": local_blocks,
    }


# Kinds of block scores. The last four try a search for the threshold: its last bit, and its whole range.
SCORE_KINDS = (
    "normal", "ties", "equal", "zeros", "specials", "all NaN", "neighbours", "smallest", "all sizes", "outliers",
)  # fmt: skip


def build_scores(kind, seed, shape, dtype):
    """Scores [B, Hkv, M] of one kind; "specials" mixes numbers, both zeros, both infinities and NaN."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(shape, generator=generator, dtype=torch.float64)
    steps = torch.randint(-3, 4, shape, generator=generator)
    sign = torch.where(steps % 2 == 0, 1.0, -1.0)
    if kind == "ties":
        scores = scores.round()
    elif kind == "equal":
        scores = torch.full(shape, -1.5, dtype=torch.float64)
    elif kind == "zeros":
        scores = 0.0 * scores  # zeros of both signs
    elif kind == "specials":
        table = torch.tensor([1.0, 0.0, -0.0, NAN, INF, -INF, -NAN, -3.0], dtype=torch.float64)
        scores = table[torch.randint(0, len(table), shape, generator=generator)]
    elif kind == "all NaN":
        scores = torch.full(shape, NAN, dtype=torch.float64)
    elif kind == "neighbours":  # of 1 and -1
        scores = sign * (1 + steps.double() * torch.finfo(dtype).eps)
    elif kind == "smallest":  # float32 numbers there are
        scores = steps.double() * 2.0**-149
    elif kind == "all sizes":  # of either sign
        scores = sign * torch.exp2(torch.rand(shape, generator=generator).double() * 260 - 135)
    elif kind == "outliers":
        is_outlier = torch.rand(shape, generator=generator) < 0.02
        scores = torch.where(is_outlier, 3e38 * scores.sign(), 1 + 1e-3 * scores)
    return scores.to(dtype)
