"""A caller's model stays as it is, adapted models are honoured or refused, and a caller's defaults change no token.

The reference calls every module, so it decodes adapted models as they are. The kernels read weights and call none.
"""

from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from decoders import REFERENCE, TRITON
from resa.reference import REFERENCE_OPS, ReSAConfig, Sampling, generate, load_model, prefill, rectify, speculate
from small_models import Shape
from untouched import snapshot

WAYS = {
    "generate": SimpleNamespace(decoder=REFERENCE, decode=generate),
    "speculate": SimpleNamespace(decoder=REFERENCE, decode=speculate),
    "triton": SimpleNamespace(decoder=TRITON, decode=TRITON.generate),
}


@pytest.fixture(params=["generate", "speculate", pytest.param("triton", marks=pytest.mark.fast)])
def way(request):
    if request.param == "triton":
        pytest.importorskip("triton", reason="triton comes for Linux only")
    return WAYS[request.param]


def decoded(way, model, n_tokens=5, **options):
    config, prompts = way.decoder.config, way.decoder.prompts()[:1]
    return [each.tokens for each in way.decode(model, prompts, n_tokens, config, **options)]


# --- A call changes nothing ---


def test_a_call_leaves_the_model_as_it_was(way):
    """Modules, hooks, weights: the same objects in the same memory with the same bytes, run after run."""
    model = way.decoder.model()
    check = snapshot(model)
    first = decoded(way, model)
    check()
    assert decoded(way, model, sampling=Sampling(0.0)) == first
    check()


def test_a_model_made_in_inference_mode_decodes_outside_of_it(way):
    expected = [decoded(each, way.decoder.model()) for each in (way, WAYS["generate"])]
    with torch.inference_mode():
        model = deepcopy(way.decoder.model())
    assert model.layers[0].attn.q_proj.weight.is_inference()
    check = snapshot(model)
    for _ in range(2):
        assert decoded(way, model) == expected[0]
    check()
    assert decoded(WAYS["generate"], model) == expected[1]


# --- Adapted models ---


class Adapter(nn.Module):
    """A low-rank adapter around a projection."""

    def __init__(self, base):
        super().__init__()
        self.base, generator = base, torch.Generator().manual_seed(7)
        like = base.weight
        self.down = nn.Parameter(torch.randn(2, base.in_features, generator=generator).to(like))
        self.up = nn.Parameter(torch.randn(base.out_features, 2, generator=generator).to(like))

    def forward(self, x):
        return self.base(x) + x @ self.down.T @ self.up.T


class Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Doubled(nn.Module):
    def forward(self, weight):
        return weight * 2


class Quantised(torch.Tensor):
    """Numbers that mean others: twice as much."""

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), options=None):
        if function is nn.functional.linear:
            x, weight = arguments[:2]
            return function(x, 2 * weight.as_subclass(torch.Tensor))
        return super().__torch_function__(function, types, arguments, options)


def wrapped(layer):
    layer.attn.q_proj = Adapter(layer.attn.q_proj)


def subclassed(layer):
    layer.mlp.up_proj.__class__ = Doubling


def parametrised(layer):
    nn.utils.parametrize.register_parametrization(layer.attn.v_proj, "weight", Doubled())


def quantised(layer):
    weight = layer.mlp.down_proj.weight.detach().as_subclass(Quantised)
    layer.mlp.down_proj.weight = nn.Parameter(weight, requires_grad=False)


def hooked(layer):
    layer.attn.o_proj.register_forward_hook(lambda module, inputs, out: 2 * out)


def hooked_before(layer):
    layer.mlp.register_forward_pre_hook(lambda module, inputs: (-inputs[0],))


def replaced(layer):
    plain = layer.mlp.gate_proj.forward
    layer.mlp.gate_proj.forward = lambda x: 2 * plain(x)


def biased(layer):
    bias = torch.linspace(-2, 2, layer.attn.o_proj.out_features).to(layer.attn.o_proj.weight)
    layer.attn.o_proj.bias = nn.Parameter(bias)


def retuned(layer):
    layer.attn_norm.eps = 2.0


def another_mlp(layer):
    layer.mlp = nn.Sequential(nn.SiLU(), layer.mlp)


ADAPTED = {
    "wrapped": (wrapped, r"attn\.q_proj: got Adapter; allowed: a plain Linear"),
    "subclassed": (subclassed, r"mlp\.up_proj: got Doubling; allowed: a plain Linear"),
    "parametrised": (parametrised, r"attn\.v_proj: got ParametrizedLinear; allowed: a plain Linear"),
    "quantised": (quantised, r"mlp\.down_proj\.weight: got Quantised \[.*; allowed: Parameter \["),
    "hook": (hooked, r"attn\.o_proj: got a forward hook; allowed: a plain Linear"),
    "hook before": (hooked_before, r"mlp: got a forward hook; allowed: a plain MLP"),
    "own method": (replaced, r"mlp\.gate_proj\.forward: got a method of its own; allowed: a plain Linear"),
    "bias": (biased, r"attn\.o_proj\.bias: got Parameter \[.*; allowed: None"),
    "setting": (retuned, r"attn_norm\.eps: got 2\.0; allowed: 0\.001"),
    "another part": (another_mlp, r"mlp: got Sequential; allowed: a plain MLP"),
}


@pytest.mark.parametrize("kind", ADAPTED)
def test_the_reference_decodes_adapted_models_as_they_are(kind):
    """Dense decoding gives the tokens of the model's own forward, which the base model's are not."""
    model, (prompt, *_), config = Shape(seed=11, tied=False).model(), REFERENCE.prompts(), ReSAConfig(interval=1)
    base = generate(model, [prompt], 8, config)[0].tokens
    ADAPTED[kind][0](model.layers[1])
    check, text = snapshot(model), list(prompt)
    with torch.no_grad():
        for _ in range(8):
            text.append(int(model(torch.tensor([text]))[0, -1].argmax()))
    assert text[len(prompt) :] != base, "the adapter must show"
    assert generate(model, [prompt], 8, config)[0].tokens == text[len(prompt) :]
    check()


@pytest.mark.fast
def test_the_kernels_refuse_what_is_not_in_a_layer():
    """A hook on all modules, an embedding that clips its rows, a layer beyond the configuration's."""
    fast = pytest.importorskip("resa.fast.model", reason="triton comes for Linux only")
    model = Shape(seed=11).model(torch.float32)
    fast.check_plain(model)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with pytest.raises(ValueError, match="model: got a hook on all modules"):
            fast.check_plain(model)
    finally:
        handle.remove()
    model.embed.max_norm = 1.0
    with pytest.raises(ValueError, match=r"model\.embed\.max_norm: got 1\.0; allowed: None"):
        fast.check_plain(model)
    model.embed.max_norm = None
    model.layers.append(model.layers[0])
    with pytest.raises(ValueError, match=r"model\.layers\.2: got a part that is not called"):
        fast.check_plain(model)


@pytest.mark.fast
@pytest.mark.parametrize("kind", ADAPTED)
def test_the_kernels_refuse_what_they_would_ignore(kind, monkeypatch):
    """Before any work."""
    fast = pytest.importorskip("resa.fast.generate", reason="triton comes for Linux only")
    model = TRITON.model()
    change, message = ADAPTED[kind]
    change(model.layers[1])
    monkeypatch.setattr(fast, "accelerated", lambda *_: pytest.fail("work was started before the model was checked"))
    with pytest.raises(ValueError, match=rf"^model\.layers\.1\.{message}"):
        decoded(WAYS["triton"], model)


@pytest.mark.fast
def test_the_kernels_refuse_other_operations_and_mixed_dtypes():
    pytest.importorskip("triton", reason="triton comes for Linux only")
    model = TRITON.model()
    own = replace(REFERENCE_OPS, score_blocks=lambda *arguments: REFERENCE_OPS.score_blocks(*arguments))
    with pytest.raises(ValueError, match=r"^model\.ops: got operations of its own; allowed: the reference's or the k"):
        decoded(WAYS["triton"], model.with_ops(own))
    model.norm.double()
    with pytest.raises(
        ValueError, match=r"^model\.norm\.weight: got Parameter \[32\] torch.float64; allowed: .*float32"
    ):
        decoded(WAYS["triton"], model)


@pytest.mark.fast
def test_norm_weights_with_gaps_are_read_as_they_are():
    pytest.importorskip("triton", reason="triton comes for Linux only")
    model, expected = TRITON.model(), decoded(WAYS["triton"], TRITON.model())
    for norm in (model.norm, model.layers[0].attn_norm):
        wide = torch.stack((norm.weight.data, torch.full_like(norm.weight.data, 50.0)), dim=1)
        norm.weight.data = wide[:, 0]
        assert not norm.weight.is_contiguous()
    assert decoded(WAYS["triton"], model) == expected


@pytest.mark.parametrize("place", ["", "layers.1", "layers.0.attn", "layers"])
def test_hooks_that_decoding_never_calls_are_refused(way, place):
    model = way.decoder.model()
    handle = model.get_submodule(place).register_forward_hook(lambda module, inputs, out: out)
    with pytest.raises(ValueError, match=rf"^model{'.' * bool(place)}{place}: got a forward hook; allowed: "):
        decoded(way, model)
    handle.remove()
    decoded(way, model, 1)


def test_a_model_spread_over_devices_is_refused(way):
    model = way.decoder.model()
    model.layers[1].mlp = deepcopy(model.layers[1].mlp).to("meta")
    here = str(model.embed.weight.device)
    with pytest.raises(
        ValueError, match=f"^model: got devices {here}, meta; allowed: all weights in the memory of one"
    ):
        decoded(way, model)
    model.embed = nn.Sequential(model.embed)
    with pytest.raises(ValueError, match=r"^model\.embed: got Sequential; allowed: a module with a weight \[V, C\]"):
        decoded(way, model)


# --- Settings of torch, numbers of NumPy ---


DEFAULTS = (torch.float16, torch.float64, "meta")


@contextmanager
def default(value):
    """Another default of torch, a dtype or a device."""
    dtype, is_device = torch.get_default_dtype(), isinstance(value, str)
    (torch.set_default_device if is_device else torch.set_default_dtype)(value)
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(dtype)


def test_defaults_of_torch_change_no_token(way):
    """Every tensor names its device, and its dtype where it matters; 8-bit bounds, sampling and turns included."""
    model, prompt, config = way.decoder.model(), way.decoder.prompts()[0], way.decoder.config
    rounded = config if way.decode is not TRITON.generate else replace(config, eight_bit_bounds=True)

    def tokens():
        found = []
        for sampling, each in ((Sampling(), config), (Sampling(0.7, 0.9, 9), rounded)):
            own = torch.Generator().manual_seed(5)
            options = {"generators": own, "stop_tokens": [1]}
            begun = way.decode(model, [prompt], 4, each, sampling, **options)[0]
            ended = way.decode(model, [[7]], 2, each, sampling, resume=begun, **options)[0]
            found.append((begun.tokens, ended.tokens, ended.cache.keys.dtype, ended.cache.keys.device))
        return found

    expected = tokens()
    for value in DEFAULTS:
        with default(value):
            assert tokens() == expected, value


@pytest.mark.parametrize("value", DEFAULTS, ids=str)
def test_a_checkpoint_is_read_whatever_the_defaults(value):
    config, prompt = ReSAConfig(block_size=8, min_blocks=2, interval=3), list(range(300, 340))
    expected = generate(load_model(), [prompt], 3, config)[0].tokens
    with default(value):
        model = load_model()
        assert model.embed.weight.dtype == torch.float32
        assert generate(model, [prompt], 3, config)[0].tokens == expected


@pytest.mark.parametrize("kind", [np.int64, np.int8])
def test_integers_of_numpy_are_taken(way, kind):
    """And do not overflow: 120 tokens and 9 more do not fit the eight bits that hold the number 9."""
    shape = replace(way.decoder.shape, context=256)
    model, prompt = way.decoder.model(shape), shape.tokens(120)
    config = replace(way.decoder.config, interval=4)
    numbers = [kind(token) for token in prompt]
    own = ReSAConfig(kind(config.block_size), min_blocks=kind(config.min_blocks), interval=kind(4))
    expected = way.decode(model, [prompt], 9, config, stop_tokens=[22])[0].tokens
    found = way.decode(model, [numbers], kind(9), own, stop_tokens=[kind(22)])[0].tokens
    assert found == expected
    assert {type(token) for token in found} == {int}


def test_steps_take_integers_of_numpy():
    model = Shape(seed=1).model()
    cache = model.new_cache(np.int8(90), np.int8(2))
    assert (cache.capacity, type(cache.block_size)) == (90, int)
    tokens = Shape(seed=1).tokens(90)
    expected = prefill(model, tokens, model.new_cache(90, 2))
    assert torch.allclose(prefill(model, tokens, cache, chunk_size=np.int8(64)), expected)
    assert torch.allclose(rectify(model, tokens[-80:], cache, np.int8(80)), expected)
    cache.truncate(np.int8(3))
    assert (cache.length, type(cache.length)) == (3, int)
