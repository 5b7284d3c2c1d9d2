"""Decoding refuses by name, saying what was given and what is allowed, before anything has changed.

Every message has the form "argument: got …; allowed: …". The operations are in test_refusals_operations.py.
"""

import re
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from decoders import TRITON
from resa.reference import (
    GPT,
    REFERENCE_OPS,
    Generation,
    GPTConfig,
    KVCache,
    ReSAConfig,
    RopeScaling,
    Sampling,
    decode_step,
    generate,
    prefill,
    rectify,
    sparse_step,
    speculate,
)
from resa.reference.generate import dense_pass
from small_models import Shape, assert_untouched, started

SHAPE = Shape(seed=1, context=24)
CONFIG = ReSAConfig(block_size=2, min_blocks=2, interval=3)
INF, NAN = float("inf"), float("nan")
IDS = "token ids 0 … 22"


def refused(argument, given, allowed):
    """Expects a ValueError with these three texts; "…" at an end of one stands for anything."""
    texts = [re.escape(str(text)) for text in (argument, given, allowed)]
    ends = [re.sub("^…|…$", ".*", text) for text in texts]
    return pytest.raises(ValueError, match="^{}: got {}; allowed: {}$".format(*ends))


def unchanged(generation):
    """A function that asserts that a generation is as it is now."""
    before = deepcopy(generation)

    def check():
        assert_untouched(generation.cache, before.cache)
        assert (generation.tokens, generation.n_drifted) == (before.tokens, before.n_drifted)

    return check


# Whole requests, on every way to decode.

WAYS = {
    "generate": SimpleNamespace(decode=generate, shape=SHAPE, config=CONFIG, model=Shape.model),
    "speculate": SimpleNamespace(decode=speculate, shape=SHAPE, config=CONFIG, model=Shape.model),
    "triton": SimpleNamespace(
        decode=TRITON.generate, shape=replace(TRITON.shape, context=24), config=TRITON.config, model=TRITON.model
    ),
}


@pytest.fixture(params=["generate", "speculate", pytest.param("triton", marks=pytest.mark.fast)])
def way(request):
    if request.param == "triton":
        pytest.importorskip("triton", reason="triton comes for Linux only")
    return WAYS[request.param]


TWO = {"prompts": [[1, 2, 3], [4]], "max_new_tokens": 4}
LISTS, LIST = "a non-empty list of token lists", "a non-empty list of token ids"
FULL = "prompt + max_new_tokens − 1 ≤ context = 24"
TWINS = [torch.Generator()] * 2


@pytest.mark.parametrize(
    ("changes", "argument", "given", "allowed"),
    [
        *(({"prompts": wrong}, "prompts", repr(wrong), LISTS) for wrong in ([], "text", 3)),
        ({"prompts": [1, 2, 3]}, "prompts[0]", "1", LIST),
        *(({"prompts": [[1], wrong]}, "prompts[1]", repr(wrong), LIST) for wrong in ([], "text", None)),
        *(({"prompts": [[1], wrong]}, "prompts[1]", wrong, IDS) for wrong in ([2, 23], [-1], [2.0], [True], [None])),
        # An array's numbers are to be converted by whoever knows its dtype.
        ({"prompts": [np.arange(3), [1]]}, "prompts[0]", "array…", LIST),
        ({"prompts": [[1], [2] * 22]}, "prompts[1]", "22 tokens and max_new_tokens = 4", FULL),
        ({"prompts": [[1] * 25, [2]], "max_new_tokens": 0}, "prompts[0]", "25 tokens and max_new_tokens = 0", FULL),
        *(({"max_new_tokens": n}, "max_new_tokens", repr(n), "an integer ≥ 0") for n in (-1, 2.0, True, None, "4")),
        ({"config": {"interval": 3}}, "config", "dict", "a ReSAConfig"),
        ({"sampling": 0.7}, "sampling", "float", "a Sampling"),
        *(({"generators": wrong}, "generators", f"{len(wrong)} generators", "one, or 2") for wrong in ([], TWINS[:1])),
        ({"generators": 7}, "generators", "7", "a torch.Generator, one per prompt, or None"),
        ({"generators": [1, 2]}, "generators", "[1, 2]", "torch.Generators"),
        ({"generators": TWINS}, "generators", "the same generator for two prompts", "one for each prompt, …"),
        *(({"stop_tokens": [5, wrong]}, "stop_tokens", wrong, IDS) for wrong in (23, -1, 1.5)),
        ({"stop_tokens": 5}, "stop_tokens", "5", "a list or set of token ids"),
        ({"stop_tokens": iter([5])}, "stop_tokens", "…iterator…", "a list or set…"),  # checking it would use it up
        ({"resume": "yesterday's"}, "resume", "str", "a Generation, or None"),
    ],
)  # fmt: skip
def test_a_request_is_refused(way, monkeypatch, changes, argument, given, allowed):
    """Before any work, and before a random number is drawn; the request that each differs from is taken."""
    own, model = [torch.Generator().manual_seed(s) for s in range(2)], way.model(way.shape)
    request = {**TWO, "config": way.config, "generators": own, "sampling": Sampling(1.0)}
    assert [len(each.tokens) for each in way.decode(model, **{**request, "max_new_tokens": 1})] == [1, 1]
    states, default, calls = [each.get_state() for each in own], torch.get_rng_state(), []
    for owner, name in ((GPT, "hidden_states"), (KVCache, "empty")):
        monkeypatch.setattr(
            owner, name, lambda *_, **__: pytest.fail("work was started before the arguments were checked")
        )
    with refused(argument, given, allowed):
        way.decode(model, **{**request, "on_token": lambda *call: calls.append(call), **changes})
    assert all(torch.equal(each.get_state(), state) for each, state in zip(own, states, strict=True))
    assert torch.equal(torch.get_rng_state(), default)
    assert calls == []


def test_what_one_way_alone_can_do_is_refused_by_the_others():
    for decode in (generate, speculate):
        with refused("config.eight_bit_bounds", "True", "False: only the Triton path rounds bounds"):
            decode(SHAPE.model(), [[1]], 4, replace(CONFIG, eight_bit_bounds=True))
    without = SHAPE.model().with_ops(replace(REFERENCE_OPS, score_sketch=None))
    with refused("config.selection", "'sketch'", "'bounds': these operations have no sketches"):
        generate(without, [[1]], 4, replace(CONFIG, selection="sketch"))
    with refused("config.interval", "None", "an integer, to speculate"):
        speculate(SHAPE.model(), [[1]], 4, replace(CONFIG, interval=None))


@pytest.mark.parametrize(
    ("changes", "argument", "given", "allowed"),
    [
        ({"prompts": [[1], [2]]}, "prompts", "2 lists", "1, the next turn"),
        ({"config": ReSAConfig(block_size=16)}, "config.block_size", "16", "…, the cache's"),
        ({"prompts": [[99]]}, "prompts[0]", "[99]", IDS),
        ({"prompts": [[1] * 12]}, "prompts[0]", "22 tokens and max_new_tokens = 4", FULL),
        ({"layers": 3}, "resume", "a cache of (2, …", "this model's layers, KV heads, head_dim … (3, …"),
        ({"tokens": [3], "n_drifted": 3}, "resume.n_drifted", "3", "less than its 1 tokens"),
        ({"tokens": [], "n_drifted": 0, "prompts": [[]]}, "prompts[0]", "[]", LIST),
    ],
)
def test_a_generation_that_cannot_be_resumed_is_refused(way, changes, argument, given, allowed):
    """It stays as it is: 9 tokens cached, the newest two by sparse steps, and one pending."""
    begun = started(way.model(way.shape), way.shape.tokens(9), way.config.block_size, 12, [4, 5, 3], 2)
    changes = dict(changes)
    begun.tokens, begun.n_drifted = changes.pop("tokens", begun.tokens), changes.pop("n_drifted", 2)
    check, model = unchanged(begun), way.model(replace(way.shape, layers=changes.pop("layers", 2)))
    with refused(argument, given, allowed):
        way.decode(model, **{"prompts": [[1]], "max_new_tokens": 4, "config": way.config, "resume": begun, **changes})
    check()


# The steps below a request, and the cache.

AROUND = "a window around the length 9, within the capacity 12"
AT_LEAST = "at least the 2 tokens of the window, and one"
STEPS = [  # step(model, cache), and what its refusal says
    # The whole prompt is checked before the first of its chunks is fed.
    *((lambda m, c, ids=ids: prefill(m, ids, c, chunk_size=1), "tokens", repr(ids), IDS)
      for ids in ([1, 2, 23], [1, -1], [1.5], [True], "ab", [None])),
    (lambda m, c: prefill(m, [], c), "prompt", "no tokens", "at least one token"),
    (lambda m, c: prefill(m, [1] * 4, c), "prompt: length in the cache", "13", "at most 12"),
    (lambda m, c: prefill(m, [1] * 25, m.new_cache(40, 2)), "prompt: length in the cache", "25", "at most 24"),
    *((lambda m, c, n=n: prefill(m, [1], c, chunk_size=n), "chunk_size", n, "an integer ≥ 1")
      for n in (0, 2.0, True)),
    *((lambda m, c, id=id: sparse_step(m, id, c, CONFIG), "tokens", f"[{id}]", IDS)
      for id in (23, -1, 1.5, None, [1])),
    (lambda m, c: sparse_step(m, 1, c, ReSAConfig(block_size=4)), "config.block_size", "4", "2"),
    (lambda m, c: sparse_step(m, 1, c, replace(CONFIG, selection="sketch")),
     "config.selection", "'sketch' of 2…", "'bounds', the…"),
    (lambda m, c: sparse_step(m, 1, m.new_cache(8, 2, 2), CONFIG),
     "config.selection", "'bounds'", "'sketch' of 2 bits, the…"),
    *((lambda m, c, n=n: m.new_cache(8, 2, n), "bits", repr(n), "1 or 2") for n in (0, 3, True, 2.0)),
    (lambda m, c: Shape(head_dim=4).model().new_cache(8, 2, 1), "head_dim", 4, "a multiple of 8: codes of 1 bits…"),
    # A window that is too short would leave drifted tokens behind, one that starts late a gap.
    (lambda m, c: rectify(m, [1], c, 2), "tokens", "1 tokens", AT_LEAST),
    (lambda m, c: rectify(m, [], c, 0), "tokens", "0 tokens", "at least the 0 tokens of the window, and one"),
    (lambda m, c: rectify(m, [1, 23], c, 2), "tokens", "[1, 23]", IDS),
    *((lambda m, c, n=n: rectify(m, [1, 2], c, n), "n_drifted", n, "an integer ≥ 0") for n in (-1, 2.0)),
    *((lambda m, c, start=start, end=end: dense_pass(m, [1] * (end - start), c, start), "start … end",
       f"{start} … {end}", AROUND) for start, end in ((10, 11), (-2, 10), (7, 8), (9, 13))),
    # Right after prefill nothing is pending; and the tokens of a window must be known.
    (lambda m, c: decode_step(m, Generation([], c), CONFIG), "tokens", "0 tokens", "…the window's 0"),
    (lambda m, c: decode_step(m, Generation([1, 2], c, 2), CONFIG), "tokens", "2 tokens", "…the window's 2"),
    *((lambda m, c, n=n: c.truncate(n), "length", n, "an integer 0 … 9") for n in (10, -1, 8.0, True, None)),
    *((lambda m, c, n=n: m.new_cache(n, 2), "capacity", n, "an integer ≥ 0") for n in (-1, 8.0, True, None)),
    *((lambda m, c, n=n: m.new_cache(8, n), "block_size", n, "an integer ≥ 1") for n in (0, None, 2.0)),
    *((lambda m, c, dtype=dtype: KVCache.empty(SHAPE.config(), 8, 2, dtype=dtype), "dtype", dtype,
       "float16, bfloat16, float32 or float64") for dtype in (torch.int64, torch.complex64)),
    # Fields that depend on each other.
    (lambda m, c: ReSAConfig(min_blocks=2, local_blocks=3), "min_blocks", 2, "an integer ≥ local_blocks = 3"),
    (lambda m, c: ReSAConfig(local_blocks=17), "min_blocks", 16, "an integer ≥ local_blocks = 17"),
    (lambda m, c: ReSAConfig(selection="sketch", eight_bit_bounds=True), "eight_bit_bounds", True, "False: sketches…"),
    (lambda m, c: replace(m.config, n_kv_head=4), "n_head", 6, "a multiple of n_kv_head = 4"),
    (lambda m, c: replace(m.config, n_kv_head=12), "n_head", 6, "a multiple of n_kv_head = 12"),
]  # fmt: skip


@pytest.mark.parametrize(("step", "argument", "given", "allowed"), STEPS)
def test_a_step_is_refused(step, argument, given, allowed):
    """Nothing changes: 9 tokens cached, of 12, the newest two by sparse steps, and one pending."""
    model = SHAPE.model()
    generation = started(model, SHAPE.tokens(9), 2, 12, [4, 5, 3], 2)
    check = unchanged(generation)
    with refused(argument, given, allowed):
        step(model, generation.cache)
    check()


@pytest.mark.parametrize(("interval", "argument"), [(3, "start … end"), (9, "length after the step")])
def test_a_step_of_a_full_cache_is_refused(interval, argument):
    model = SHAPE.model()
    generation = started(model, SHAPE.tokens(8), 2, 8, [4, 5, 3], 2)
    check = unchanged(generation)
    with refused(argument, "…9", "…8"):
        decode_step(model, generation, replace(CONFIG, interval=interval))
    check()


# Configurations.


def test_decoding_defaults_are_the_specifications():
    config = ReSAConfig()
    assert (config.block_size, config.active_ratio, config.min_blocks, config.local_blocks) == (16, 0.1, 16, 1)
    assert (config.interval, config.dense_layers, config.eight_bit_bounds) == (32, 0, False)
    assert config.schedule in ("paper", "fused")


REQUIRED = {  # arguments that a valid configuration has besides the field that is tried
    ReSAConfig: {},
    Sampling: {},
    RopeScaling: {"kind": "yarn", "factor": 2.0},
    GPTConfig: {
        "vocab_size": 11, "n_layer": 2, "n_head": 6, "n_kv_head": 2, "head_dim": 4, "hidden_size": 24,
        "intermediate_size": 32,
    },
}  # fmt: skip
POSITIVE, FINITE, SHARE = "an integer ≥ 1", "a finite number > 0", [1.1, -0.5, 0, NAN, INF, True, None, "most"]
FIELDS = [  # configuration, field, values taken, values refused, allowed
    (ReSAConfig, "block_size", [1, 16, np.int64(16)], [0, -1, 16.0, True, None, "16", np.True_], POSITIVE),
    (ReSAConfig, "active_ratio", [1, 1e-9, np.float32(0.5)], [*SHARE, 1.0000001, np.True_], "0 < active_ratio ≤ 1"),
    (ReSAConfig, "local_blocks", [1, 3, 16], [0, -1, 1.0, True, None], POSITIVE),
    (ReSAConfig, "min_blocks", [1, 30], [0, -1, 16.0, True, None], "an integer ≥ local_blocks = 1"),
    (ReSAConfig, "selection", ["bounds", "sketch"], ["Sketch", "", None, 2], "'bounds' or 'sketch'"),
    (ReSAConfig, "sketch_bits", [1, 2, np.int64(2)], [0, 3, 4, True, 2.0, None, "2"], "1 or 2"),
    (ReSAConfig, "interval", [None, 1, np.int8(2)], [0, -1, True, 32.0, INF, "32"], f"{POSITIVE}, or None for never"),
    (ReSAConfig, "schedule", ["paper", "fused"], ["Fused", "", "papers", None, 1], "'fused' or 'paper'"),
    (ReSAConfig, "dense_layers", [0, 3], [-1, 0.5, True, None], "an integer ≥ 0"),
    (ReSAConfig, "eight_bit_bounds", [True, False], [0, 1, None], "True or False"),
    *((GPTConfig, size, [], [0, -1, 2.0, True, None], POSITIVE) for size in (*REQUIRED[GPTConfig], "context")),
    # Heads need not fill the hidden size.
    *((GPTConfig, size, [7, np.int32(7)], [], "") for size in ("vocab_size", "hidden_size")),
    (GPTConfig, "n_kv_head", [1, 6], [], ""),
    (GPTConfig, "n_head", [2], [5], "a multiple of n_kv_head = 2"),
    (GPTConfig, "head_dim", [128], [1, 3, 5], "even: RoPE rotates pairs"),
    (GPTConfig, "rope_theta", [1, 1e6], [0, -1.0, NAN, INF, None, "1e4"], FINITE),
    (GPTConfig, "norm_eps", [1e-5], [0.0, -1e-6, NAN, INF, None], FINITE),
    *((GPTConfig, flag, [True, False], [1, 0, None], "True or False")
      for flag in ("qkv_bias", "qk_norm", "tied_embeddings")),
    (GPTConfig, "rope_scaling", [None], ["yarn", 2.0], "a RopeScaling or None"),
    (Sampling, "temperature", [0, 1.5], [NAN, -0.1, INF, "hot", None, True], "a finite number ≥ 0"),
    (Sampling, "top_p", [1, 0.5], SHARE, "0 < top_p ≤ 1"),
    (Sampling, "top_k", [None, 1, np.int64(3)], [0, 2.0, True, -1], f"{POSITIVE}, or None for all tokens"),
    (RopeScaling, "kind", ["linear", "llama3"], ["ntk", None], "'linear' or 'llama3' or 'yarn'"),
    *((RopeScaling, name, [2], [0, NAN, INF, "2", None], FINITE) for name in ("factor", "fast", "amplitude")),
    (RopeScaling, "slow", [0.5], [4.0, 5.0], "less than fast = 4.0"),
    (RopeScaling, "original_context", [1, np.int64(1)], [0, 2.0, None], POSITIVE),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "field", "taken", "wrong", "allowed"), FIELDS)
def test_a_field_is_checked(kind, field, taken, wrong, allowed):
    for value in taken:
        kept = getattr(kind(**{**REQUIRED[kind], field: value}), field)
        assert kept == value
        assert not isinstance(kept, np.generic) or isinstance(kept, float)  # NumPy's integers overflow
    for value in wrong:
        with refused(field, repr(value), allowed):
            kind(**{**REQUIRED[kind], field: value})


@pytest.mark.parametrize("kind", REQUIRED)
def test_a_configuration_cannot_be_changed(kind):
    """A field set later would escape the checks."""
    config = kind(**REQUIRED[kind])
    with pytest.raises(AttributeError):
        setattr(config, next(iter(vars(config))), 1)


# Memory.


def test_a_cache_that_memory_cannot_hold_is_refused_with_what_would_fit(monkeypatch):
    """A cache that would fit does fit, and nothing is allocated before; a generation that is resumed stays."""
    model, size = SHAPE.model(torch.float32), 50_000
    begun = started(model, SHAPE.tokens(9), 2, 12, [4, 5, 3], 2)
    check = unchanged(begun)
    monkeypatch.setattr("resa.reference.checks.free_memory", lambda device: size)
    with pytest.raises(torch.OutOfMemoryError, match=r"^KV cache: got 1 × 1,000,000,000,000 tokens") as refusal:
        model.new_cache(10**12, 2)
    fits = int(re.search(r"allowed: 1 × ([\d,]+) tokens", str(refusal.value))[1].replace(",", ""))
    cache = model.new_cache(fits, 2)
    held = sum(tensor.nbytes for tensor in (cache.keys, cache.values, cache.bounds, cache.bounds))
    assert size * 0.9 < held <= size
    with pytest.raises(torch.OutOfMemoryError):
        model.new_cache(fits + 2, 2)
    monkeypatch.setattr("resa.reference.checks.free_memory", lambda device: 1000)
    with pytest.raises(torch.OutOfMemoryError, match="KV cache: got 1 × "):
        generate(model, [[]], 9, CONFIG, resume=begun)
    check()


def test_sketches_count_in_what_would_fit(monkeypatch):
    model, size = SHAPE.model(torch.float32), 50_000
    monkeypatch.setattr("resa.reference.checks.free_memory", lambda device: size)
    with pytest.raises(torch.OutOfMemoryError) as refusal:
        model.new_cache(10**6, 2, 1)
    fits = int(re.search(r"allowed: 1 × ([\d,]+) tokens", str(refusal.value))[1].replace(",", ""))
    cache = model.new_cache(fits, 2, 1)
    held = sum(tensor.nbytes for tensor in (cache.keys, cache.values, cache.codes, cache.scales))
    assert size * 0.9 < held <= size
    with pytest.raises(torch.OutOfMemoryError):
        model.new_cache(fits + 2, 2, 1)


def test_the_caches_of_all_prompts_have_to_fit_together(monkeypatch):
    model, prompt = SHAPE.model(torch.float32), SHAPE.tokens(9)
    cache = model.new_cache(17, CONFIG.block_size)
    each = sum(tensor.nbytes for tensor in (cache.keys, cache.values, cache.bounds, cache.bounds))
    monkeypatch.setattr("resa.reference.checks.free_memory", lambda device: 3 * each)
    assert len(generate(model, [prompt] * 3, 9, CONFIG)) == 3
    with pytest.raises(torch.OutOfMemoryError, match="KV cache: got 1 × 68 tokens"):
        generate(model, [prompt] * 4, 9, CONFIG)


def test_a_cache_that_memory_cannot_hold_costs_no_random_number(way, monkeypatch):
    """The generator that seeds the sequences' own is asked only when nothing can be refused any more."""
    model, base = way.model(way.shape), torch.Generator().manual_seed(1)
    state = base.get_state()
    monkeypatch.setattr("resa.reference.checks.free_memory", lambda device: 1000)
    with pytest.raises(torch.OutOfMemoryError, match="KV cache: got"):
        way.decode(model, **TWO, config=way.config, sampling=Sampling(1.0), generators=base)
    assert torch.equal(base.get_state(), state)


def test_memory_that_no_machine_has_is_refused():
    with pytest.raises(
        torch.OutOfMemoryError, match=r"allowed: 1 × [\d,]+ tokens in the [\d.]+ GB that this machine has"
    ):
        SHAPE.model(torch.float32).new_cache(2**50, 16)
