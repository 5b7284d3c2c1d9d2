"""The loop around the steps: ends of generation, resuming, callbacks, and how tokens are chosen."""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st
from small_models import (
    EXACT,
    VISIBLE,
    Shape,
    assert_bounds_rebuilt,
    assert_untouched,
    dense_cache,
    drift,
    leaves_out,
    shapes,
    share,
    snapshot,
    sparse_configs,
)
from tolerances import assert_same_bits

from resa.reference import REFERENCE_OPS, ReSAConfig, generate, sample_token

SHAPE = Shape(seed=11)
PROMPTS = SHAPE.prompts((19, 1, 8))
SPARSE = ReSAConfig(block_size=2, min_blocks=2, interval=3)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def free_running(n_tokens=14, config=SPARSE, **options):
    """What the model says after each prompt, with no stop token in the way."""
    return generate(SHAPE.model(), PROMPTS, n_tokens, config, **options).tokens


def assert_prefix_exact(done, prompts, config=SPARSE):
    """The cache holds prompt + N − 1 tokens, exact up to the open window and bounded as rebuilt."""
    texts = [prompt + tokens for prompt, tokens in zip(prompts, done.tokens, strict=True)]
    exact, _ = dense_cache(SHAPE.model(), texts, config.block_size)
    for s, text in enumerate(texts):
        length = int(done.cache.lengths[s])
        assert length == len(text) - 1
        assert (drift(done.cache, s, exact)[: length - int(done.window[s])] <= EXACT).all()
    assert_bounds_rebuilt(done.cache)


# --------------------------------------------------------------------------------------------------------------
# Ends
# --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["fused", "paper"])
@pytest.mark.parametrize("at", range(8))
def test_a_stop_token_is_returned_and_never_fed(schedule, at):
    """At every step of two cycles: the first token, the one after the window filled, and those between.

    With `at` = 3 or 6, the step whose logits gave the stop token had filled the window: its rectification ran.
    """
    config = replace(SPARSE, schedule=schedule)
    endless = free_running(config=config)
    for sequence in range(len(PROMPTS)):
        stop = endless[sequence][at]
        cut = [tokens[: tokens.index(stop) + 1] if stop in tokens else tokens for tokens in endless]
        done = generate(SHAPE.model(), PROMPTS, len(endless[0]), config, stop_tokens={stop})
        assert done.tokens == cut
        assert done.pending.tolist() == [tokens[-1] for tokens in cut]
        assert done.window.tolist() == [(len(tokens) - 1) % 3 for tokens in cut]
        assert_prefix_exact(done, PROMPTS, config)


def test_any_of_several_stop_tokens_ends_a_sequence():
    endless = free_running()
    stops = [endless[0][4], endless[1][2]]
    done = generate(SHAPE.model(), PROMPTS, 14, SPARSE, stop_tokens=stops)
    for tokens, all_tokens in zip(done.tokens, endless, strict=True):
        first = min((all_tokens.index(stop) for stop in stops if stop in all_tokens), default=13)
        assert tokens == all_tokens[: first + 1]


def test_no_new_tokens_gives_the_prefilled_cache():
    seen = []
    done = generate(SHAPE.model(), PROMPTS, 0, SPARSE, on_token=lambda *call: seen.append(call))
    exact, _ = dense_cache(SHAPE.model(), PROMPTS, SPARSE.block_size)
    assert done.tokens == [[], [], []]
    assert seen == []
    assert done.window.tolist() == [0, 0, 0]
    assert done.pending.tolist() == [-1, -1, -1]
    assert done.cache.lengths.tolist() == [len(prompt) for prompt in PROMPTS]
    assert all(drift(done.cache, s, exact).max() <= EXACT for s in range(3))
    assert_bounds_rebuilt(done.cache)


def test_one_new_token_comes_from_the_prefill_alone():
    model = SHAPE.model()
    done = generate(model, PROMPTS, 1, SPARSE)
    assert done.tokens == [[int(model(torch.tensor([prompt]))[0, -1].argmax())] for prompt in PROMPTS]
    assert done.cache.lengths.tolist() == [len(prompt) for prompt in PROMPTS], "the last token is never fed"
    assert done.window.tolist() == [0, 0, 0]


@pytest.mark.parametrize(("prompt_length", "n_tokens"), [(10, 3), (12, 1), (12, 0), (1, 12)])
def test_the_context_is_used_to_its_last_token(prompt_length, n_tokens):
    """prompt + N − 1 = context fits, because the last token is never fed; one more is refused before any work."""
    shape = replace(SHAPE, context=12)
    model, prompts = shape.model(), shape.prompts((prompt_length, 1))
    done = generate(model, prompts, n_tokens, SPARSE)
    assert done.cache.lengths[0] == prompt_length + max(n_tokens - 1, 0) == 12
    longer = shape.prompts((prompt_length + 1, 1))
    too_many = {"prompts": longer, "max_new_tokens": n_tokens} if n_tokens < 2 else {"max_new_tokens": n_tokens + 1}
    with pytest.raises(ValueError, match=r"prompts\[0\].*context = 12"):
        generate(model, **{"prompts": prompts, "max_new_tokens": n_tokens, "config": SPARSE, **too_many})


def test_the_default_configuration_is_the_specifications():
    """b = 16, p = 0.1, n_min = 16, f = 32: 16 blocks of 16 tokens cover these prompts, so decoding is dense."""
    specified = ReSAConfig(block_size=16, active_ratio=0.1, min_blocks=16, local_blocks=1, interval=32)
    by_default, by_name = (generate(SHAPE.model(), PROMPTS, 40, config) for config in (None, specified))
    assert by_default.tokens == by_name.tokens
    assert by_default.cache.block_size == 16
    assert by_default.window.tolist() == [39 % 32] * 3


@pytest.mark.parametrize("schedule", ["fused", "paper"])
@pytest.mark.parametrize("dense_layers", [0, 1, 2, 3, 7])
def test_the_first_layers_may_attend_to_everything(schedule, dense_layers):
    """As if every block were selected there; with all layers so, sparse decoding is dense decoding."""
    shape, n_layer, calls = replace(SHAPE, layers=3), 3, []
    config = replace(SPARSE, schedule=schedule, dense_layers=dense_layers)

    def select_blocks(scores, lengths, resa):
        layer = len(calls) % n_layer
        calls.append(layer)
        return REFERENCE_OPS.select_blocks(
            scores, lengths, replace(resa, active_ratio=1.0 if layer < dense_layers else 0.1)
        )

    model = shape.model()
    watched = model.with_ops(replace(REFERENCE_OPS, select_blocks=select_blocks))
    expected = generate(watched, PROMPTS, 14, replace(config, dense_layers=0))
    done = generate(model, PROMPTS, 14, config)
    assert done.tokens == expected.tokens
    length = int(done.cache.lengths.min())
    torch.testing.assert_close(
        done.cache.keys[..., :length, :], expected.cache.keys[..., :length, :], rtol=0, atol=EXACT
    )
    assert_bounds_rebuilt(done.cache)
    dense = generate(model, PROMPTS, 14, replace(config, interval=1, schedule="fused", dense_layers=0)).tokens
    if dense_layers >= n_layer:
        assert done.tokens == dense
    elif dense_layers == 0:
        assert done.tokens != dense, "nothing was left out: the test would see nothing"


# --------------------------------------------------------------------------------------------------------------
# Callbacks
# --------------------------------------------------------------------------------------------------------------


def test_on_token_reports_each_token_where_it_will_stand():
    """Step by step, sequence by sequence, finished ones no more; positions count from the prompt's first token."""
    endless = free_running()
    stop = endless[2][5]
    calls = []
    done = generate(SHAPE.model(), PROMPTS, 14, SPARSE, stop_tokens=[stop], on_token=lambda *call: calls.append(call))
    expected = [
        (s, len(PROMPTS[s]) + step, tokens[step])
        for step in range(14)
        for s, tokens in enumerate(done.tokens)
        if step < len(tokens)
    ]
    assert calls == expected
    assert len(done.tokens[2]) <= 6, "a sequence was to end early"


def test_on_token_is_called_before_the_next_step():
    """A caller that stops by an exception has been told every token up to there, and no more is computed."""
    calls = []

    def interrupt(sequence, position, token):
        calls.append(token)
        if len(calls) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(SHAPE.model(), PROMPTS[:1], 14, SPARSE, on_token=interrupt)
    assert calls == free_running()[0][:4]


# --------------------------------------------------------------------------------------------------------------
# Resuming
# --------------------------------------------------------------------------------------------------------------


@share(2)
@given(shapes(), sparse_configs(), st.lists(st.tuples(st.integers(0, 4), st.integers(0, 7)), min_size=1, max_size=4),
       st.booleans())  # fmt: skip
def test_turns_equal_one_dense_prefill_up_to_the_last_window(shape, config, turns, endless_window):
    """Any number of turns, each with new prompt tokens, or none, and some generated ones, or none."""
    config = replace(config, interval=None) if endless_window else config
    model, lengths = shape.model(), (18, 1)
    texts = [list(prompt) for prompt in shape.prompts(lengths)]
    done = generate(model, texts, 3, config)
    for s, tokens in enumerate(done.tokens):
        texts[s] += tokens
    for turn, (n_prompt, n_tokens) in enumerate(turns, start=1):
        if not all(done.tokens):  # nothing is pending: go on with a prompt, or not at all
            n_prompt = max(1, n_prompt)
        prompts = [shape.tokens(n_prompt + s, stream=10 * turn + s) for s in range(2)]
        done = generate(model, prompts, n_tokens, config, resume=done)
        for s in range(2):
            texts[s] += prompts[s] + done.tokens[s]
    exact, _ = dense_cache(model, texts, config.block_size)
    n_tokens = turns[-1][1]
    w = max(n_tokens - 1, 0) if config.interval is None else max(n_tokens - 1, 0) % config.interval
    assert done.window.tolist() == [w, w]
    off = []  # errors of tokens that a sparse step wrote which left blocks out
    for s, text in enumerate(texts):
        held = len(text) - (n_tokens > 0)
        assert done.cache.lengths[s] == held
        worst = drift(done.cache, s, exact)
        assert (worst[: held - w] <= EXACT).all(), "everything before the last turn's open window is dense"
        off += [worst[p] for p in range(held - w, held) if leaves_out(config, p + 1)]
    # Not each of them: a step whose attention happens to lie in the selected blocks is dense to the last digits.
    assert not off or max(off) > VISIBLE
    assert_bounds_rebuilt(done.cache)
    event(f"open window of {min(w, 3)}{'+' if w > 2 else ''}")


@pytest.mark.parametrize("interval", [2, 5, None])
@pytest.mark.parametrize("schedule", ["fused", "paper"])
def test_resuming_first_rectifies_the_open_window(interval, schedule):
    """The first token of the next turn is the dense model's, although the window it follows had drifted."""
    config = replace(SPARSE, interval=interval, schedule=schedule)
    model = SHAPE.model()
    first = generate(model, PROMPTS, 4, config)
    assert all(w > 0 for w in first.window), "a window was to be open"
    second = generate(model, [[], [3], [3, 4]], 1, config, resume=first)
    for s, more in enumerate([[], [3], [3, 4]]):
        text = PROMPTS[s] + first.tokens[s] + more
        assert second.tokens[s] == [int(model(torch.tensor([text]))[0, -1].argmax())]
        assert second.cache.lengths[s] == len(text)


@pytest.mark.parametrize("capacity", [None, 64])
def test_resuming_leaves_the_earlier_generation_untouched(capacity):
    """Two continuations of one generation do not see each other, also where its cache has room for what follows."""
    model = SHAPE.model()
    first = generate(model, PROMPTS, 5, SPARSE)
    if capacity is not None:
        first.cache = first.cache.resized(capacity)
    before = snapshot(first.cache)
    state = (first.window.clone(), first.pending.clone(), [list(tokens) for tokens in first.tokens])
    continued = [generate(model, [[1], [2], [5]], 6, SPARSE, resume=first) for _ in range(2)]
    assert_untouched(first.cache, before, range(3))
    assert torch.equal(first.window, state[0])
    assert torch.equal(first.pending, state[1])
    assert first.tokens == state[2]
    assert continued[0].tokens == continued[1].tokens
    assert_same_bits(continued[0].cache.keys, continued[1].cache.keys, "keys of two equal continuations")


def test_resuming_after_no_tokens_goes_on_from_the_prompt():
    model = SHAPE.model()
    halves = [(prompt[: len(prompt) // 2], prompt[len(prompt) // 2 :]) for prompt in (PROMPTS[0], PROMPTS[2])]
    opened = generate(model, [head for head, _ in halves], 0, SPARSE)
    done = generate(model, [tail for _, tail in halves], 7, SPARSE, resume=opened)
    whole = generate(model, [PROMPTS[0], PROMPTS[2]], 7, SPARSE)
    assert done.tokens == whole.tokens
    assert done.cache.lengths.tolist() == whole.cache.lengths.tolist()
    assert all(drift(done.cache, s, whole.cache).max() <= EXACT for s in range(2))


def test_resuming_feeds_a_stop_token_and_spares_its_window():
    """The stop token was returned, not fed; the next turn feeds it, in a batch whose sequences ended apart."""
    endless = free_running()
    stop = endless[0][4]
    model = SHAPE.model()
    first = generate(model, PROMPTS, 11, SPARSE, stop_tokens={stop})
    assert len({len(tokens) for tokens in first.tokens}) > 1, "the sequences were to end apart"
    second = generate(model, [[7], [], [8, 9]], 3, SPARSE, resume=first)
    prompts = [p + t + more for p, t, more in zip(PROMPTS, first.tokens, [[7], [], [8, 9]], strict=True)]
    assert_prefix_exact(second, prompts)


def test_resuming_in_dense_decoding_is_going_on():
    """With interval = 1 a pause changes nothing: two turns are one."""
    config, model = replace(SPARSE, interval=1), SHAPE.model()
    first = generate(model, PROMPTS, 4, config)
    second = generate(model, [[], [], []], 5, config, resume=first)
    at_once = generate(model, PROMPTS, 9, config)
    assert [a + b for a, b in zip(first.tokens, second.tokens, strict=True)] == at_once.tokens
    assert all(drift(second.cache, s, at_once.cache).max() <= EXACT for s in range(3))


def test_resuming_counts_the_whole_text_against_the_context():
    """Cached tokens, the pending one, the new prompt, and N − 1: exactly the context fits."""
    shape = replace(SHAPE, context=16)
    model, prompt = shape.model(), shape.tokens(6)
    first = generate(model, [prompt], 4, SPARSE)  # 9 cached, 1 pending
    done = generate(model, [[1, 2]], 5, SPARSE, resume=first)
    assert done.cache.lengths.tolist() == [16]
    with pytest.raises(ValueError, match=r"prompts\[0\].*context = 16"):
        generate(model, [[1, 2]], 6, SPARSE, resume=first)


# --------------------------------------------------------------------------------------------------------------
# Choosing a token
# --------------------------------------------------------------------------------------------------------------


def draw_from(probabilities, top_p=1.0, n=1, temperature=1.0, seed=0, top_k=None):
    """n tokens sampled from given probabilities."""
    logits, own = torch.tensor(probabilities, dtype=torch.float64).log(), generator(seed)
    return [sample_token(logits, temperature, top_p, own, top_k) for _ in range(n)]


@pytest.mark.parametrize(
    ("probabilities", "top_p", "kept"),
    [
        ([0.1, 0.6, 0.3], 0.5, {1}),  # 0.6 alone reaches a half
        ([0.1, 0.6, 0.3], 0.61, {1, 2}),
        ([0.1, 0.6, 0.3], 0.89, {1, 2}),
        ([0.1, 0.6, 0.3], 0.91, {0, 1, 2}),
        ([0.1, 0.6, 0.3], 1e-9, {1}),  # never nothing
        ([0.25] * 4, 0.5, {0, 1}),  # a half exactly; among equals the lower ids
        ([0.25] * 4, 0.51, {0, 1, 2}),
        ([0.25] * 4, 0.25, {0}),
        ([0.25] * 4, 1.0, {0, 1, 2, 3}),
        ([0.125, 0.25, 0.125, 0.25, 0.25], 0.75, {1, 3, 4}),
        ([0.125, 0.25, 0.125, 0.25, 0.25], 0.76, {0, 1, 3, 4}),
        ([0.0, 0.5, 0.5, 0.0], 1.0, {1, 2}),  # mass 1 is reached before the impossible tokens
    ],
)
def test_top_p_keeps_the_shortest_prefix(probabilities, top_p, kept):
    """Worked by hand. 300 draws miss a kept token of at least a tenth of the mass with probability below 1e-13."""
    assert set(draw_from(probabilities, top_p, n=300)) == kept


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [
        (1, 1.0, {1}),
        (2, 1.0, {1, 2}),
        (3, 1.0, {1, 2, 3}),  # of two equals the lower id
        (9, 1.0, {0, 1, 2, 3, 4}),  # more than there are: all
        (2, 0.6, {1, 2}),  # 0.4 of the 0.7 that two tokens have is less than 0.6 …
        (2, 0.57, {1}),  # … and more than 0.57
        (None, 0.6, {1, 2}),
        (3, 0.4, {1}),
    ],
)
def test_top_k_keeps_the_likeliest_and_top_p_a_share_of_those(top_k, top_p, kept):
    """Worked by hand, of 0.1, 0.4, 0.3, 0.15 and 0.05, and with 0.15 twice."""
    probabilities = [0.1, 0.4, 0.3, 0.15, 0.05] if top_k != 3 else [0.0, 0.4, 0.3, 0.15, 0.15]
    assert set(draw_from(probabilities, top_p, n=600, top_k=top_k)) == kept


def test_top_k_reaches_generation():
    """One token kept at every temperature is the greedy one."""
    greedy = generate(SHAPE.model(), PROMPTS, 12, SPARSE).tokens
    options = {"temperature": 3.0, "generator": generator()}
    assert generate(SHAPE.model(), PROMPTS, 12, SPARSE, top_k=1, **options).tokens == greedy
    assert generate(SHAPE.model(), PROMPTS, 12, SPARSE, **options).tokens != greedy


@given(st.integers(0, 2**32 - 1), st.integers(1, 16), st.sampled_from([0.1, 0.5, 0.9, 0.99, 1.0]),
       st.sampled_from([0.3, 1.0, 2.0]))  # fmt: skip
def test_sampling_inverts_the_distribution_of_the_kept_tokens(seed, vocabulary, top_p, temperature):
    """Token k is chosen exactly where the uniform number lies in k's share of the kept mass, in falling order.

    The uniform number is the generator's next float64. Logits in steps of a quarter give true ties.
    """
    own = generator(seed)
    logits = torch.randint(-8, 9, (vocabulary,), generator=own).double() / 4
    twin = generator(0)
    twin.set_state(own.get_state())
    chosen = sample_token(logits, temperature, top_p, own)
    uniform = torch.rand((), dtype=torch.float64, generator=twin).item()
    assert torch.equal(own.get_state(), twin.get_state()), "one uniform number, no more and no less"
    unnormalised = [math.exp(x / temperature) for x in logits.tolist()]
    total = math.fsum(unnormalised)
    order = sorted(range(vocabulary), key=lambda k: (-logits[k].item(), k))
    kept, mass = [], 0.0
    for k in order:
        kept.append(k)
        mass += unnormalised[k] / total
        if mass >= top_p - 1e-12:  # the boundary itself is left to the cases worked by hand
            break
    target, below = uniform * mass, 0.0
    edges = []
    for k in kept:
        edges.append((below, below + unnormalised[k] / total, k))
        below = edges[-1][1]
    allowed = {k for low, high, k in edges if low - 1e-9 <= target <= high + 1e-9}
    assert chosen in allowed
    event("one token possible" if len(allowed) == 1 else "uniform number next to an edge")


def test_sampled_frequencies_follow_the_probabilities():
    """Chi-square over 4,000 draws, 5 degrees of freedom: 33 is exceeded with probability 4e-6; the seed is fixed."""
    probabilities, temperature, n = [0.05, 0.3, 0.1, 0.25, 0.2, 0.1], 0.5, 4000
    sharpened = [p ** (1 / temperature) for p in probabilities]
    expected = [n * p / sum(sharpened) for p in sharpened]
    seen = Counter(draw_from(probabilities, n=n, temperature=temperature, seed=3))
    chi_square = sum((seen[k] - e) ** 2 / e for k, e in enumerate(expected))
    assert chi_square < 33
    flat = sum((seen[k] - n * p) ** 2 / (n * p) for k, p in enumerate(probabilities))
    assert flat > 330, "the test must be able to tell temperature 0.5 from 1"


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-300, 5e-324])
def test_a_vanishing_temperature_is_greedy(temperature):
    """Down to the smallest positive number: the largest logit wins, and it costs its uniform number all the same."""
    own = generator(1)
    for seed in range(20):
        logits = torch.randn(50, generator=generator(seed), dtype=torch.float64) * 5
        before = own.get_state()
        assert sample_token(logits, temperature, 1.0, own) == int(logits.argmax())
        assert not torch.equal(own.get_state(), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_greedy_takes_the_lower_id_of_equals_and_no_randomness(dtype):
    logits = torch.tensor([0.0, 2.0, -1.0, 2.0, 2.0], dtype=dtype)
    own = generator()
    before, default = own.get_state(), torch.get_rng_state()
    assert sample_token(logits, 0.0, 1.0, own) == 1
    assert sample_token(logits.flip(0), 0, 0.5, None) == 0
    assert sample_token(torch.zeros(1000, dtype=dtype), 0.0, 1.0, own) == 0
    assert torch.equal(own.get_state(), before)
    assert torch.equal(torch.get_rng_state(), default)


# --------------------------------------------------------------------------------------------------------------
# Randomness of a whole generation
# --------------------------------------------------------------------------------------------------------------


def test_greedy_generation_uses_no_randomness():
    own = [generator(s) for s in range(3)]
    shared = generator(9)
    states, default = [g.get_state() for g in (*own, shared)], torch.get_rng_state()
    tokens = free_running()
    assert free_running(generator=own) == tokens
    assert free_running(generator=shared) == tokens
    assert all(torch.equal(g.get_state(), state) for g, state in zip((*own, shared), states, strict=True))
    assert torch.equal(torch.get_rng_state(), default)


@pytest.mark.parametrize("interval", [1, 3, None])
def test_one_uniform_number_per_token(interval):
    """From the sequence's own generator, also where a stop token cuts one short."""
    config = replace(SPARSE, interval=interval)
    endless = generate(
        SHAPE.model(), PROMPTS, 12, config, temperature=1.0, top_p=0.8, generator=[generator(s) for s in range(3)]
    ).tokens
    own = [generator(s) for s in range(3)]
    default = torch.get_rng_state()
    done = generate(
        SHAPE.model(), PROMPTS, 12, config, temperature=1.0, top_p=0.8, generator=own, stop_tokens={endless[1][3]}
    )
    assert len(done.tokens[1]) <= 4
    for s, tokens in enumerate(done.tokens):
        assert tokens == endless[s][: len(tokens)]
        twin = generator(s)
        torch.rand(len(tokens), dtype=torch.float64, generator=twin)
        assert torch.equal(own[s].get_state(), twin.get_state()), f"{len(tokens)} tokens of sequence {s}"
    assert torch.equal(torch.get_rng_state(), default)


def test_one_generator_seeds_each_prompt_by_its_index():
    """Prompt i's tokens do not depend on how many follow, nor on what they are; another index, other tokens."""
    model = SHAPE.model()

    def sampled(prompts, seed=4):
        return generate(model, prompts, 10, SPARSE, temperature=1.0, generator=generator(seed)).tokens

    three = sampled(PROMPTS)
    assert sampled(PROMPTS[:2]) == three[:2]
    assert sampled(PROMPTS[:1]) == three[:1]
    assert sampled([PROMPTS[0], PROMPTS[0], PROMPTS[2]])[::2] == three[::2]
    same_prompt = sampled([PROMPTS[0]] * 3)
    assert same_prompt[1] != same_prompt[0] != same_prompt[2] != same_prompt[1]
    assert sampled(PROMPTS, seed=5) != three
    assert sampled(PROMPTS) == three


def test_without_a_generator_torchs_default_decides():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        first = free_running(temperature=1.0)
        second = free_running(temperature=1.0)
        torch.manual_seed(3)
        assert free_running(temperature=1.0) == first != second


def test_sampling_changes_the_tokens_and_top_p_narrows_them():
    """A tiny top_p leaves one token at every temperature: the greedy one."""
    greedy = free_running()
    assert free_running(temperature=2.0, generator=generator()) != greedy
    assert free_running(temperature=2.0, top_p=1e-6, generator=generator()) == greedy


def test_reruns_are_identical():
    """Same inputs, same bits: tokens, cache, bounds."""
    runs = [
        generate(SHAPE.model(), PROMPTS, 12, SPARSE, temperature=0.8, top_p=0.9, generator=generator(2))
        for _ in range(2)
    ]
    assert runs[0].tokens == runs[1].tokens
    for name in ("keys", "values", "bounds", "lengths"):
        assert_same_bits(getattr(runs[0].cache, name), getattr(runs[1].cache, name), name)


def test_the_model_is_left_without_gradients():
    """Decoding a model in training neither records nor needs gradients."""
    model = SHAPE.model().train()
    done = generate(model, PROMPTS, 5, SPARSE)
    assert model.training
    assert not done.cache.keys.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
