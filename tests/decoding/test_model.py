"""The transformer: against the oracle's in every variant, its rotary positions, and the five operations it runs on."""

import math
from dataclasses import asdict, replace
from importlib import import_module

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracle
from resa.reference import (
    GPT,
    REFERENCE_OPS,
    Operations,
    ReSAConfig,
    RopeScaling,
    Sampling,
    generate,
    prefill,
    sparse_step,
)
from resa.reference.model import RMSNorm
from resa.reference.rope import apply_rotary, rotary_angles, rotary_frequencies
from small_models import (
    EXACT,
    Shape,
    assert_bounds_rebuilt,
    dense_cache,
    drift,
    greedy_by_forward,
    relative,
    shapes,
    weights,
)

CONFIG = ReSAConfig(block_size=2, min_blocks=2, interval=3)


# --- Against the oracle ---


@given(shapes(), st.integers(1, 18))
def test_logits_equal_the_oracles(shape, length):
    """The training forward at every position, prefill at the last, and the cached keys and values of every layer."""
    model, tokens = shape.model(), shape.tokens(length)
    exact = oracle.Cache.empty(asdict(model.config))
    expected = oracle.dense_pass(weights(model), asdict(model.config), exact, tokens, 0)
    assert relative(model(torch.tensor([tokens]))[0], expected) <= EXACT
    cache, logits = dense_cache(model, tokens, 2)
    assert relative(logits, expected[-1]) <= EXACT
    for layer in range(shape.layers):
        assert relative(cache.keys[layer, 0], exact.keys[layer]) <= EXACT, f"keys of layer {layer}"
        assert relative(cache.values[layer, 0], exact.values[layer]) <= EXACT, f"values of layer {layer}"


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


# --- Norm and rotary positions ---


@given(st.integers(0, 2**32 - 1), st.sampled_from([2, 4, 8, 16]), st.sampled_from([10.0, 1e4, 1e6]))
def test_rotation_equals_the_oracles(seed, head_dim, theta):
    """Half-split layout at absolute positions, ragged ones included."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, 4, head_dim, generator=generator, dtype=torch.float64)
    positions = torch.randint(0, 5000, (2, 4), generator=generator)
    rotated = apply_rotary(x, *rotary_angles(positions, head_dim, theta, None, torch.float64))
    for s in range(2):
        assert relative(rotated[s], oracle.rope(x[s].numpy(), positions[s].tolist(), theta)) <= EXACT
    assert relative(rotated.norm(dim=-1), x.norm(dim=-1)) <= EXACT, "a rotation keeps lengths"


def test_half_precision_models_tell_late_positions_apart():
    """From 256 on bfloat16 skips every other whole number; cached keys there are as accurate as those before."""
    shape = Shape(layers=1, context=400)
    model, tokens = shape.model(torch.bfloat16), shape.tokens(400)
    cache, _ = dense_cache(model, tokens, 16)
    exact, _ = dense_cache(shape.model(torch.bfloat16).double(), tokens, 16)
    error = drift(cache, exact)
    assert error[257:].max() <= 2 * error[:257].max()


YARN = {"factor": 4.0, "original_max_position_embeddings": 65_536}
LLAMA3 = {**YARN, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize(
    ("kind", "theirs", "ours"),
    [
        ("linear", {"factor": 4.0}, {}),
        ("llama3", LLAMA3, {}),
        # The ramp ends past the last pair of 16: where the pairs end, it is still under way.
        ("yarn", YARN, {"original_context": 65_536, "fast": 32.0}),
        ("yarn", {**YARN, "truncate": False}, {"original_context": 65_536, "fast": 32.0, "whole_pairs": False}),
        ("yarn", {**YARN, "original_max_position_embeddings": 4096}, {"original_context": 4096, "fast": 32.0}),
        ("yarn", {**YARN, "beta_fast": 8.0, "beta_slow": 2.0}, {"original_context": 65_536, "slow": 2.0, "fast": 8.0}),
    ],
    ids=str,
)
def test_scaled_frequencies_are_those_of_transformers(kind, theirs, ours):
    transformers = pytest.importorskip("transformers", reason="the extra `dev` has it")
    parameters = {"rope_type": kind, "rope_theta": 1e4, **theirs}
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "max_position_embeddings": 262_144}
    config = transformers.LlamaConfig(**sizes, rope_parameters=parameters)
    functions = import_module("transformers.modeling_rope_utils").ROPE_INIT_FUNCTIONS
    expected, _ = functions[kind](config, torch.device("cpu"))
    scaling = RopeScaling(kind, 4.0, **ours)
    found = rotary_frequencies(32, 1e4, scaling, torch.device("cpu"), torch.float32)
    assert ((found - expected).abs() / expected).max() <= 2e-7
    plain = rotary_frequencies(32, 1e4, None, torch.device("cpu"), torch.float32)
    assert not torch.equal(found, plain)


def test_norm_is_computed_in_float32_below_float64():
    """300² overflows float16; the norm must not."""
    norm = RMSNorm(4, 1e-6).half()
    assert norm(torch.full((4,), 300.0, dtype=torch.float16)).tolist() == [1.0] * 4


# --- The operations as an argument ---


def oracle_operations():
    """The four operations of a step by the oracle, behind the contract's signatures; bounds belong to the cache."""

    def arrays(*tensors):
        return [tensor.detach().numpy() for tensor in tensors]

    def score_blocks(query, bounds, lengths, block_size):
        return torch.from_numpy(oracle.score_blocks(*arrays(query, bounds), lengths.tolist(), block_size))

    def select_blocks(scores, lengths, config):
        return torch.from_numpy(oracle.select_blocks(scores.numpy(), lengths.tolist(), asdict(config)))

    def sparse_attention(query, keys, values, indices, lengths, block_size):
        tensors = arrays(query, keys, values, indices)
        return torch.from_numpy(oracle.sparse_attention(*tensors, lengths.tolist(), block_size))

    def dense_attention(query, keys, values, lengths):
        return torch.from_numpy(oracle.dense_attention(*arrays(query, keys, values), lengths.tolist()))

    return Operations(None, score_blocks, select_blocks, sparse_attention, dense_attention)


def test_decoding_needs_nothing_but_the_operations_it_is_given(monkeypatch):
    """With operations that share no code with the reference's, while the reference's refuse to run.

    `with_ops` shares every parameter, and leaves the model it came from as it was.
    """
    shape, prompt = Shape(seed=2), Shape(seed=2).tokens(13)
    model, foreign = shape.model(), oracle_operations()
    (expected,) = generate(model, [prompt], 6, CONFIG)
    twin = model.with_ops(foreign)
    assert (twin.ops, model.ops) == (foreign, REFERENCE_OPS)
    assert [id(p) for p in twin.parameters()] == [id(p) for p in model.parameters()]

    def refuse(*arguments, **keywords):
        raise AssertionError("the reference's own operation was called")

    names = ("score_blocks", "select_blocks", "sparse_attention", "dense_attention")
    for module in ("blocks", "attention", "model", "operations", "generate"):
        for name in (*names, "softmax_attention"):
            monkeypatch.setattr(f"resa.reference.{module}.{name}", refuse, raising=False)
    (done,) = generate(twin, [prompt], 6, CONFIG)
    assert done.tokens == expected.tokens
    assert drift(done.cache, expected.cache).max() <= EXACT
    for name in names:
        with pytest.raises(AssertionError, match="own operation"):
            generate(model.with_ops(replace(foreign, **{name: refuse})), [prompt], 6, CONFIG)


@pytest.mark.parametrize("schedule", ["fused", "paper"])
@pytest.mark.parametrize("dense_layers", [0, 1, 2, 3, 7])
def test_the_first_layers_may_attend_to_everything(schedule, dense_layers):
    """Like a step that selects every block there; with all layers so, sparse decoding is dense decoding."""
    shape, calls = Shape(seed=11, layers=3), []
    config, prompt = replace(CONFIG, schedule=schedule), shape.tokens(19)

    def select_blocks(scores, lengths, resa):
        is_dense = len(calls) % shape.layers < dense_layers
        calls.append(is_dense)
        return REFERENCE_OPS.select_blocks(scores, lengths, replace(resa, active_ratio=1.0 if is_dense else 0.1))

    model = shape.model()
    watched = model.with_ops(replace(REFERENCE_OPS, select_blocks=select_blocks))
    (expected,) = generate(watched, [prompt], 15, config)
    (done,) = generate(model, [prompt], 15, replace(config, dense_layers=dense_layers))
    assert done.tokens == expected.tokens
    assert drift(done.cache, expected.cache).max() <= EXACT
    assert_bounds_rebuilt(done.cache)
    dense = greedy_by_forward(model, prompt, 15)
    if dense_layers >= shape.layers:
        assert done.tokens == dense
    elif dense_layers == 0:
        assert done.tokens != dense, "nothing was left out: the test would see nothing"


# --- Dtypes ---


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"qkv_bias": True}, {"qk_norm": True, "tied": False}])
def test_every_dtype_decodes(dtype, options):
    """Cache and logits in the model's dtype; prefill as accurate as training, whose attention is torch's own.

    Both are measured against the same rounded weights in float64. Twice the other's error is allowed, and one
    rounding of the largest logit; in float64, which has no finer measure, the specification's 1e-9.
    """
    shape = Shape(seed=7, **options)
    model, prompts = shape.model(dtype), shape.prompts((20, 20, 20, 20))
    truth = shape.model(dtype).double()(torch.tensor(prompts))[:, -1].detach()
    warm, own = Sampling(0.7), torch.Generator().manual_seed(1)
    (done,) = generate(model, prompts[:1], 8, CONFIG, warm, generators=own)
    assert done.cache.keys.dtype == done.cache.values.dtype == done.cache.bounds.dtype == dtype
    assert all(0 <= token < shape.vocab for token in done.tokens)
    caches = [model.new_cache(21, 2) for _ in prompts]
    logits = torch.stack([prefill(model, prompt, cache) for prompt, cache in zip(prompts, caches, strict=True)])
    trained = model(torch.tensor(prompts))[:, -1].detach()
    assert logits.dtype == trained.dtype == dtype
    error, other = ((x.double() - truth).abs().max() for x in (logits, trained))
    relative_floor = EXACT if dtype == torch.float64 else torch.finfo(dtype).eps
    assert error <= 2 * other + relative_floor * truth.abs().max()
    step = sparse_step(model, 1, caches[0], CONFIG)
    assert step.dtype == dtype
    assert step.isfinite().all()
