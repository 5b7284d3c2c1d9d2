"""The laws of section 4 that speak of decoding one sequence (2, 6, 7, 8), on small random models.

Most tests decode under given tokens, one `decode_step` at a time, because then every step can be compared with one
dense prefill of the whole text: dense attention is causal, so that the exact cache of any prefix is a prefix of it.
Where a law says that something is equal, the test also shows that it would not be without the thing tested: sparse
steps that leave blocks out must move the cache visibly, or else equality after a rectification would mean nothing.
"""

from dataclasses import asdict, dataclass, replace

import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st

import oracle
from decoders import COMPILED, TRITON, Run, assert_dense_before_the_window, for_both_decoders, runs
from near_ties import near_tie
from resa.reference import ReSAConfig, rectify, sparse_step
from small_models import (
    EXACT,
    VISIBLE,
    Shape,
    assert_bounds_rebuilt,
    dense_cache,
    drift,
    feed,
    greedy_by_forward,
    leaves_out,
    relative,
    shapes,
    share,
    sparse_configs,
    started,
    weights,
)


@dataclass(frozen=True)
class Scene:
    """A model, a prompt, and the tokens that are fed after it."""

    shape: Shape
    length: int  # of the prompt
    fed: int

    @property
    def text(self):
        return self.shape.tokens(self.length + self.fed)

    @property
    def given(self):
        return self.text[self.length :]

    def start(self, model, config, spare=0):
        capacity = self.length + self.fed + spare
        return started(model, self.text[: self.length], config.block_size, capacity, sketch_bits=config.kept_bits)


@st.composite
def scenes(draw, max_fed=13):
    """Mostly prompts long enough for all of `sparse_configs` to leave blocks out from the first step on."""
    length = draw(st.sampled_from([17, 13, 24, 17, 13, 24, 1, 2, 8]))
    return Scene(draw(shapes()), length, draw(st.integers(1, max_fed)))


def assert_exact(cache, exact, what):
    """Every token is where dense prefill has it."""
    worst = drift(cache, exact)
    assert worst.max() <= EXACT, f"{what}: drifted by {worst.tolist()}"


# --- Laws 2, 6 and 7, step by step, in float64 ---


@given(scenes(), sparse_configs(), st.sampled_from([True, True, True, False]))
def test_only_the_open_window_drifts(scene, config, is_rectified):
    """After every step, in both schedules: w = tokens fed mod f, and only the newest w differ from dense prefill.

    Interval 1 under "paper" is decode-only: nothing drifts. Without rectification every token fed does, for good.
    """
    config = config if is_rectified else replace(config, interval=None)
    model = scene.shape.model()
    exact, _ = dense_cache(model, scene.text, config.block_size)
    generation, visible = scene.start(model, config), 0
    for step, token in enumerate(scene.given, start=1):
        feed(model, generation, config, token)
        w = step % config.interval if is_rectified else step
        length, cache = scene.length + step, generation.cache
        assert (generation.n_drifted, cache.length) == (w, length), f"after {step} tokens"
        worst = drift(cache, exact)
        assert (worst[: length - w] <= EXACT).all(), f"drift before the window of {w} after {step} tokens: {worst}"
        for position in range(length - w, length):
            # Each of these was fed sparsely while the cache ended with it.
            if leaves_out(config, position + 1):
                assert worst[position] > VISIBLE, f"no drift at {position}, although blocks were left out"
                visible += 1
        assert_bounds_rebuilt(cache)
    event("drift seen between rectifications" if visible else "no token was left drifting")


@given(scenes(), sparse_configs(), st.data())
def test_rectify_removes_any_drift(scene, config, data):
    """Law 6 for `rectify` itself: windows of any length, with and without tokens appended in the same pass."""
    model, text = scene.shape.model(), scene.text
    exact, _ = dense_cache(model, text, config.block_size)
    cache = scene.start(model, config).cache
    n_drifted = data.draw(st.integers(0, scene.fed), label="drifted")
    wider = data.draw(st.integers(0, min(2, scene.length)), label="exact tokens before them")
    appended = data.draw(st.integers(int(n_drifted + wider == 0), scene.fed - n_drifted), label="appended")
    for token in scene.given[:n_drifted]:
        sparse_step(model, token, cache, config)
    end = scene.length + n_drifted + appended
    logits = rectify(model, text[scene.length - wider : end], cache, n_drifted + wider)
    assert cache.length == end
    assert_exact(cache, exact, "rectified")
    assert_bounds_rebuilt(cache)
    dense_logits = model(torch.tensor([text[:end]]))[0, -1]
    assert relative(logits, dense_logits) <= EXACT, "logits after the last token of the window"


@share(2)
@given(scenes(), sparse_configs())
def test_steps_equal_the_oracle_under_given_tokens(scene, config):
    """The logits of every step, whatever the tokens."""
    model = scene.shape.model()
    generation = scene.start(model, config)
    logits = [feed(model, generation, config, token) for token in scene.given]
    resa, prompt = asdict(config), scene.text[: scene.length]
    forced = [*scene.given, 0]  # the oracle never feeds the last one
    expected = oracle.generate(weights(model), asdict(model.config), resa, prompt, scene.fed + 1, forced=forced)
    for step, (ours, theirs) in enumerate(zip(logits, expected.logits[1:], strict=True)):
        assert relative(ours, theirs) <= EXACT, f"step {step + 1}"


@pytest.mark.parametrize("interval", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_below_float64_rectified_caches_differ_like_chunked_prefills(dtype, interval):
    """Section 4: after a rectification at most twice the difference between dense prefills of other chunk sizes.

    The model is wider than elsewhere: sums of a few terms are rounded alike for one row and for many. Where all are
    (bfloat16 on a CPU with matrix units), no difference is allowed at all.
    """
    rounding, rectified, sparse = [], [], []
    for seed in range(3):
        scene = Scene(Shape(seed=seed, layers=3, head_dim=32, hidden=96), 40 - 7 * (seed % 2), 12)
        model = scene.shape.model(dtype)
        whole, _ = dense_cache(model, scene.text, 2)
        for chunk_size in {1, interval, scene.length}:
            rounding.append(drift(dense_cache(model, scene.text, 2, chunk_size=chunk_size)[0], whole).max())
        config = ReSAConfig(block_size=2, min_blocks=2, interval=interval)
        paper, never = replace(config, schedule="paper"), replace(config, interval=None)
        for own, measured in ((config, rectified), (paper, rectified), (never, sparse)):
            generation = scene.start(model, own)
            for token in scene.given:
                feed(model, generation, own, token)
            measured.append(drift(generation.cache, whole).max())
    assert max(rectified) <= 2 * max(rounding)
    assert min(sparse) > 2 * max(rounding), "without rectification the difference must stand out from rounding"


def test_no_drift_however_long():
    """Law 7 over 15 windows: each drifts until its rectification, which leaves none."""
    scene = Scene(Shape(seed=5, layers=3, context=256), 9, 120)
    model, config = scene.shape.model(), ReSAConfig(block_size=4, min_blocks=2, interval=8)
    exact, _ = dense_cache(model, scene.text, 4)
    generation = scene.start(model, config)
    for step, token in enumerate(scene.given, start=1):
        feed(model, generation, config, token)
        if step % 8 == 0:
            assert_exact(generation.cache, exact, f"step {step}")
        elif step % 8 == 7:
            assert drift(generation.cache, exact)[-1] > VISIBLE


# --- The same laws and law 8 through `generate`, on both decoders ---

SMALL, TINY = TRITON.shape, replace(TRITON.shape, kv_heads=2)
CONFIG = replace(TRITON.config, active_ratio=0.25, interval=4)
PAPER, NEVER = replace(CONFIG, schedule="paper"), replace(CONFIG, interval=None)
FIXED = [
    Run(replace(TINY, seed=20), (19, 5, 30), 20, CONFIG),
    Run(replace(SMALL, seed=22, qk_norm=True, group=5), (26, 40), 18, PAPER),
    Run(replace(SMALL, seed=24, qkv_bias=True), (30, 1), 20, NEVER),
    Run(replace(TINY, seed=26, layers=3), (19, 5), 13, replace(CONFIG, dense_layers=1)),
]
if COMPILED:
    VARIANTS = [{}, {"qk_norm": True}, {"qkv_bias": True, "group": 5}, {"kv_heads": 1, "head_dim": 64}, {"layers": 3}]
    # The last has so many sequences that tokens are appended on a stream of its own.
    LENGTHS = [(19, 5, 30), (130, 1), (12, 40, 7, 3, 25, 33, 18, 9, 21)]
    CYCLES = [replace(each, interval=f) for f in (1, 2, 4, 8, 32, None) for each in (CONFIG, PAPER)]
    FIXED += [
        Run(replace(TINY, seed=40 + i, **VARIANTS[i % 5]), LENGTHS[(i // 4 + i) % 3], 100, CYCLES[i % 12])
        for i in range(24)
    ]


@for_both_decoders(runs(), FIXED)
def test_generation_is_the_truth(decoder, run):
    """Tokens, w = (N − 1) mod f, a cache that is exact before the open window, and in it the truth's very drift."""
    model, prompts, config = decoder.model(run.shape), run.prompts(), run.config
    done, moved, parted = decoder.generate(model, prompts, run.n_tokens, config), [], 0
    for prompt, ours, truth in zip(prompts, done, decoder.truth(model, prompts, run.n_tokens, config), strict=True):
        parted += decoder.agreement(model, prompt, ours.tokens, truth.tokens, config) < run.n_tokens
        w = run.n_tokens - 1 if config.interval is None else (run.n_tokens - 1) % config.interval
        assert ours.n_drifted == truth.n_drifted == w
        text = [*prompt, *ours.tokens][:-1]  # the last token is never fed
        worst, allowed = assert_dense_before_the_window(decoder, model, text, ours)
        open_window = range(len(text) - w, len(text))
        if any(leaves_out(config, position + 1) for position in open_window):
            moved.append(worst[open_window.start :].max() > 100 * allowed)
        if ours.tokens == truth.tokens and drift(ours.cache, truth.cache).max() > allowed:
            assert decoder is TRITON, "another drift than the oracle's"
            tie = near_tie(model, prompt, truth.tokens[:-1], config)
            assert tie <= 1, f"other keys or values; the narrowest selection is {tie:.3g} allowances wide"
    assert parted <= COMPILED, "near ties are too many to be chance"
    # One sequence may say the same token for ever, whose values are the same for ever.
    assert any(moved) or not moved, "sparse steps were to move the cache visibly"


CORNERS = [
    replace(TRITON.config, interval=1),
    replace(TRITON.config, active_ratio=1, interval=4, schedule="paper"),
    replace(TRITON.config, active_ratio=1, interval=None, eight_bit_bounds=True),
]


@st.composite
def corners(draw):
    """Interval 1 under "fused"; every block, under any interval and schedule, when `min_blocks` has no say."""
    run = draw(runs())
    dense = replace(run.config, interval=1, schedule="fused")
    return replace(run, config=draw(st.sampled_from([dense, replace(run.config, active_ratio=1)])))


@for_both_decoders(corners(), [Run(SMALL, (25, 6), 6, corner) for corner in CORNERS])
def test_corners_are_dense(decoder, run):
    """Law 8, token for token and in all of the cache; coarser bounds can't change it."""
    model, prompts = decoder.model(run.shape), run.prompts()
    for prompt, done in zip(prompts, decoder.generate(model, prompts, run.n_tokens, run.config), strict=True):
        assert done.tokens == greedy_by_forward(model, prompt, run.n_tokens)
        worst, allowed = assert_dense_before_the_window(decoder, model, [*prompt, *done.tokens][:-1], done)
        assert (worst <= allowed).all()
