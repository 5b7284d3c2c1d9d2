"""The laws of section 4 that speak of decoding (2, 6, 7, 8, 9), in float64 to 1e-9, on small random models.

Most tests decode under given tokens, one `decode_step` at a time, because then every step can be compared with one
dense prefill of the whole text: dense attention is causal, so that the exact cache of any prefix is a prefix of it.
Where a law says that something is equal, the test also shows that it would not be without the thing tested: sparse
steps that leave blocks out must move the cache visibly, or else equality after a rectification would mean nothing.
"""

from dataclasses import asdict, dataclass, replace

import oracle
import pytest
import torch
from hypothesis import assume, event, given
from hypothesis import strategies as st
from small_models import (
    EXACT,
    NAN,
    VISIBLE,
    Shape,
    assert_bounds_rebuilt,
    assert_untouched,
    dense_cache,
    drift,
    feed,
    leaves_out,
    never_rectified,
    poison,
    shapes,
    share,
    snapshot,
    sparse_configs,
    started,
    weights,
)
from tolerances import assert_same_bits

from resa.reference import ReSAConfig, generate, prefill, rectify, sparse_step
from resa.reference.generate import decode_along


@dataclass(frozen=True)
class Scene:
    """A model, a ragged batch of prompts, and the tokens that each sequence is then fed."""

    shape: Shape
    lengths: tuple[int, ...]  # of the prompts
    fed: int  # tokens per sequence after its prompt

    def texts(self):
        """Prompt and continuation of each sequence."""
        return self.shape.prompts([length + self.fed for length in self.lengths])

    def prompts(self):
        return [text[:length] for text, length in zip(self.texts(), self.lengths, strict=True)]

    @property
    def capacity(self):
        return max(self.lengths) + self.fed

    def start(self, model, config, capacity=None):
        return started(model, self.prompts(), config.block_size, capacity or self.capacity)

    def steps(self):
        """For each step, the tokens [B] to feed."""
        rows = [text[length:] for text, length in zip(self.texts(), self.lengths, strict=True)]
        return [list(column) for column in zip(*rows, strict=True)]


@st.composite
def scenes(draw, max_fed=13, max_batch=3):
    """One prompt at least is long enough for all of `sparse_configs` to leave blocks out from the first step on."""
    first = draw(st.sampled_from([17, 13, 24]))
    others = draw(st.lists(st.sampled_from([1, 2, 5, 8, 9, 16]), max_size=max_batch - 1))
    order = draw(st.permutations([first, *others]))
    return Scene(draw(shapes()), tuple(order), draw(st.integers(1, max_fed)))


def assert_exact(cache, exact, what):
    """Every token of every sequence is where dense prefill has it."""
    for s in range(len(cache.lengths)):
        worst = drift(cache, s, exact)
        assert worst.max() <= EXACT, f"{what}: sequence {s} drifted by {worst.tolist()}"


def relative(actual, expected):
    """Largest difference in units of the largest expected value."""
    return float((actual - expected).detach().abs().max() / expected.detach().abs().max())


# --------------------------------------------------------------------------------------------------------------
# Laws 2, 6 and 7: after every step
# --------------------------------------------------------------------------------------------------------------


@given(scenes(), sparse_configs())
def test_only_the_open_window_drifts(scene, config):
    """After every step, in both schedules: w = tokens fed mod f, and only the newest w differ from dense prefill."""
    model = scene.shape.model()
    exact, _ = dense_cache(model, scene.texts(), config.block_size)
    generation = scene.start(model, config)
    visible = 0
    for step, rows in enumerate(scene.steps(), start=1):
        feed(model, generation, config, rows)
        w = step % config.interval
        assert generation.window.tolist() == [w] * len(rows), f"window after {step} tokens"
        assert generation.cache.lengths.tolist() == [length + step for length in scene.lengths]
        for s, length in enumerate(generation.cache.lengths.tolist()):
            worst = drift(generation.cache, s, exact)
            assert (worst[: length - w] <= EXACT).all(), f"drift before the window of {w} after {step} tokens: {worst}"
            for position in range(length - w, length):
                # Each of these was fed sparsely while the cache ended with it.
                if leaves_out(config, position + 1):
                    assert worst[position] > VISIBLE, f"no drift at {position}, although blocks were left out"
                    visible += 1
        assert_bounds_rebuilt(generation.cache)
    event("drift seen between rectifications" if visible else "no token was left drifting")


@share(2)
@given(scenes(), sparse_configs())
def test_without_rectification_drift_stays(scene, config):
    """The opposite of law 6: the same steps without rectification leave every such token drifted for good."""
    config = never_rectified(config)
    model = scene.shape.model()
    exact, _ = dense_cache(model, scene.texts(), config.block_size)
    generation = scene.start(model, config)
    for rows in scene.steps():
        feed(model, generation, config, rows)
    assert generation.window.tolist() == [scene.fed] * len(scene.lengths)
    assert_bounds_rebuilt(generation.cache)
    longest = scene.lengths.index(max(scene.lengths))
    assert leaves_out(config, scene.lengths[longest] + 1), "the scene was to leave blocks out from the first step on"
    for s, prompt in enumerate(scene.lengths):
        worst = drift(generation.cache, s, exact)
        assert (worst[:prompt] <= EXACT).all(), "a sparse step touched the prompt"
        for position in range(prompt, prompt + scene.fed):
            if leaves_out(config, position + 1):
                assert worst[position] > VISIBLE


@given(scenes(), sparse_configs(), st.data())
def test_rectify_removes_any_drift(scene, config, data):
    """Law 6 for `rectify` itself: ragged windows of any length, with and without tokens appended in the same pass."""
    model, texts = scene.shape.model(), scene.texts()
    exact, _ = dense_cache(model, texts, config.block_size)
    cache = scene.start(model, config, capacity=scene.capacity).cache
    batch = len(texts)
    window = [data.draw(st.integers(0, scene.fed), label=f"window {s}") for s in range(batch)]
    for step in range(max(window)):
        active = torch.tensor([step < w for w in window])
        row = torch.tensor([text[length + step] for text, length in zip(texts, scene.lengths, strict=True)])
        sparse_step(model, row, cache, config, active=active)
    skipped = data.draw(st.sets(st.integers(0, batch - 1), max_size=batch - 1), label="left alone")
    before = snapshot(cache)
    windows, expected_lengths = [], []
    for s, (text, length, w) in enumerate(zip(texts, scene.lengths, window, strict=True)):
        appended = data.draw(st.integers(0, scene.fed - w), label=f"appended to {s}")
        end = length + w + appended
        windows.append([] if s in skipped else text[length:end])
        expected_lengths.append(length + w if s in skipped else end)
    assume(any(windows))
    logits = rectify(model, windows, cache, torch.tensor(window))
    assert cache.lengths.tolist() == expected_lengths
    assert_untouched(cache, before, skipped)
    assert_bounds_rebuilt(cache)
    for s in set(range(batch)) - skipped:
        assert drift(cache, s, exact).max() <= EXACT
        if windows[s]:
            dense_logits = model(torch.tensor([texts[s][: expected_lengths[s]]]))[0, -1]
            assert relative(logits[s], dense_logits) <= EXACT, "logits after the last token of the window"


def test_passes_over_nothing_do_nothing():
    """Empty windows and empty prompts for every sequence: nothing is fed, nothing changes, nothing fails."""
    shape, config = Shape(), ReSAConfig(block_size=2)
    model = shape.model()
    cache = started(model, shape.prompts((5, 3)), config.block_size, 8).cache
    before = snapshot(cache)
    assert not prefill(model, [[], []], cache).any()
    assert_untouched(cache, before, [0, 1])
    rectify(model, [[], []], cache, torch.tensor([2, 0]))
    assert_untouched(cache, before, [0, 1])


@pytest.mark.parametrize("start", [0, 1, 4, 5, 6, 8])
def test_a_count_of_zero_leaves_a_sequence_alone(start):
    """Wherever its window of no tokens is said to begin: nothing is cut off, nothing grows."""
    shape = Shape()
    model, prompts = shape.model(), shape.prompts((5, 3))
    cache = started(model, prompts, 2, 8).cache
    before = snapshot(cache)
    model.dense_pass(torch.tensor([[1], [2]]), cache, torch.tensor([start, 3]), torch.tensor([0, 1]))
    assert cache.lengths.tolist() == [5, 4]
    assert_untouched(cache, before, [0])
    assert_bounds_rebuilt(cache)


@share(2)
@given(scenes(), sparse_configs(), st.integers(0, 3))
def test_generation_that_ends_on_a_rectification_has_an_exact_cache(scene, config, cycles):
    """Laws 6 and 7 through `generate`, greedy: w = (N − 1) mod f, and N − 1 a multiple of f leaves no drift."""
    model, prompts = scene.shape.model(), scene.prompts()
    n_tokens = cycles * config.interval + 1
    done = generate(model, prompts, n_tokens, config)
    assert [len(tokens) for tokens in done.tokens] == [n_tokens] * len(prompts)
    assert done.window.tolist() == [0] * len(prompts)
    assert done.pending.tolist() == [tokens[-1] for tokens in done.tokens]
    texts = [prompt + tokens for prompt, tokens in zip(prompts, done.tokens, strict=True)]
    exact, _ = dense_cache(model, texts, config.block_size)
    assert done.cache.lengths.tolist() == [len(text) - 1 for text in texts]
    assert_exact(done.cache, exact, f"after {cycles} cycles")
    assert_bounds_rebuilt(done.cache)


@share(2)
@given(
    scenes(max_batch=2),
    sparse_configs(),
    st.integers(1, 14),
    st.sampled_from([1, 2, 5, None]),
    st.sampled_from(["fused", "paper"]),
)
def test_window_is_the_remainder(scene, config, n_tokens, interval, schedule):
    """w = (N − 1) mod f in both schedules; without an interval it counts on."""
    config = replace(config, interval=interval, schedule=schedule)
    done = generate(scene.shape.model(), scene.prompts(), n_tokens, config)
    w = n_tokens - 1 if interval is None else (n_tokens - 1) % interval
    assert done.window.tolist() == [w] * len(scene.lengths)


# --------------------------------------------------------------------------------------------------------------
# Law 8: the corners
# --------------------------------------------------------------------------------------------------------------


def greedy_by_forward(model, prompt, n_tokens):
    """Dense decoding with nothing but the training forward: no cache, no decoding code at all."""
    text = list(prompt)
    for _ in range(n_tokens):
        text.append(int(model(torch.tensor([text]))[0, -1].argmax()))
    return text[len(prompt) :]


@share(2)
@given(scenes(), sparse_configs(interval=1, schedule="fused"))
def test_interval_one_fused_is_dense(scene, config):
    """Token for token, and with an exact cache at every length."""
    model, prompts = scene.shape.model(), scene.prompts()
    done = generate(model, prompts, scene.fed, config)
    assert done.tokens == [greedy_by_forward(model, prompt, scene.fed) for prompt in prompts]
    exact, _ = dense_cache(model, [p + t for p, t in zip(prompts, done.tokens, strict=True)], config.block_size)
    assert_exact(done.cache, exact, "interval 1")


@share(2)
@given(scenes(), sparse_configs(), st.sampled_from([1, 2, 3, 7, None]), st.sampled_from(["fused", "paper"]))
def test_attending_to_every_block_is_dense(scene, config, interval, schedule):
    """active_ratio = 1 for every interval, none included, and both schedules; min_blocks has no say then."""
    config = replace(config, active_ratio=1, interval=interval, schedule=schedule)
    model, prompts = scene.shape.model(), scene.prompts()
    done = generate(model, prompts, scene.fed, config)
    assert done.tokens == [greedy_by_forward(model, prompt, scene.fed) for prompt in prompts]
    exact, _ = dense_cache(model, [p + t for p, t in zip(prompts, done.tokens, strict=True)], config.block_size)
    assert_exact(done.cache, exact, "every block")


@share(2)
@given(scenes(), sparse_configs(interval=1, schedule="paper"))
def test_interval_one_paper_is_exact_only_in_the_cache(scene, config):
    """Decode-only: no drift after any step, but the step itself is sparse, so its logits are not the dense ones."""
    model, texts = scene.shape.model(), scene.texts()
    exact, _ = dense_cache(model, texts, config.block_size)
    generation = scene.start(model, config)
    for step, rows in enumerate(scene.steps(), start=1):
        logits = feed(model, generation, config, rows)
        assert_exact(generation.cache, exact, f"step {step}")
        for s, length in enumerate(generation.cache.lengths.tolist()):
            dense_logits = model(torch.tensor([texts[s][:length]]))[0, -1]
            if leaves_out(config, length):
                assert relative(logits[s], dense_logits) > VISIBLE, "a step that left blocks out cannot be dense"
            else:
                assert relative(logits[s], dense_logits) <= EXACT


def test_decode_only_chooses_other_tokens():
    """The corner above in tokens: somewhere among a handful of models, decode-only and dense decoding part ways."""
    config = ReSAConfig(block_size=2, min_blocks=2, interval=1, schedule="paper")
    parted = []
    for seed in range(8):
        shape = Shape(seed=seed)
        model, prompt = shape.model(), shape.tokens(20)
        parted.append(generate(model, [prompt], 12, config).tokens != [greedy_by_forward(model, prompt, 12)])
    assert any(parted)


@share(2)
@given(scenes(), sparse_configs(), st.data())
def test_short_caches_decode_densely(scene, config, data):
    """`dense_below`, over ragged lengths: w counts only the tokens fed to caches of at least so many tokens."""
    border = data.draw(st.integers(0, scene.capacity), label="dense_below")
    config = replace(config, dense_below=border, interval=data.draw(st.sampled_from([config.interval, None])))
    model, texts = scene.shape.model(), scene.texts()
    exact, _ = dense_cache(model, texts, config.block_size)
    generation = scene.start(model, config)
    for step, rows in enumerate(scene.steps(), start=1):
        logits = feed(model, generation, config, rows)
        for s, prompt in enumerate(scene.lengths):
            length = prompt + step
            sparse_steps = max(0, length - max(prompt, border))
            w = sparse_steps if config.interval is None else sparse_steps % config.interval
            assert generation.window[s] == w, f"sequence {s} after {step} tokens"
            worst = drift(generation.cache, s, exact)
            assert (worst[: length - w] <= EXACT).all()
            assert all(worst[p] > VISIBLE for p in range(length - w, length) if leaves_out(config, p + 1))
            if length - 1 < border:
                assert relative(logits[s], model(torch.tensor([texts[s][:length]]))[0, -1]) <= EXACT
        assert_bounds_rebuilt(generation.cache)


# --------------------------------------------------------------------------------------------------------------
# Law 9: batch independence, padding, other windows
# --------------------------------------------------------------------------------------------------------------


@share(2)
@given(scenes(), sparse_configs(), st.sampled_from([0.0, 0.7, 1.5]), st.data())
def test_each_sequence_alone_equals_itself_in_any_batch(scene, config, temperature, data):
    """Tokens, cache, length and window, greedy and sampled, with stop tokens that end sequences at different steps."""
    config = replace(config, interval=data.draw(st.sampled_from([config.interval, None])))
    stop = data.draw(st.sets(st.integers(0, scene.shape.vocab - 1), max_size=2), label="stop tokens")
    model, prompts = scene.shape.model(), scene.prompts()

    def generators():
        return [torch.Generator().manual_seed(scene.shape.seed % 2**32 + s) for s in range(len(prompts))]

    options = {"temperature": temperature, "top_p": 0.9, "stop_tokens": stop}
    together = generate(model, prompts, scene.fed, config, generator=generators(), **options)
    for s, prompt in enumerate(prompts):
        alone = generate(model, [prompt], scene.fed, config, generator=[generators()[s]], **options)
        assert alone.tokens[0] == together.tokens[s]
        assert alone.window[0] == together.window[s]
        assert alone.pending[0] == together.pending[s]
        assert alone.cache.lengths[0] == together.cache.lengths[s]
        assert drift(alone.cache, 0, together.cache, s).max() <= EXACT
    event(f"sequences end at {len({len(tokens) for tokens in together.tokens})} different steps")


@share(2)
@given(scenes(), sparse_configs(), st.integers(0, 9), st.sampled_from([NAN, float("inf"), -1e300]))
def test_capacity_and_garbage_change_nothing(scene, config, spare, garbage):
    """More capacity changes nothing to 1e-9; what the slack holds, renewed before every step, not one bit."""
    model = scene.shape.model()
    plain = scene.start(model, config)
    roomy, poisoned = (scene.start(model, config, capacity=scene.capacity + spare) for _ in range(2))
    for rows in scene.steps():
        poison(poisoned.cache, garbage)
        logits = feed(model, plain, config, rows)
        roomy_logits = feed(model, roomy, config, rows)
        assert relative(roomy_logits, logits) <= EXACT
        assert_same_bits(feed(model, poisoned, config, rows), roomy_logits, "logits over garbage")
    assert_same_bits(poisoned.cache.bounds, roomy.cache.bounds, "bounds over garbage")
    for s in range(len(scene.lengths)):
        assert drift(roomy.cache, s, plain.cache).max() <= EXACT
        assert drift(poisoned.cache, s, roomy.cache).max() == 0


@share(2)
@given(scenes(), sparse_configs(), st.data())
def test_windows_out_of_step(scene, config, data):
    """Sequences in different phases, some sitting steps out, each do what they would do alone; the others rest.

    The phases are set by hand: part of each prompt is declared to be the open window, as if generated.
    """
    model, texts = scene.shape.model(), scene.texts()
    phases = [
        data.draw(st.integers(0, min(config.interval, length) - 1), label=f"phase {s}")
        for s, length in enumerate(scene.lengths)
    ]
    exact, _ = dense_cache(model, texts, config.block_size)

    def begin(rows):
        tokens = [texts[s][scene.lengths[s] - phases[s] : scene.lengths[s]] for s in rows]
        prompts = [texts[s][: scene.lengths[s]] for s in rows]
        return started(model, prompts, config.block_size, scene.capacity, tokens, [phases[s] for s in rows])

    batch = len(texts)
    together, alone = begin(range(batch)), [begin([s]) for s in range(batch)]
    fed = [0] * batch
    for step in range(scene.fed):
        active = data.draw(st.sets(st.integers(0, batch - 1), min_size=1), label=f"active in step {step}")
        rows = [texts[s][scene.lengths[s] + fed[s]] if s in active else None for s in range(batch)]
        before, window = snapshot(together.cache), together.window.clone()
        logits = feed(model, together, config, rows)
        resting = sorted(set(range(batch)) - active)
        assert_untouched(together.cache, before, resting)
        assert together.window[resting].tolist() == window[resting].tolist()
        for s in sorted(active):
            fed[s] += 1
            own_logits = feed(model, alone[s], config, [rows[s]])
            assert relative(logits[s], own_logits[0]) <= EXACT
            w = (phases[s] + fed[s]) % config.interval
            assert together.window[s] == alone[s].window[0] == w
            length = scene.lengths[s] + fed[s]
            worst = drift(together.cache, s, exact)
            assert (worst[: length - w] <= EXACT).all()
            assert drift(together.cache, s, alone[s].cache, 0).max() <= EXACT
        assert_bounds_rebuilt(together.cache)
    event(f"{len({int(w) for w in together.window})} different windows at the end")


@share(2)
@given(scenes(), sparse_configs(), st.data())
def test_finished_sequences_rest(scene, config, data):
    """A sequence that left the batch, with no pending token or any, keeps every byte while the others go on."""
    model, batch = scene.shape.model(), len(scene.lengths)
    generation = scene.start(model, config)
    last_step = [data.draw(st.integers(0, scene.fed), label=f"last step of {s}") for s in range(batch)]
    resting = {}
    for step, rows in enumerate(scene.steps()):
        for s in range(batch):
            if step == last_step[s]:
                resting[s] = (snapshot(generation.cache), int(generation.window[s]))
        if len(resting) == batch:
            break
        feed(model, generation, config, [None if s in resting else token for s, token in enumerate(rows)])
        for s, (before, window) in resting.items():
            assert_untouched(generation.cache, before, [s])
            assert generation.window[s] == window
            assert generation.cache.lengths[s] == scene.lengths[s] + last_step[s]
            assert window == last_step[s] % config.interval


# --------------------------------------------------------------------------------------------------------------
# Prefill in chunks
# --------------------------------------------------------------------------------------------------------------


@share(2)
@given(scenes(), sparse_configs(), st.integers(1, 40))
def test_prefill_does_not_depend_on_the_chunking(scene, config, chunk_size):
    model, texts = scene.shape.model(), scene.texts()
    whole, logits = dense_cache(model, texts, config.block_size)
    cache, chunked_logits = dense_cache(model, texts, config.block_size, chunk_size=chunk_size)
    assert_exact(cache, whole, f"chunks of {chunk_size}")
    assert cache.lengths.tolist() == whole.lengths.tolist() == [len(text) for text in texts]
    assert relative(chunked_logits, logits) <= EXACT
    assert_bounds_rebuilt(cache)
    for row, text in zip(logits, texts, strict=True):
        assert relative(row, model(torch.tensor([text]))[0, -1]) <= EXACT, "the last logits are those of training"


@given(scenes(), sparse_configs(), st.integers(1, 5))
def test_prefill_appends(scene, config, chunk_size):
    """A prompt in two calls, ragged, some sequences without a second part, is the prompt in one."""
    model, texts = scene.shape.model(), scene.texts()
    exact, whole_logits = dense_cache(model, texts, config.block_size)
    cuts = [length if s % 2 else len(texts[s]) for s, length in enumerate(scene.lengths)]
    cache = model.new_cache(len(texts), scene.capacity, config.block_size)
    logits = prefill(model, [text[:cut] for text, cut in zip(texts, cuts, strict=True)], cache)
    rest = [text[cut:] for text, cut in zip(texts, cuts, strict=True)]
    before = snapshot(cache)
    more = prefill(model, rest, cache, chunk_size=chunk_size)
    assert_exact(cache, exact, "two calls")
    assert_bounds_rebuilt(cache)
    for s, tail in enumerate(rest):
        assert relative(more[s] if tail else logits[s], whole_logits[s]) <= EXACT
        if not tail:
            assert_untouched(cache, before, [s])
            assert not more[s].any(), "no prompt, no logits"


@pytest.mark.parametrize("interval", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_below_float64_rectified_caches_differ_like_chunked_prefills(dtype, interval):
    """Section 4: after a rectification at most twice the difference between dense prefills of other chunk sizes.

    The model is wider than elsewhere: sums of a few terms are rounded alike for one row and for many. Where all are
    (bfloat16 on a CPU with matrix units), no difference is allowed at all.
    """
    prompt_length, fed = 40, 12
    rounding, rectified, sparse = [], [], []
    for seed in range(2):
        scene = Scene(Shape(seed=seed, layers=3, head_dim=32, hidden=96), (prompt_length, prompt_length - 7), fed)
        model, texts = scene.shape.model(dtype), scene.texts()
        whole, _ = dense_cache(model, texts, 2)
        for chunk_size in {1, interval, prompt_length}:
            cache, _ = dense_cache(model, texts, 2, chunk_size=chunk_size)
            rounding += [drift(cache, s, whole).max() for s in range(2)]
        config = ReSAConfig(block_size=2, min_blocks=2, interval=interval)
        schedules = [(replace(config, schedule=schedule), rectified) for schedule in ("fused", "paper")]
        for own, measured in (*schedules, (never_rectified(config), sparse)):
            generation = scene.start(model, own)
            for rows in scene.steps():
                feed(model, generation, own, rows)
            measured += [drift(generation.cache, s, whole).max() for s in range(2)]
    assert max(rectified) <= 2 * max(rounding)
    assert min(sparse) > 2 * max(rounding), "without rectification the difference must stand out from rounding"


# --------------------------------------------------------------------------------------------------------------
# Against the oracle
# --------------------------------------------------------------------------------------------------------------


@share(2)
@given(scenes(max_batch=2), sparse_configs(), st.sampled_from([False, True]), st.sampled_from([0, 0, 7, 20]))
def test_generation_equals_the_oracle(scene, config, endless, dense_below):
    """Tokens, every layer's cache, drifted or not, and the window, for either schedule and for none."""
    config = replace(config, interval=None if endless else config.interval, dense_below=dense_below)
    model, prompts = scene.shape.model(), scene.prompts()
    done = generate(model, prompts, scene.fed, config)
    for s, prompt in enumerate(prompts):
        expected = oracle.generate(weights(model), asdict(model.config), asdict(config), prompt, scene.fed)
        assert done.tokens[s] == expected.tokens
        assert done.window[s] == expected.w
        length = expected.cache.length
        assert done.cache.lengths[s] == length
        for layer in range(model.config.n_layer):
            for ours, theirs in ((done.cache.keys, expected.cache.keys), (done.cache.values, expected.cache.values)):
                assert relative(ours[layer, s, :, :length], torch.from_numpy(theirs[layer])) <= EXACT


@share(2)
@given(scenes(max_batch=2), sparse_configs())
def test_steps_equal_the_oracle_under_given_tokens(scene, config):
    """The logits of every step, whatever the tokens."""
    model, texts = scene.shape.model(), scene.texts()
    generation = scene.start(model, config)
    logits = torch.stack([feed(model, generation, config, rows) for rows in scene.steps()], dim=1)  # [B, steps, V]
    for s, (prompt, text) in enumerate(zip(scene.prompts(), texts, strict=True)):
        forced = [*text[len(prompt) :], 0]  # the oracle never feeds the last one
        expected = oracle.generate(
            weights(model), asdict(model.config), asdict(config), prompt, scene.fed + 1, forced=forced
        )
        for step, row in enumerate(expected.logits[1:]):
            assert relative(logits[s, step], torch.from_numpy(row)) <= EXACT, f"step {step + 1}"


@share(4)
@given(scenes(), sparse_configs())
def test_decoding_along_given_tokens(scene, config):
    """`decode_along` is `decode_step` after `decode_step`: same logits, same cache, same window at every token."""
    model = scene.shape.model()
    stepped, cache = scene.start(model, config), scene.start(model, config).cache
    steps = scene.steps()
    along = decode_along(model, cache, [list(row) for row in zip(*steps, strict=True)], config)
    for rows, (logits, state) in zip(steps, along, strict=True):
        assert_same_bits(logits, feed(model, stepped, config, rows), "logits")
        assert state.window.tolist() == stepped.window.tolist()
        assert state.cache.lengths.tolist() == stepped.cache.lengths.tolist()
    assert_same_bits(cache.keys, stepped.cache.keys, "keys")


def test_decoding_along_draws_each_token_when_it_is_due():
    """The tokens may depend on the logits before them, and the first list to end ends them all."""
    shape, config = Shape(), ReSAConfig(block_size=2, min_blocks=2, interval=3)
    model, prompts = shape.model(), shape.prompts((9, 4))
    expected = generate(model, prompts, 6, config).tokens
    cache = started(model, prompts, 2, 20).cache
    chosen = [tokens[:1] for tokens in expected]

    def tokens_of(sequence, count):
        for step in range(count):
            yield chosen[sequence][step]

    for logits, _ in decode_along(model, cache, [tokens_of(0, 5), tokens_of(1, 9)], config):
        for tokens, row in zip(chosen, logits, strict=True):
            tokens.append(int(row.argmax()))
    assert chosen == expected
    assert cache.lengths.tolist() == [14, 9]


def test_no_drift_however_long():
    """Law 7 over many windows: the sparse decoder's drift stays, the rectified one's is gone every time."""
    scene = Scene(Shape(seed=5, layers=3, context=256), (9, 1), 120)
    model = scene.shape.model()
    exact, _ = dense_cache(model, scene.texts(), 4)
    config = ReSAConfig(block_size=4, min_blocks=2, interval=8)
    generation = scene.start(model, config)
    for step, rows in enumerate(scene.steps(), start=1):
        feed(model, generation, config, rows)
        if step % 8 == 0:
            assert_exact(generation.cache, exact, f"step {step}")
        elif step % 8 == 7:
            assert all(drift(generation.cache, s, exact)[-1] > VISIBLE for s in range(2) if step > 8)
