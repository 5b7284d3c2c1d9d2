"""Only Triton: tokens drawn without a sort are those that the reference's sorting sampler draws."""

from dataclasses import asdict
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from backends import poisoned_memory
from resa.reference import Sampling
from resa.reference.sampling import place
from strategies import DEVICE, INF, NAN

DTYPES = [torch.float16] if DEVICE == "cpu" else [torch.float16, torch.bfloat16]  # the interpreter has no bfloat16
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
pytestmark = pytest.mark.fast
ALMOST_ONE = 1 - 2**-53

KINDS = {
    "normal": lambda row: row,
    "narrow": lambda row: row / 100,
    "wide": lambda row: 30 * row,
    "ties": lambda row: row.round(),
    "one value": lambda row: row * 0 + 1.5,
    "two values": lambda row: (row > 1).to(row.dtype),
    "many impossible": lambda row: row.masked_fill(row < 0.5, -INF),
    "subnormal": lambda row: row * 1e-7,
    "both zeros": lambda row: torch.where(row > 0, 0.0, -0.0),
}


def draw(logits, sampling, uniforms, n_chosen=None):
    """Tokens by the kernels: logits [B, V], one number per row or a table of them."""
    draw_tokens = import_module("resa.fast.gpu.draw").draw_tokens
    uniforms = torch.as_tensor(uniforms, dtype=torch.float64).view(len(logits), -1).to(DEVICE)
    n_chosen = torch.zeros(len(logits), dtype=torch.int64) if n_chosen is None else n_chosen
    settings = torch.tensor([sampling.temperature, sampling.top_p], dtype=torch.float64, device=DEVICE)
    with poisoned_memory():
        return draw_tokens(logits.to(DEVICE), settings, sampling.top_k, uniforms, n_chosen.to(DEVICE)).tolist()


def sorted_draw(logits, sampling, number):
    """The reference's `Sampling.token` from logits [V], for a number that is given."""
    ids, mass = Sampling.kept(sampling, logits)
    return int(ids[place(mass, number)])


samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([1e-3, 0.3, 0.7, 1.0, 1.3, 100.0]),
    top_p=st.sampled_from([1e-9, 0.05, 0.3, 0.5, 0.9, 0.95, 1.0]),
    top_k=st.sampled_from([None, 1, 2, 7, 50, 1000, 10**6]),
)
numbers = st.sampled_from([0.0, 0.25, 0.5, ALMOST_ONE]) | st.floats(0, 1, exclude_max=True)


@each_dtype
@pytest.mark.parametrize(
    ("sampling", "n_kept"),
    [(Sampling(1.0, 0.35), 4), (Sampling(1.0, 0.3), 3), (Sampling(1.0, 1.0, 3), 3), (Sampling(0.5, 0.5, 4), 2)],
    ids=str,
)
def test_cuts_among_equal_tokens(dtype, sampling, n_kept):
    """Ten equal tokens: the first that reach top-p, the first top-k, each as likely as the others."""
    logits = torch.zeros(n_kept, 10, dtype=dtype)
    middles = [(i + 0.5) / n_kept for i in range(n_kept)]
    assert draw(logits, sampling, middles) == list(range(n_kept))
    assert draw(logits[:1], sampling, [ALMOST_ONE]) == [n_kept - 1]


@each_dtype
@settings(max_examples=20 if DEVICE == "cpu" else 300)
@given(
    kind=st.sampled_from(sorted(KINDS)), size=st.integers(1, 4500), seed=st.integers(0, 2**31),
    sampling=samplings, row=st.tuples(numbers, numbers),
)  # fmt: skip
@example(kind="narrow", size=927, seed=8618, sampling=Sampling(0.001), row=(0.0, ALMOST_ONE))  # a cut between two sets
def test_the_same_tokens_as_by_sorting(dtype, kind, size, seed, sampling, row):
    logits = torch.randn(2, size, generator=torch.Generator().manual_seed(seed))
    logits = KINDS[kind](logits).to(dtype)
    for each, number, found in zip(logits, row, draw(logits, sampling, row), strict=True):
        # Where a number falls on the border of two tokens, or top-p on that of two sets, a rounding decides.
        near = [min(number * (1 + error), ALMOST_ONE) for error in (-1e-12, 0.0, 1e-12)]
        cuts = [  # `Sampling` refuses a top-p above 1
            SimpleNamespace(**asdict(sampling) | {"top_p": sampling.top_p + error}) for error in (0.0, -1e-14, 1e-14)
        ]
        assert found in [sorted_draw(each, cut, number) for cut in cuts for number in near]


@each_dtype
@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.7, 0.9, 5)], ids=str)
def test_rows_without_a_finite_maximum(dtype, sampling):
    """The first token of the largest value, NaN above all: what the reference's sort leaves in front."""
    logits = torch.randn(6, 3000, generator=torch.Generator().manual_seed(1)).to(dtype)
    logits[0, [70, 2900]] = NAN
    logits[1, [2500, 2600]] = INF
    logits[2] = -INF
    logits[3, 2999], logits[3, 5] = -NAN, INF
    logits[4] = NAN
    expected = [sorted_draw(row, sampling, 0.6) for row in logits]
    assert expected[:5] == [70, 2500, 0, 2999, 0]
    assert draw(logits, sampling, [0.6] * 6) == expected


@each_dtype
def test_each_row_takes_its_own_number(dtype):
    """u[s, n_chosen[s]], the last one where more tokens have been chosen than numbers were drawn."""
    logits, sampling = torch.zeros(3, 1000, dtype=dtype), Sampling(1.0)
    uniforms = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6], [0.7, 0.8, 0.9]], dtype=torch.float64)
    assert draw(logits, sampling, uniforms + 1e-4, torch.tensor([0, 2, 7])) == [100, 600, 900]


@each_dtype
def test_a_real_vocabulary(dtype):
    """Many programs, ties among the tokens, eight rows at once; reruns draw the same."""
    size = 20_000 if DEVICE == "cpu" else 152_064
    logits = 3 * torch.randn(8, size, generator=torch.Generator().manual_seed(2)).to(dtype)
    row = torch.rand(8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for sampling in (Sampling(0.7, 0.95), Sampling(1.0, 1.0, 50)):
        expected = [sorted_draw(each, sampling, float(number)) for each, number in zip(logits, row, strict=True)]
        for _ in range(1 if DEVICE == "cpu" else 5):
            assert draw(logits, sampling, row) == expected
