"""The fused layers: each kernel against plain PyTorch and float64, the model they make up against the reference's.

The reference decides what they compute, so plain PyTorch here is `resa.reference.model`'s own code.
"""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from resa import reference
from resa.reference import ReSAConfig
from resa.reference.model import RMSNorm
from resa.reference.rope import apply_rotary, rotary_angles
from small_models import Shape
from strategies import DEVICE, FAST_DTYPES, FAST_HEAD_DIMS, NAN, examples
from tolerances import assert_same_bits, assert_three_way, eps

pytestmark = pytest.mark.fast
elementwise = pytest.importorskip("resa.fast.gpu.elementwise", reason="triton comes for Linux only")
model_file = pytest.importorskip("resa.fast.model", reason="triton comes for Linux only")
four_bit = pytest.importorskip("resa.fast.bench.four_bit", reason="triton comes for Linux only")
fast = pytest.importorskip("resa.fast.generate", reason="triton comes for Linux only")

VARIANTS = [
    Shape(seed=1, head_dim=16, hidden=32),
    Shape(seed=2, head_dim=16, hidden=24, qk_norm=True, tied=False),
    Shape(seed=3, head_dim=32, hidden=40, qkv_bias=True, group=5, kv_heads=1),
    Shape(seed=4, head_dim=64, hidden=16, qk_norm=True, qkv_bias=True, kv_heads=3, group=1, layers=3),
]
ROWS = st.sampled_from([1, 2, 15, 16, 17, 40])
SEEDS = st.integers(0, 2**32 - 1)
DTYPES = st.sampled_from(FAST_DTYPES)


def randn(seed, *sizes, dtype, scale=1.0):
    """Normal numbers, equal on every device, already rounded to dtype."""
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*sizes, generator=generator, dtype=torch.float64)).to(dtype)


def here(tensor):
    assert tensor.device.type == DEVICE
    return tensor.cpu()


def assert_as_good_as_plain(actual, exact, plain, terms, what):
    """Twice plain PyTorch's error, plus two roundings of what is added up: `terms`, float64, like the result."""
    dtype = plain.dtype
    floor = 2 * eps(dtype) * terms.numpy()
    assert_three_way(actual, exact.numpy(), plain, floor, what)


# --- Kernels ---


@examples(30)
@given(rows=ROWS, size=st.sampled_from([1, 2, 31, 32, 300, 3584]), dtype=DTYPES, seed=SEEDS, has_delta=st.booleans())
def test_residual_and_norm(rows, size, dtype, seed, has_delta):
    """x moves by delta, to the bit; the norm is that of what x is then."""
    x, delta = (randn(seed + i, rows, size, dtype=dtype, scale=3.0) for i in range(2))
    norm = RMSNorm(size, 1e-3).to(dtype)
    norm.weight.data = randn(seed + 2, size, dtype=dtype)
    moved = x.to(DEVICE, copy=True)
    weight = norm.weight.data.to(DEVICE)
    out = here(elementwise.add_norm(moved, delta.to(DEVICE) if has_delta else None, weight, 1e-3))
    after = x + delta if has_delta else x
    assert_same_bits(here(moved), after, "x")
    with torch.no_grad():
        plain, exact = norm(after), copy.deepcopy(norm).double()(after.double())
    assert out.dtype == dtype
    assert_as_good_as_plain(out, exact, plain, exact.abs(), "normed")


def plain_heads(projected, cos, sin, n_head, n_kv_head, norms):
    """The reference's way from one projection to queries, keys and values."""
    size = projected.shape[2] // (n_head + 2 * n_kv_head)
    heads = projected.unflatten(2, (-1, size)).transpose(1, 2).split([n_head, n_kv_head, n_kv_head], dim=1)
    query, key = (
        apply_rotary(norm(part) if norm else part, cos, sin) for norm, part in zip(norms, heads, strict=False)
    )
    return query, key, heads[2]


@examples(30)
@given(
    batch=st.integers(1, 3),
    width=st.integers(1, 4),
    heads=st.sampled_from([(3, 1), (6, 2), (5, 5), (28, 4), (1, 1)]),
    size=st.sampled_from(FAST_HEAD_DIMS),
    is_normed=st.booleans(),
    dtype=DTYPES,
    seed=SEEDS,
)
def test_heads_are_split_normed_and_rotated(batch, width, heads, size, is_normed, dtype, seed):
    n_head, n_kv_head = heads
    projected = randn(seed, batch, width, (n_head + 2 * n_kv_head) * size, dtype=dtype)
    positions = torch.randint(0, 5000, (batch, width), generator=torch.Generator().manual_seed(seed))
    cos, sin = rotary_angles(positions, size, 1e4, None, torch.float32)
    norms = [RMSNorm(size, 1e-3).to(dtype) if is_normed else None for _ in range(2)]
    for i, norm in enumerate(norms):
        if norm is not None:
            norm.weight = torch.nn.Parameter(randn(seed + i, size, dtype=dtype), requires_grad=False)
    weights = [norm.weight.to(DEVICE) if norm else None for norm in norms]
    placed = [tensor.to(DEVICE) for tensor in (projected, cos, sin)]
    found = elementwise.split_heads(*placed, n_head, n_kv_head, *weights, 1e-3)
    assert all(part.is_contiguous() for part in found)
    found = [here(part) for part in found]
    with torch.no_grad():
        plain = plain_heads(projected, cos, sin, n_head, n_kv_head, norms)
        wide = [copy.deepcopy(norm).double() if norm else None for norm in norms]
        exact = plain_heads(projected.double(), cos.double(), sin.double(), n_head, n_kv_head, wide)
    assert_same_bits(found[2], plain[2].contiguous(), "values")
    for name, ours, theirs, truth in zip(("queries", "keys"), found, plain, exact, strict=False):
        first, second = truth.chunk(2, dim=-1)
        length = (first.square() + second.square()).sqrt()  # of each pair, which a turn keeps
        assert_as_good_as_plain(ours, truth, theirs.contiguous(), torch.cat((length, length), dim=-1), name)


@examples(15)
@given(rows=ROWS, size=st.sampled_from([1, 20, 1023, 1024, 1025, 18_944]), dtype=DTYPES, seed=SEEDS)
def test_swiglu(rows, size, dtype, seed):
    gate_up = randn(seed, rows, 2 * size, dtype=dtype, scale=3.0)
    gate_up[0, 0] = -200.0  # exp of what is left overflows
    out = here(elementwise.swiglu(gate_up.to(DEVICE)))
    gate, up = gate_up.split(size, dim=-1)
    exact = F.silu(gate.double()) * up.double()
    # A GPU's exp is a power of two, good to 2 eps, whose exponent gate·log₂e is rounded first; its quotient, to 2 eps.
    steps = 5 + gate.double().abs() / 2
    floor = (2 * eps(dtype) + eps(torch.float32) * steps) * exact.abs()
    assert_three_way(out, exact.numpy(), F.silu(gate) * up, floor.numpy(), "gated")


@pytest.mark.parametrize("rows", [0, 17])
def test_rows_that_are_not_there(rows):
    """No rows give no rows; and what lies behind the last row stays as it is."""
    wide = torch.full((20, 48), NAN, device=DEVICE)
    x = wide[:rows]
    x.copy_(randn(5, rows, 48, dtype=torch.float32))
    out = elementwise.add_norm(x, x.clone(), torch.ones(48, device=DEVICE), 1e-6)
    assert out.shape == (rows, 48)
    assert out.isfinite().all()
    assert wide[rows:].isnan().all()
    assert elementwise.swiglu(x).shape == (rows, 24)


# --- The model ---


def built(shape, dtype=torch.float32):
    return shape.model(dtype).to(DEVICE)


def logits_of(model, tokens):
    with torch.no_grad():
        return model(tokens)


@pytest.mark.parametrize("shape", VARIANTS, ids=str)
def test_the_fused_model_is_the_model(shape):
    """Logits of a causal pass over two texts, in float32, three ways."""
    model = built(shape)
    tokens = torch.tensor(shape.prompts((21, 21)), device=DEVICE)
    exact = logits_of(copy.deepcopy(model).double(), tokens).cpu()
    plain = logits_of(model, tokens).cpu()
    fused = logits_of(model_file.FusedGPT(model), tokens).cpu()
    error, allowed = ((x.double() - exact).norm(dim=-1) for x in (fused, plain))
    assert exact.std() > 0.1
    assert (error <= 2 * allowed + 20 * eps(torch.float32) * exact.norm(dim=-1)).all()
    assert_same_bits(logits_of(model, tokens).cpu(), plain, "the model itself, which the fused one must not change")


@pytest.mark.parametrize("shape", VARIANTS, ids=str)
def test_a_loaded_models_weights_are_shared_not_copied(shape, tmp_path):
    """A file's projections come to lie one after the other. The model trains and is saved as any other."""
    path, again = tmp_path / "model.safetensors", tmp_path / "again.safetensors"
    plain = built(shape)
    reference.save_model(path, plain, dtype=torch.float32)
    model = reference.load_model(path, device=DEVICE)
    held = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    fused = model_file.FusedGPT(model)
    matrices = [matrix for layer in fused.fused for matrix in layer.matmuls().values()]
    assert {matrix.weight.untyped_storage().data_ptr() for matrix in matrices} <= held
    reference.save_model(again, model, dtype=torch.float32)
    assert again.read_bytes() == path.read_bytes()
    tokens = torch.tensor(shape.prompts((9,)), device=DEVICE)
    for each in (model, plain):
        each.requires_grad_(True)(tokens).logsumexp(dim=-1).sum().backward()
    for (name, ours), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert_same_bits(ours.grad, other.grad, name)
    versions = [parameter._version for parameter in model.parameters()]
    with torch.no_grad():
        model.layers[0].attn.k_proj.weight.mul_(1.5)
    changed = [parameter._version != old for parameter, old in zip(model.parameters(), versions, strict=True)]
    assert sum(changed) == 1, "an update of one weight must not look like one of its neighbours"


def test_matrices_in_another_order_are_copied():
    """Views of one memory, but not one after the other."""
    both = torch.randn(2, 3, 4)
    second, first = (torch.nn.Linear(4, 3, bias=False) for _ in range(2))
    second.weight.data, first.weight.data = both.unbind()
    fused = model_file.Linear.fused(first, second)
    assert torch.equal(fused.weight, torch.cat((both[1], both[0])))
    assert [each.weight.data_ptr() for each in (second, first)] == [part.data_ptr() for part in both]
    assert torch.equal(second.weight, both[0])


def test_a_transformer_of_its_own_is_kept():
    """A subclass that overrides `hidden_states` decodes by it, on the kernels."""

    class Mirrored(reference.GPT):
        def hidden_states(self, tokens, positions, attend):
            return super().hidden_states(tokens.flip(-1).flip(-1), positions, attend)

    model = Mirrored(VARIANTS[0].config())
    kept = model_file.accelerated(model)
    assert isinstance(kept, Mirrored)
    assert kept.ops is model_file.TRITON_OPS
    assert isinstance(model_file.accelerated(built(VARIANTS[0])), model_file.FusedGPT)
    fused = model_file.FusedGPT(built(VARIANTS[0]))
    assert isinstance(model_file.accelerated(fused), model_file.FusedGPT)


# --- Weights in 4 bits ---

WIDE = Shape(seed=7, kv_heads=2, group=4, head_dim=16, hidden=128, qkv_bias=True, tied=False)


def need_the_library():
    """Skip a test that multiplies in 4 bits where the library that does so on a GPU is missing."""
    if DEVICE == "cuda":
        pytest.importorskip("humming", reason="the extra `four-bit` has it")


def wide_model(dtype=torch.float32):
    """A model whose matrices have rows of a multiple of 128."""
    config = WIDE.config(intermediate_size=256)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = reference.GPT(config)
        for parameter in model.parameters():
            parameter.data += torch.randn_like(parameter) * (0.05 if parameter.dim() == 2 else 0.1)
    return model.to(DEVICE, dtype)


@examples(15)
@given(seed=SEEDS, dtype=DTYPES, rows=st.integers(1, 5), groups=st.integers(1, 3), exponent=st.integers(-8, 8))
def test_four_bits_are_the_nearest(seed, dtype, rows, groups, exponent):
    """Within half a step of the weight; a whole one where the code 8 is missing. Rounded again, nothing changes."""
    weight = randn(seed, rows, 128 * groups, dtype=dtype, scale=2.0**exponent)
    codes, scale = four_bit.round_to_four_bits(weight)
    assert codes.min() >= -8
    assert codes.max() <= 7
    step = scale.double().repeat_interleave(128, dim=1)
    error = (codes.double() * step - weight.double()).abs()
    is_at_end = weight.double() / step > 7
    assert (error <= step.abs() * torch.where(is_at_end, 1.01, 0.51)).all()
    assert codes.abs().amax(dim=1).tolist() == [8] * rows, "the furthest weight takes the code -8, whatever its sign"
    rounded = four_bit.widened(codes, scale)
    assert rounded.dtype == dtype
    assert torch.equal(four_bit.widened(*four_bit.round_to_four_bits(rounded)), rounded)


def test_every_matrix_is_rounded_and_nothing_else():
    """The model's logits and decoded tokens are those of the reference with rounded weights."""
    dtype = torch.float32 if DEVICE == "cpu" else torch.float16
    need_the_library()
    rounded = wide_model(dtype)
    for name, parameter in rounded.named_parameters():
        if parameter.dim() == 2 and not name.startswith("embed"):
            parameter.data = four_bit.widened(*four_bit.round_to_four_bits(parameter.data))
    plain = wide_model(dtype)
    quantised = four_bit.quantise(model_file.FusedGPT(copy.deepcopy(plain)))
    tokens = torch.tensor(WIDE.prompts((30, 30)), device=DEVICE)
    found, expected, unrounded = (logits_of(model, tokens).double() for model in (quantised, rounded, plain))
    size = expected.norm()
    assert (found - expected).norm() <= 8 * eps(dtype) * math.sqrt(WIDE.layers) * size
    assert (found - unrounded).norm() > 0.01 * size, "nothing was rounded"
    if DEVICE == "cpu":
        prompts, config = WIDE.prompts((21, 9)), ReSAConfig(block_size=8, min_blocks=2, interval=3)
        expected = reference.generate(rounded, prompts, 7, config)
        done = fast.generate(quantised, prompts, 7, config)
        assert [each.tokens for each in done] == [each.tokens for each in expected]


def test_what_can_not_be_rounded_is_refused():
    with pytest.raises(ValueError, match=r"in: got 130; allowed: a multiple of 128"):
        four_bit.round_to_four_bits(torch.zeros(3, 130))


@pytest.mark.parametrize("move", [lambda m: m.to(torch.float64), lambda m: m.half(), lambda m: m.cpu()])
def test_a_fused_model_is_not_moved(move):
    """Half of it would stay behind."""
    fused = model_file.FusedGPT(built(VARIANTS[0]))
    with pytest.raises(ValueError, match="FusedGPT: got a move or a cast; allowed: one of the model that it is built"):
        move(fused)


def test_a_product_in_four_bits_says_what_it_reads():
    linear = model_file.Linear(randn(1, 64, 256, dtype=torch.float16).to(DEVICE), None)
    need_the_library()
    rounded = four_bit.FourBitLinear(linear)
    assert rounded.nbytes == 64 * 256 // 2 + 64 * 2 * 2
    assert linear.nbytes == 64 * 256 * 2
