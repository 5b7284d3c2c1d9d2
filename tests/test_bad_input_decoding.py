"""What decoding refuses: by name, saying what was given and what is allowed, before anything has changed.

Every message has the form "argument: got …; allowed: …".
"""

import re
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from small_models import Shape, assert_untouched, snapshot, started

from resa.reference import (
    GPT,
    Generation,
    GPTConfig,
    KVCache,
    ReSAConfig,
    block_bounds,
    decode_step,
    generate,
    prefill,
    rectify,
    sparse_step,
)

SHAPE = Shape(seed=1, context=24)
CONFIG = ReSAConfig(block_size=2, min_blocks=2, interval=3)
INF, NAN = float("inf"), float("nan")


def refused(argument, given="", allowed=""):
    """Expects a ValueError that names the argument, what was given and what is allowed, as literal texts."""
    pattern = rf"^{re.escape(argument)}: got .*{re.escape(given)}.*; allowed: .*{re.escape(allowed)}"
    return pytest.raises(ValueError, match=pattern)


@dataclass
class Setting:
    """A model, and a generation under way on it, watched for changes."""

    model: GPT
    generation: Generation

    def __enter__(self):
        self.before = snapshot(self.generation.cache)
        self.tokens = [list(tokens) for tokens in self.generation.tokens]
        self.window, self.pending = self.generation.window.clone(), self.generation.pending.clone()
        return self

    def __exit__(self, *exception):
        assert_untouched(self.generation.cache, self.before, range(len(self.tokens)))
        assert self.generation.cache.capacity == self.before.capacity
        assert self.generation.tokens == self.tokens
        assert torch.equal(self.generation.window, self.window)
        assert torch.equal(self.generation.pending, self.pending)

    @property
    def cache(self):
        return self.generation.cache


@pytest.fixture
def setting():
    """Two sequences of 9 and 5 cached tokens, two of them the open window, in a cache for 12."""
    model = SHAPE.model()
    prompts = SHAPE.prompts((9, 5))
    generation = started(model, prompts, 2, 12, [[*prompt[-2:], 3] for prompt in prompts], [2, 2])
    generation.pending[:] = 3
    with Setting(model, generation) as watched:
        yield watched


# --------------------------------------------------------------------------------------------------------------
# generate
# --------------------------------------------------------------------------------------------------------------

GOOD = {"prompts": [[1, 2, 3], [4]], "max_new_tokens": 4}


@pytest.mark.parametrize(
    ("changes", "argument", "given", "allowed"),
    [
        ({"prompts": []}, "prompts", "[]", "non-empty list of token lists"),
        ({"prompts": "text"}, "prompts", "'text'", "non-empty list of token lists"),
        ({"prompts": 3}, "prompts", "3", "non-empty list of token lists"),
        ({"prompts": [1, 2, 3]}, "prompts[0]", "1", "non-empty list of token ids"),
        ({"prompts": [[1], []]}, "prompts[1]", "[]", "non-empty list of token ids"),
        ({"prompts": [[1], "text"]}, "prompts[1]", "'text'", "non-empty list of token ids"),
        ({"prompts": [[1], None]}, "prompts[1]", "None", "non-empty list of token ids"),
        ({"prompts": [[1], [2, 23]]}, "prompts[1]", "[2, 23]", "0 … 22"),
        ({"prompts": [[1, -1], [2]]}, "prompts[0]", "[1, -1]", "0 … 22"),
        ({"prompts": [[1, 2.0], [2]]}, "prompts[0]", "[1, 2.0]", "0 … 22"),
        ({"prompts": [[True], [2]]}, "prompts[0]", "[True]", "0 … 22"),
        ({"prompts": [[1], [2, None]]}, "prompts[1]", "[2, None]", "0 … 22"),
        ({"prompts": [[1], [2] * 22]}, "prompts[1]", "22 tokens and max_new_tokens = 4", "context = 24"),
        ({"prompts": [[1] * 25, [2]], "max_new_tokens": 0}, "prompts[0]", "25 tokens", "context = 24"),
        ({"max_new_tokens": -1}, "max_new_tokens", "-1", "an integer ≥ 0"),
        ({"max_new_tokens": 2.0}, "max_new_tokens", "2.0", "an integer ≥ 0"),
        ({"max_new_tokens": True}, "max_new_tokens", "True", "an integer ≥ 0"),
        ({"max_new_tokens": None}, "max_new_tokens", "None", "an integer ≥ 0"),
        ({"max_new_tokens": "4"}, "max_new_tokens", "4", "an integer ≥ 0"),
        ({"config": {"interval": 3}}, "config", "dict", "a ReSAConfig"),
        ({"config": SHAPE.config()}, "config", "GPTConfig", "a ReSAConfig"),
        ({"temperature": NAN}, "temperature", "nan", "a finite number ≥ 0"),
        ({"temperature": -0.1}, "temperature", "-0.1", "a finite number ≥ 0"),
        ({"temperature": INF}, "temperature", "inf", "a finite number ≥ 0"),
        ({"temperature": "hot"}, "temperature", "hot", "a finite number ≥ 0"),
        ({"temperature": None}, "temperature", "None", "a finite number ≥ 0"),
        ({"top_p": 0}, "top_p", "0", "0 < top_p ≤ 1"),
        ({"top_p": 1.1}, "top_p", "1.1", "0 < top_p ≤ 1"),
        ({"top_p": -0.5}, "top_p", "-0.5", "0 < top_p ≤ 1"),
        ({"top_p": NAN}, "top_p", "nan", "0 < top_p ≤ 1"),
        ({"top_p": "most"}, "top_p", "most", "0 < top_p ≤ 1"),
        ({"generator": [torch.Generator()]}, "generator", "1 generators", "one, or 2"),
        ({"generator": [torch.Generator()] * 3, "temperature": 1.0}, "generator", "3 generators", "one, or 2"),
        ({"generator": []}, "generator", "0 generators", "one, or 2"),
        ({"stop_tokens": [5, 23]}, "stop_tokens", "23", "0 … 22"),
        ({"stop_tokens": {-1}}, "stop_tokens", "-1", "0 … 22"),
        ({"stop_tokens": [1.5]}, "stop_tokens", "1.5", "0 … 22"),
        ({"stop_tokens": 5}, "stop_tokens", "5", ""),
        ({"stop_tokens": iter([5])}, "stop_tokens", "iterator", ""),  # checking it would use it up
        ({"temperature": True}, "temperature", "True", "a finite number ≥ 0"),
        ({"top_p": True}, "top_p", "True", "0 < top_p ≤ 1"),
        ({"top_k": 0}, "top_k", "0", "an integer ≥ 1, or None for all tokens"),
        ({"top_k": 2.0}, "top_k", "2.0", "an integer ≥ 1, or None for all tokens"),
        ({"generator": 7, "temperature": 1.0}, "generator", "7", ""),
    ],
)
def test_generate_refuses(changes, argument, given, allowed):
    with refused(argument, given, allowed):
        generate(SHAPE.model(), **{"config": CONFIG, **GOOD, **changes})


def test_nothing_happens_before_a_refusal():
    """No pass is run, no callback called and no random number drawn for a request that does not fit."""
    own, calls = torch.Generator().manual_seed(1), []
    state = own.get_state()
    options = {"temperature": 1.0, "generator": own, "on_token": lambda *call: calls.append(call)}
    model = SHAPE.model()
    model.dense_pass = model.sparse_pass = lambda *arguments: pytest.fail("a pass was run")
    for changes in ({"max_new_tokens": 23}, {"prompts": [[1], []]}, {"stop_tokens": [99]}, {"top_p": 0}):
        with pytest.raises(ValueError, match="allowed"):
            generate(model, **{"config": CONFIG, **GOOD, **options, **changes})
        assert torch.equal(own.get_state(), state), f"{changes}: the generator has moved"
    assert calls == []


@pytest.mark.parametrize(
    ("changes", "argument", "given", "allowed"),
    [
        ({"prompts": [[1]]}, "prompts", "1 lists", "2"),
        ({"prompts": [[1], [2], [3]]}, "prompts", "3 lists", "2"),
        ({"config": ReSAConfig(block_size=4)}, "config.block_size", "4", "2"),
        ({"prompts": [[1], [99]]}, "prompts[1]", "[99]", "0 … 22"),
        ({"prompts": [[1] * 12, [2]]}, "prompts[0]", "22 tokens and max_new_tokens = 4", "context = 24"),
    ],
)
def test_resume_refuses(setting, changes, argument, given, allowed):
    with refused(argument, given, allowed):
        generate(setting.model, **{"config": CONFIG, **GOOD, **changes}, resume=setting.generation)


def test_resume_without_a_pending_token_needs_a_prompt():
    model = SHAPE.model()
    opened = generate(model, [[1, 2], [3]], 0, CONFIG)
    with Setting(model, opened), refused("prompts[1]", "[]", "non-empty"):
        generate(model, [[1], []], 3, CONFIG, resume=opened)


# --------------------------------------------------------------------------------------------------------------
# The steps below it
# --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "options", "argument"),
    [
        ([[1]], {}, "prompts"),
        ([[1], [2], [3]], {}, "prompts"),
        ([[1] * 4, [2]], {}, "prompts: lengths in the cache"),
        ([[1], [2] * 8], {}, "prompts: lengths in the cache"),
        ([[1], [23]], {}, "tokens"),
        ([[1], [-1]], {}, "prompts[1]"),
        ([[1], [1.5]], {}, "prompts[1]"),
        ([[1], "ab"], {}, "prompts[1]"),
        ([[1], 5], {}, "prompts[1]"),
        ([[1], [2]], {"chunk_size": 0}, "chunk_size"),
        ([[1], [2]], {"chunk_size": 2.0}, "chunk_size"),
        ([[1], [2]], {"chunk_size": True}, "chunk_size"),
    ],
)
def test_prefill_refuses(setting, prompts, options, argument):
    with refused(argument):
        prefill(setting.model, prompts, setting.cache, **options)


def test_prefill_refuses_a_token_in_a_later_chunk_before_the_first(setting):
    """The whole prompt is checked before any chunk is fed."""
    with refused("tokens", "23", "0 … 22"):
        prefill(setting.model, [[1, 2, 23], [1]], setting.cache, chunk_size=1)


@pytest.mark.parametrize(
    ("tokens", "config", "active", "argument"),
    [
        (torch.tensor([1]), CONFIG, None, "tokens"),
        (torch.tensor([[1], [2]]), CONFIG, None, "tokens"),
        (torch.tensor([1, 23]), CONFIG, None, "tokens"),
        (torch.tensor([-1, 2]), CONFIG, None, "tokens"),
        (torch.tensor([1.0, 2.0]), CONFIG, None, "tokens"),
        ([1, 2], CONFIG, torch.tensor([True, True]), "tokens"),
        (torch.tensor([1, 2]), CONFIG, torch.tensor([True]), "active"),
        (torch.tensor([1, 2]), CONFIG, torch.tensor([1, 2]), "counts"),
        (torch.tensor([1, 2]), CONFIG, torch.tensor([1, -1]), "counts"),
        (torch.tensor([1, 2]), ReSAConfig(block_size=4), None, "config.block_size"),
        (torch.tensor([1, 2], device="meta"), CONFIG, torch.tensor([True, True]), "tokens"),
    ],
)
def test_sparse_step_refuses(setting, tokens, config, active, argument):
    with refused(argument):
        sparse_step(setting.model, tokens, setting.cache, config, active=active)


def test_sparse_step_refuses_a_full_cache():
    model = SHAPE.model()
    generation = started(model, SHAPE.prompts((6, 3)), 2, 6)
    with Setting(model, generation), refused("start + counts", "7", "0 … 6"):
        sparse_step(model, torch.tensor([1, 2]), generation.cache, CONFIG)


@pytest.mark.parametrize(
    ("windows", "window", "argument"),
    [
        ([[1, 2]], [2, 2], "windows"),  # one list for two sequences
        ([[1], [1, 2]], [2, 2], "windows"),  # shorter than the window: would leave drifted tokens behind
        ([[1, 2], [1, 2]], [2], "window"),
        ([[1] * 6, [1, 2]], [2, 2], "start + counts"),  # past the capacity
        ([[1, 2], [1] * 6], [2, 6], "start"),  # before the first token
        ([[1, 23], [1, 2]], [2, 2], "tokens"),
        ([[1, 2], [1, 2]], [-1, 2], "start"),  # would leave a gap
    ],
)
def test_rectify_refuses(setting, windows, window, argument):
    with refused(argument):
        rectify(setting.model, windows, setting.cache, torch.tensor(window))


def test_decode_step_refuses_a_full_cache_for_all():
    """One sequence about to step sparsely, the other to be rectified, which has no room: neither is touched."""
    model = SHAPE.model()
    prompts = SHAPE.prompts((4, 8))
    generation = started(model, prompts, 2, 8, [[3], [*prompts[1][-2:], 3]], [0, 2])
    generation.pending[:] = 3
    with Setting(model, generation), pytest.raises(ValueError, match="allowed: 0 … 8"):
        decode_step(model, generation, CONFIG, torch.tensor([True, True]))


@pytest.mark.parametrize("interval", [1, 3])
def test_decode_step_refuses_to_feed_a_token_that_was_never_chosen(interval):
    """Right after prefill nothing is pending; feeding some token all the same would corrupt the sequence silently."""
    model = SHAPE.model()
    opened = generate(model, [[1, 2], [3]], 0, CONFIG)
    opened.cache = opened.cache.resized(8)
    config = ReSAConfig(block_size=2, min_blocks=2, interval=interval)
    with Setting(model, opened), pytest.raises(ValueError, match="pending"):
        decode_step(model, opened, config, torch.tensor([True, True]))


@pytest.mark.parametrize("active", [torch.tensor([True]), torch.tensor([[True, False]]), torch.tensor([1, 0])])
def test_decode_step_refuses_a_mask_that_does_not_fit(setting, active):
    with refused("active"):
        decode_step(setting.model, setting.generation, CONFIG, active)


# --------------------------------------------------------------------------------------------------------------
# The cache
# --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "argument"),
    [
        ({"batch": 0}, "batch"),
        ({"batch": 2.0}, "batch"),
        ({"batch": True}, "batch"),
        ({"capacity": -1}, "capacity"),
        ({"capacity": 8.0}, "capacity"),
        ({"block_size": 0}, "block_size"),
        ({"block_size": None}, "block_size"),
        ({"dtype": torch.int64}, "dtype"),
        ({"dtype": torch.complex64}, "dtype"),
    ],
)
def test_an_empty_cache_refuses(changes, argument):
    good = {"batch": 2, "capacity": 8, "block_size": 2}
    with refused(argument):
        KVCache.empty(SHAPE.config(), **{**good, **changes}, block_bounds=block_bounds)


def test_an_empty_cache_of_no_capacity_holds_nothing():
    cache = KVCache.empty(SHAPE.config(), 2, 0, 4, block_bounds)
    assert cache.capacity == 0
    assert cache.bounds.shape[-1] == 0
    cache.truncate(torch.tensor([0, 0]))
    assert cache.resized(5).capacity == 5


@pytest.mark.parametrize(
    ("start", "counts", "argument"),
    [
        ([10, 5], [1, 1], "start"),  # a gap
        ([9, 6], [1, 1], "start"),
        ([-2, 3], [2, 2], "start"),  # before the first token
        ([7, 5], [1, 1], "start"),  # ends before the length: what follows would rest on what is replaced
        ([9, 5], [4, 1], "start + counts"),  # over capacity
        ([9, 5], [5, 1], "counts"),  # more than the window's 4 tokens
        ([9, 5], [-1, 1], "counts"),
        ([9], [1, 1], "start"),
        ([9, 5], [1], "counts"),
        ([9.0, 5.0], [1, 1], "start"),
        ([9, 5], [1.0, 1.0], "counts"),
        ([9, 5], [True, True], "counts"),
        ([[9, 5]], [1, 1], "start"),
    ],
)
def test_a_pass_refuses_windows_that_do_not_fit(setting, start, counts, argument):
    tokens = torch.zeros(2, 4, dtype=torch.int64)
    with refused(argument):
        setting.model.dense_pass(tokens, setting.cache, torch.tensor(start), torch.tensor(counts))


def test_a_pass_refuses_another_device(setting):
    tokens, start, counts = torch.zeros(2, 1, dtype=torch.int64), torch.tensor([9, 5]), torch.tensor([1, 1])
    for changes in ({"start": start.to("meta")}, {"counts": counts.to("meta")}):
        with refused(next(iter(changes)), "meta", "cpu"):
            setting.model.dense_pass(tokens, setting.cache, **{"start": start, "counts": counts, **changes})


D = SHAPE.head_dim
WINDOW = (2, SHAPE.kv_heads, 1, D)


@pytest.mark.parametrize(
    ("keys", "values", "argument"),
    [
        (torch.zeros(WINDOW), torch.zeros(WINDOW), "keys"),  # float32 into float64
        (torch.zeros(WINDOW, dtype=torch.float64), torch.zeros(WINDOW), "values"),
        (torch.zeros(WINDOW, dtype=torch.int64), torch.zeros(WINDOW, dtype=torch.int64), "keys"),
        (torch.zeros(2, SHAPE.kv_heads + 1, 1, D).double(), torch.zeros(WINDOW).double(), "keys"),
        (torch.zeros(2, SHAPE.kv_heads, 1, D + 1).double(), torch.zeros(WINDOW).double(), "keys"),
        (torch.zeros(1, SHAPE.kv_heads, 1, D).double(), torch.zeros(WINDOW).double(), "keys"),
        (torch.zeros(WINDOW).double(), torch.zeros(2, SHAPE.kv_heads, 2, D).double(), "values"),
        (torch.zeros(WINDOW).double()[0], torch.zeros(WINDOW).double(), "keys"),
        (torch.zeros(WINDOW, dtype=torch.float64, device="meta"), torch.zeros(WINDOW).double(), "keys"),
        (torch.zeros(WINDOW).double(), torch.zeros(WINDOW, dtype=torch.float64, device="meta"), "values"),
        (torch.zeros(WINDOW).double(), None, "values"),
        # A width other than the window's, on both.
        (torch.zeros(2, SHAPE.kv_heads, 0, D).double(), torch.zeros(2, SHAPE.kv_heads, 0, D).double(), "keys"),
        (torch.zeros(2, SHAPE.kv_heads, 3, D).double(), torch.zeros(2, SHAPE.kv_heads, 3, D).double(), "keys"),
    ],
)
def test_write_refuses_tensors_that_do_not_fit(setting, keys, values, argument):
    window = setting.cache.open_window(torch.tensor([9, 5]), torch.tensor([1, 1]), 1)
    with refused(argument):
        setting.cache.write(0, keys, values, window)


@pytest.mark.parametrize(
    ("lengths", "given", "allowed"),
    [
        (torch.tensor([10, 5]), "[10, 5]", "[9, 5]"),
        (torch.tensor([9, 6]), "[9, 6]", "[9, 5]"),
        (torch.tensor([13, 5]), "13", "0 … 12"),
        (torch.tensor([-1, 5]), "-1", "0 … 12"),
        (torch.tensor([9.0, 5.0]), "float32", "int32"),
        (torch.tensor([9]), "[1]", "B"),
        (torch.tensor([9, 5, 1]), "[3]", "B"),
        (torch.tensor([9, 5], device="meta"), "meta", "cpu"),
        ([9, 5], "list", "a tensor"),
    ],
)
def test_truncate_refuses(setting, lengths, given, allowed):
    with refused("lengths", given, allowed):
        setting.cache.truncate(lengths)


@pytest.mark.parametrize("capacity", [8, -1, 9.0, None])
def test_resized_refuses_less_than_the_longest_sequence(setting, capacity):
    with refused("capacity", str(capacity), "9"):
        setting.cache.resized(capacity)


@pytest.mark.parametrize("sequences", [[], [2], [-1], [0, 1.0], [True]])
def test_selected_refuses_sequences_that_are_not_there(setting, sequences):
    with refused("sequences", str(sequences), "0 … 1"):
        setting.cache.selected(sequences)


# --------------------------------------------------------------------------------------------------------------
# Configurations
# --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("block_size", [0, -1, 1.0, True, None, "16"]),
        ("active_ratio", [0, -0.1, 1.1, NAN, INF, None, True, "all"]),
        ("min_blocks", [0, -1, 1.5, True, None]),
        ("local_blocks", [0, -1, 1.5, True, None]),
        ("interval", [0, -1, 1.5, True, "never"]),
        ("schedule", ["sparse", "Paper", None, 1]),
        ("dense_below", [-1, 1.5, True, None]),
    ],
)
def test_decoding_configuration_refuses(field, values):
    for value in values:
        with refused(field, str(value)):
            ReSAConfig(**{field: value})


def test_local_blocks_count_toward_min_blocks():
    with refused("min_blocks", "2", "local_blocks = 3"):
        ReSAConfig(min_blocks=2, local_blocks=3)
    assert ReSAConfig(min_blocks=3, local_blocks=3).local_blocks == 3


@pytest.mark.parametrize(
    ("field", "values"),
    [
        *((name, [0, -1, 2.0, True, None, "4"]) for name in ("vocab_size", "n_layer", "n_head", "n_kv_head",
          "head_dim", "hidden_size", "intermediate_size", "context")),
        ("rope_theta", [0, -1.0, NAN, INF, None, "10"]),
        ("norm_eps", [0, -1e-6, NAN, INF, None]),
        ("qkv_bias", [0, 1, None, "yes"]),
        ("qk_norm", [0, 1, None]),
        ("tied_embeddings", [0, 1, None]),
    ],
)  # fmt: skip
def test_model_configuration_refuses(field, values):
    for value in values:
        with refused(field, str(value)):
            SHAPE.config(**{field: value})


def test_model_shapes_that_do_not_fit_together():
    with refused("n_head", "6", "n_kv_head = 4"):
        SHAPE.config(n_kv_head=4)
    with refused("head_dim", "7", "even"):
        SHAPE.config(head_dim=7)
    with refused("n_head", "6", "n_kv_head = 12"):
        SHAPE.config(n_kv_head=12)


def test_configurations_are_frozen():
    for config, field in ((CONFIG, "interval"), (SHAPE.config(), "context")):
        with pytest.raises(AttributeError):
            setattr(config, field, 5)
    assert isinstance(SHAPE.config(), GPTConfig)


def test_numbers_of_numpy_are_no_token_ids():
    """Only plain integers are: what an array holds is to be converted by whoever knows its dtype."""
    with refused("prompts[0]"):
        generate(SHAPE.model(), [np.arange(3), [1]], 2, CONFIG)


# --------------------------------------------------------------------------------------------------------------
# Memory
# --------------------------------------------------------------------------------------------------------------


def test_a_cache_that_memory_cannot_hold_is_refused_with_what_would_fit(monkeypatch):
    """What would fit does fit, and nothing is allocated before the refusal."""
    model, size = SHAPE.model(torch.float32), 50_000
    monkeypatch.setattr("resa.reference.cache.free_memory", lambda device: size)
    with pytest.raises(torch.OutOfMemoryError, match=r"^KV cache: got 2 × 1,000,000,000,000 tokens") as refusal:
        model.new_cache(2, 10**12, 2)
    fits = int(re.search(r"allowed: 2 × ([\d,]+) tokens", str(refusal.value))[1].replace(",", ""))
    cache = model.new_cache(2, fits, 2)
    held = sum(tensor.nbytes for tensor in (cache.keys, cache.values, cache.bounds, cache.bounds))
    assert size * 0.9 < held <= size
    with pytest.raises(torch.OutOfMemoryError):
        model.new_cache(2, fits + 2, 2)


def test_a_resumed_generation_that_memory_cannot_hold_stays_as_it_was(monkeypatch):
    model = SHAPE.model(torch.float32)
    before = generate(model, SHAPE.prompts((5, 3)), 4, CONFIG)
    monkeypatch.setattr("resa.reference.cache.free_memory", lambda device: 1000)
    with Setting(model, before), pytest.raises(torch.OutOfMemoryError, match="KV cache: got 2 × "):
        generate(model, [[], []], 9, CONFIG, resume=before)


def test_memory_that_no_machine_has_is_refused():
    with pytest.raises(torch.OutOfMemoryError, match=r"allowed: 1 × [\d,]+ tokens in the [\d.]+ GB that cpu has free"):
        SHAPE.model(torch.float32).new_cache(1, 2**50, 16)
