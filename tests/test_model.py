"""The transformer: against the oracle's in every variant, its rotary positions, and the five operations it runs on."""

import math
from collections import Counter
from dataclasses import asdict, fields, replace

import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import (
    EXACT,
    VISIBLE,
    Shape,
    dense_cache,
    drift,
    feed,
    shapes,
    started,
    weights,
)

from resa.reference import GPT, REFERENCE_OPS, Operations, ReSAConfig, generate, prefill, rectify, sparse_step
from resa.reference.model import RMSNorm, apply_rotary, rotary_angles

CONFIG = ReSAConfig(block_size=2, min_blocks=2, interval=3)


def assert_close(actual, expected, what, allowed=EXACT):
    """Within `allowed` of the largest expected magnitude."""
    expected = torch.as_tensor(expected)
    assert actual.shape == expected.shape, what
    error = (actual.detach() - expected.detach()).abs().max() / expected.detach().abs().max()
    assert error <= allowed, f"{what}: off by {error:.3g}"


# --------------------------------------------------------------------------------------------------------------
# Against the oracle
# --------------------------------------------------------------------------------------------------------------


@given(shapes(), st.integers(1, 18))
def test_logits_equal_the_oracles(shape, length):
    """The training forward at every position, prefill at the last, and the cached keys and values of every layer."""
    model, tokens = shape.model(), shape.tokens(length)
    exact = oracle.Cache.empty(asdict(model.config))
    expected = oracle.dense_pass(weights(model), asdict(model.config), exact, tokens, 0)
    assert_close(model(torch.tensor([tokens]))[0], expected, "training")
    cache, logits = dense_cache(model, [tokens], 2)
    assert_close(logits[0], expected[-1], "prefill")
    for layer in range(shape.layers):
        assert_close(cache.keys[layer, 0], exact.keys[layer], f"keys of layer {layer}")
        assert_close(cache.values[layer, 0], exact.values[layer], f"values of layer {layer}")


@pytest.mark.parametrize("option", ["qkv_bias", "qk_norm", "tied"])
def test_every_option_matters(option):
    """An option that was ignored would make both models the same (the weights come from one stream of numbers)."""
    tokens = torch.tensor([Shape().tokens(9)])
    without, with_it = (replace(Shape(), **{option: value}).model() for value in (False, True))
    if option == "tied":
        assert with_it.output.weight is with_it.embed.weight
        assert without.output.weight is not without.embed.weight
        return
    shared = {name: value for name, value in with_it.state_dict().items() if name in without.state_dict()}
    assert len(shared) < len(with_it.state_dict())
    without.load_state_dict(shared)
    difference = (without(tokens) - with_it(tokens)).detach().abs().max()
    assert difference > VISIBLE


def test_parameter_names_and_shapes():
    """What checkpoints and the oracle rely on."""
    shape = Shape(layers=1, qkv_bias=True, qk_norm=True, tied=False)
    sizes = {name: tuple(value.shape) for name, value in shape.model().state_dict().items()}
    layer = {
        "attn_norm.weight": (16,),
        "attn.q_proj.weight": (48, 16),
        "attn.q_proj.bias": (48,),
        "attn.k_proj.weight": (16, 16),
        "attn.k_proj.bias": (16,),
        "attn.v_proj.weight": (16, 16),
        "attn.v_proj.bias": (16,),
        "attn.o_proj.weight": (16, 48),
        "attn.q_norm.weight": (8,),
        "attn.k_norm.weight": (8,),
        "mlp_norm.weight": (16,),
        "mlp.gate_proj.weight": (20, 16),
        "mlp.up_proj.weight": (20, 16),
        "mlp.down_proj.weight": (16, 20),
    }
    rest = {"embed.weight": (23, 16), "norm.weight": (16,), "output.weight": (23, 16)}
    assert sizes == {f"layers.0.{name}": size for name, size in layer.items()} | rest


def test_fresh_parameters():
    """Standard deviation 0.02, onto the residual stream 0.02 / sqrt(2 · layers); norms one, biases zero."""
    torch.manual_seed(0)
    model = GPT(replace(Shape().config(qkv_bias=True, qk_norm=True), hidden_size=256, intermediate_size=256, n_layer=8))
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            assert (parameter == 1).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        else:
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            expected = 0.02 / math.sqrt(16) if residual else 0.02
            # The standard deviation of n normal numbers lies within 5 / sqrt(2n) of the true one.
            assert abs(parameter.std().item() / expected - 1) < 5 / math.sqrt(2 * parameter.numel()), name


def test_training_reaches_every_parameter():
    """A gradient that is None or zero would mean a parameter that nothing uses."""
    model = Shape(qkv_bias=True, qk_norm=True, tied=False).model()
    model(torch.tensor([Shape().tokens(8), Shape().tokens(8, 1)])).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 0, name


# --------------------------------------------------------------------------------------------------------------
# Norm and rotary positions
# --------------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1), st.sampled_from([2, 4, 8, 16]), st.sampled_from([10.0, 1e4, 1e6]))
def test_rotation_equals_the_oracles(seed, head_dim, theta):
    """Half-split layout at absolute positions, ragged ones included."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, 4, head_dim, generator=generator, dtype=torch.float64)
    positions = torch.randint(0, 5000, (2, 4), generator=generator)
    turned = apply_rotary(x, *rotary_angles(positions, head_dim, theta, torch.float64))
    for s in range(2):
        assert_close(turned[s], oracle.rope(x[s].numpy(), positions[s].tolist(), theta), f"sequence {s}")
    assert_close(turned.norm(dim=-1), x.norm(dim=-1), "a rotation keeps lengths")


@given(st.integers(0, 2**32 - 1), st.integers(0, 300), st.integers(0, 3000))
def test_products_depend_on_the_distance_alone(seed, distance, shift):
    """q at position p + distance times k at p is the same for every p, and at distance 0 it is plain q · k."""
    generator = torch.Generator().manual_seed(seed)
    query, key = torch.randn(2, 1, 1, 1, 8, generator=generator, dtype=torch.float64)

    def product(query_position, key_position):
        turned = [
            apply_rotary(x, *rotary_angles(torch.tensor([[position]]), 8, 1e3, torch.float64))
            for x, position in ((query, query_position), (key, key_position))
        ]
        return float((turned[0] * turned[1]).sum())

    size = float(query.norm() * key.norm())
    assert abs(product(distance + shift, shift) - product(distance, 0)) <= EXACT * size
    assert abs(product(shift, shift) - float((query * key).sum())) <= EXACT * size


def test_rotation_by_hand():
    """Two pairs at position 1: channels (0, 2) turn by 1 radian, (1, 3) by theta**(-1/2) = 0.1."""
    x = torch.tensor([[[[1.0, 0.0, 0.0, 1.0]]]], dtype=torch.float64)
    turned = apply_rotary(x, *rotary_angles(torch.tensor([[1]]), 4, 100.0, torch.float64))[0, 0, 0]
    expected = [math.cos(1), -math.sin(0.1), math.sin(1), math.cos(0.1)]
    assert turned.tolist() == pytest.approx(expected, abs=1e-15)


def test_angles_keep_their_digits_in_half_precision():
    """Position 4097 is no bfloat16 number; the angle must be taken in float32 all the same."""
    angles = rotary_angles(torch.tensor([[4097]]), 8, 1e4, torch.float32)[0]
    exact = torch.cos(4097 * 1e4 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8))
    # float32 holds the angle 4097 to 2.4e-4, and a cosine changes no faster than its angle.
    assert (angles.flatten().double() - exact).abs().max() <= 4097 * 2**-23


def test_half_precision_models_tell_late_positions_apart():
    """From 256 on bfloat16 skips every other whole number; cached keys there are as accurate as those before."""
    shape = Shape(layers=1, context=400)
    model, tokens = shape.model(torch.bfloat16), shape.tokens(400)
    cache, _ = dense_cache(model, [tokens], 16)
    exact, _ = dense_cache(shape.model(torch.bfloat16).double(), [tokens], 16)
    error = drift(cache, 0, exact)
    assert error[257:].max() <= 2 * error[:257].max()


def test_norm_by_hand():
    """Epsilon stands inside the root: 3 / sqrt(9 / 2 + 1/2 + 4) = 1."""
    norm = RMSNorm(2, 4.0)
    norm.weight.data = torch.tensor([2.0, 5.0])
    assert norm(torch.tensor([3.0, 1.0])).tolist() == pytest.approx([2.0, 5.0 / 3])


def test_norm_is_computed_in_float32_below_float64():
    """300² overflows float16; the norm must not."""
    norm = RMSNorm(4, 1e-6).half()
    assert norm(torch.full((4,), 300.0, dtype=torch.float16)).tolist() == [1.0] * 4


# --------------------------------------------------------------------------------------------------------------
# The five operations as an argument
# --------------------------------------------------------------------------------------------------------------


class Recorder:
    """The reference's operations, each call counted."""

    def __init__(self):
        self.calls = Counter()
        self.ops = Operations(**{field.name: self.counting(field.name) for field in fields(Operations)})

    def counting(self, name):
        operation = getattr(REFERENCE_OPS, name)

        def counted(*arguments, **keywords):
            self.calls[name] += 1
            return operation(*arguments, **keywords)

        return counted

    def during(self, action):
        """The operations that `action` called, and how often; bounds apart, whose number the cache decides."""
        self.calls.clear()
        action()
        assert self.calls.pop("block_bounds", 0) > 0, "whoever writes keys refreshes bounds, through the operation"
        return dict(self.calls)


def test_each_pass_uses_its_own_operations():
    """Dense passes use dense attention alone, sparse steps the other three, once per layer."""
    shape, recorder = Shape(layers=3), Recorder()
    model = shape.model(ops=recorder.ops)
    prompts, sparse = shape.prompts((7, 4)), {"score_blocks": 3, "select_blocks": 3, "sparse_attention": 3}
    cache = model.new_cache(2, 20, 2)
    assert recorder.calls.keys() == {"block_bounds"}
    assert recorder.during(lambda: prefill(model, prompts, cache)) == {"dense_attention": 3}
    assert recorder.during(lambda: prefill(model, prompts, cache, chunk_size=3)) == {"dense_attention": 9}
    assert recorder.during(lambda: sparse_step(model, torch.tensor([1, 2]), cache, CONFIG)) == sparse
    window = torch.tensor([1, 1])
    assert recorder.during(lambda: rectify(model, [[1], [2]], cache, window)) == {"dense_attention": 3}
    model(torch.tensor([prompts[0]]))
    assert not recorder.calls - Counter(dense_attention=3, block_bounds=99), "training needs none of them"


def test_each_schedule_runs_the_passes_it_says():
    """A cycle of f = 3 is 2 sparse steps and a dense pass if fused, else 3 and one; interval 1 fused is all dense."""
    shape, recorder = Shape(), Recorder()
    model, prompts = shape.model(ops=recorder.ops), shape.prompts((9, 9))

    def calls(n_tokens, **changes):
        config = replace(CONFIG, **changes)
        counted = recorder.during(lambda: generate(model, prompts, n_tokens, config))
        per_layer = {name: count / shape.layers for name, count in counted.items()}
        assert per_layer.get("score_blocks") == per_layer.get("select_blocks") == per_layer.get("sparse_attention")
        return per_layer.get("sparse_attention", 0), per_layer["dense_attention"] - 1  # less the prefill

    assert calls(7, schedule="fused") == (4, 2)
    assert calls(7, schedule="paper") == (6, 2)
    assert calls(6, schedule="fused") == (4, 1)
    assert calls(6, schedule="paper") == (5, 1)
    assert calls(7, interval=1, schedule="fused") == (0, 6)
    assert calls(7, interval=1, schedule="paper") == (6, 6)
    assert calls(7, interval=None, schedule="fused") == calls(7, interval=None, schedule="paper") == (6, 0)
    assert calls(7, dense_below=100) == (0, 6)


def test_other_operations_on_the_same_weights():
    """`with_ops` shares every parameter, and leaves the model it came from as it was."""
    recorder, model = Recorder(), Shape().model()
    twin = model.with_ops(recorder.ops)
    assert twin.ops is recorder.ops
    assert model.ops is REFERENCE_OPS
    assert [id(p) for p in twin.parameters()] == [id(p) for p in model.parameters()]
    prompts = Shape().prompts((9, 4))
    expected = generate(model, prompts, 5, CONFIG)
    assert not recorder.calls
    assert generate(twin, prompts, 5, CONFIG).tokens == expected.tokens
    assert recorder.calls["sparse_attention"] > 0


def oracle_operations():
    """The five operations of the oracle behind the contract's signatures."""

    def arrays(*tensors):
        return [tensor.detach().numpy() for tensor in tensors]

    def block_bounds(keys, lengths, block_size):
        return torch.from_numpy(oracle.block_bounds(keys.numpy(), lengths.tolist(), block_size))

    def score_blocks(query, bounds, lengths, block_size):
        return torch.from_numpy(oracle.score_blocks(*arrays(query, bounds), lengths.tolist(), block_size))

    def select_blocks(scores, lengths, config):
        return torch.from_numpy(oracle.select_blocks(scores.numpy(), lengths.tolist(), asdict(config)))

    def sparse_attention(query, keys, values, indices, lengths, block_size):
        tensors = arrays(query, keys, values, indices)
        return torch.from_numpy(oracle.sparse_attention(*tensors, lengths.tolist(), block_size))

    def dense_attention(query, keys, values, lengths, *, query_lengths=None):
        n_queries = None if query_lengths is None else query_lengths.tolist()
        tensors = arrays(query, keys, values)
        return torch.from_numpy(oracle.dense_attention(*tensors, lengths.tolist(), n_queries))

    return Operations(block_bounds, score_blocks, select_blocks, sparse_attention, dense_attention)


def test_decoding_needs_nothing_but_the_five_operations(monkeypatch):
    """With operations that share no code with the reference's, while the reference's refuse to run."""
    shape, prompts = Shape(seed=2), Shape(seed=2).prompts((13, 5))
    expected = generate(shape.model(), prompts, 6, CONFIG)
    foreign = shape.model(ops=oracle_operations())

    def refuse(*arguments, **keywords):
        raise AssertionError("the reference's own operation was called")

    for module in ("blocks", "attention", "model", "cache"):
        for field in fields(Operations):
            monkeypatch.setattr(f"resa.reference.{module}.{field.name}", refuse, raising=False)
        monkeypatch.setattr(f"resa.reference.{module}._softmax_attention", refuse, raising=False)
    done = generate(foreign, prompts, 6, CONFIG)
    assert done.tokens == expected.tokens
    assert all(drift(done.cache, s, expected.cache).max() <= EXACT for s in range(2))
    for name in (field.name for field in fields(Operations)):
        broken = replace(oracle_operations(), **{name: refuse})
        with pytest.raises(AssertionError, match="own operation"):
            generate(shape.model(ops=broken), prompts, 6, CONFIG)


@pytest.mark.parametrize("name", ["score_blocks", "select_blocks", "sparse_attention", "dense_attention"])
def test_what_an_operation_returns_is_used(name):
    """An operation called for nothing would let a wrong one pass: change its result and the logits must change."""
    shape = Shape(seed=3)
    change = {
        "score_blocks": lambda scores: -scores,
        "select_blocks": lambda indices: indices[..., -1:],
        "sparse_attention": lambda out: 0 * out,
        "dense_attention": lambda out: 0 * out,
    }[name]
    operation = getattr(REFERENCE_OPS, name)
    altered = replace(REFERENCE_OPS, **{name: lambda *args, **keywords: change(operation(*args, **keywords))})
    logits = []
    for ops in (REFERENCE_OPS, altered):
        model = shape.model(ops=ops)
        generation = started(model, shape.prompts((17,)), 2, 20)
        logits.append(feed(model, generation, CONFIG, [4]))
    assert (logits[0] - logits[1]).abs().max() > VISIBLE


# --------------------------------------------------------------------------------------------------------------
# Dtypes
# --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"qkv_bias": True}, {"qk_norm": True, "tied": False}])
def test_every_dtype_decodes(dtype, options):
    """Cache and logits in the model's dtype; prefill as accurate as training, whose attention is torch's own.

    Both are measured against the same rounded weights in float64. Twice the other's error is allowed, and one
    rounding of the largest logit; in float64, which has no finer measure, the specification's 1e-9.
    """
    shape = Shape(seed=7, **options)
    model, prompts = shape.model(dtype), shape.prompts((20, 20, 20, 20))
    truth = shape.model(dtype).double()(torch.tensor(prompts))[:, -1]
    done = generate(model, prompts, 8, CONFIG, temperature=0.7, generator=torch.Generator().manual_seed(1))
    assert done.cache.keys.dtype == done.cache.values.dtype == done.cache.bounds.dtype == dtype
    assert all(0 <= token < shape.vocab for tokens in done.tokens for token in tokens)
    cache, logits = dense_cache(model, prompts, 2)
    assert logits.dtype == dtype
    trained = model(torch.tensor(prompts))[:, -1]
    assert trained.dtype == dtype
    error, other = ((x.detach().double() - truth.detach()).abs().max() for x in (logits, trained))
    relative_floor = EXACT if dtype == torch.float64 else torch.finfo(dtype).eps
    assert error <= 2 * other + relative_floor * truth.detach().abs().max()
    step = sparse_step(model, torch.tensor([1, 2, 3, 4]), cache.resized(21), CONFIG)
    assert step.dtype == dtype
    assert step.isfinite().all()
