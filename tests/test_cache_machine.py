"""Any order of passes over one cache: appended, stepped, rectified, truncated, started over, resized, poisoned.

A state machine drives a ragged cache through the public passes of a tiny model and keeps, beside it, only what the
cache was fed: the token ids of each sequence and how many of the newest may have drifted. After every step the
cache must be what those say.
"""

from dataclasses import asdict

import numpy as np
import oracle
import pytest
import torch
from hypothesis import note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from small_models import (
    EXACT,
    NAN,
    VISIBLE,
    Shape,
    assert_bounds_rebuilt,
    assert_untouched,
    dense_cache,
    drift,
    leaves_out,
    poison,
    share,
    snapshot,
    weights,
)

from resa.reference import ReSAConfig, prefill, rectify, sparse_step

CAPACITY = 40
masks = st.lists(st.booleans(), min_size=3, max_size=3)  # cut to the batch
garbage = st.sampled_from([NAN, float("inf"), float("-inf"), 1e300])


class CacheMachine(RuleBasedStateMachine):
    """`tokens[s]` is what sequence s holds; `open[s]` counts its newest tokens from the first sparse step on.

    A dense chunk appended to an open window attends to drifted tokens, so it lies in the window too.
    """

    @initialize(
        seed=st.integers(0, 2**32 - 1),
        batch=st.integers(1, 3),
        group=st.sampled_from([3, 1]),
        block_size=st.sampled_from([2, 1, 3, 4]),
        prompts=st.lists(st.integers(1, 14), min_size=3, max_size=3),
    )
    def begin(self, seed, batch, group, block_size, prompts):
        self.shape = Shape(seed=seed, group=group, qk_norm=seed % 2 == 1, qkv_bias=seed % 3 == 1)
        self.model = self.shape.model()
        self.config = ReSAConfig(block_size=block_size, active_ratio=0.2, min_blocks=2)
        self.batch, self.drawn = batch, 0
        self.cache = self.model.new_cache(batch, CAPACITY, block_size)
        self.tokens = [self.fresh(length) for length in prompts[:batch]]
        self.open = [0] * batch
        self.sparse_tokens = [set() for _ in range(batch)]  # positions whose own step left blocks out
        self.bounds_seen = 0
        prefill(self.model, self.tokens, self.cache)

    def fresh(self, count):
        self.drawn += 1
        return self.shape.tokens(count, stream=self.drawn)

    def chosen(self, mask, room=0):
        """The sequences of a mask that can still take `room` tokens."""
        return [s for s in range(self.batch) if mask[s] and len(self.tokens[s]) + room <= self.cache.capacity]

    def others_untouched(self, before, sequences):
        assert_untouched(self.cache, before, sorted(set(range(self.batch)) - set(sequences)))

    @rule(mask=masks, count=st.integers(1, 6), chunk_size=st.sampled_from([1, 2, 512]))
    def append_densely(self, mask, count, chunk_size):
        rows = self.chosen(mask, count)
        new = [self.fresh(count - s % 2) if s in rows else [] for s in range(self.batch)]  # ragged, some of them empty
        if not any(new):
            return
        before = snapshot(self.cache)
        prefill(self.model, new, self.cache, chunk_size=chunk_size)
        self.others_untouched(before, [s for s in rows if new[s]])
        for s in rows:
            self.tokens[s] += new[s]
            if self.open[s]:
                self.open[s] += len(new[s])

    @rule(mask=masks, steps=st.integers(1, 3))
    def step_sparsely(self, mask, steps):
        rows = self.chosen(mask, steps)
        active = torch.tensor([s in rows for s in range(self.batch)])
        before = snapshot(self.cache)
        for _ in range(steps):
            new = [self.fresh(1)[0] for _ in range(self.batch)]
            sparse_step(self.model, torch.tensor(new), self.cache, self.config, active=active)
            for s in rows:
                if leaves_out(self.config, len(self.tokens[s]) + 1):
                    self.sparse_tokens[s].add(len(self.tokens[s]))
                self.tokens[s].append(new[s])
                self.open[s] += 1
        self.others_untouched(before, rows)

    @rule(mask=masks, appended=st.integers(0, 2), wider=st.integers(0, 2))
    def rectify_windows(self, mask, appended, wider):
        """The open window, and perhaps some of the exact tokens before it, and new ones after it."""
        rows = self.chosen(mask, appended)
        width = [min(self.open[s] + wider, len(self.tokens[s])) for s in range(self.batch)]
        windows = [[] for _ in range(self.batch)]
        for s in rows:
            windows[s] = self.tokens[s][len(self.tokens[s]) - width[s] :] + self.fresh(appended)
        if not any(windows):
            return
        before = snapshot(self.cache)
        rectify(self.model, windows, self.cache, torch.tensor(width))
        self.others_untouched(before, rows)
        for s in rows:
            self.tokens[s] += windows[s][width[s] :]
            self.open[s] = 0
            self.sparse_tokens[s].clear()

    def keep(self, lengths):
        before = snapshot(self.cache)
        changed = [s for s in range(self.batch) if lengths[s] < len(self.tokens[s])]
        self.cache.truncate(torch.tensor(lengths, dtype=torch.int32))
        self.others_untouched(before, changed)
        for s, length in enumerate(lengths):
            self.open[s] = max(0, self.open[s] - (len(self.tokens[s]) - length))
            del self.tokens[s][length:]
            self.sparse_tokens[s] = {p for p in self.sparse_tokens[s] if p < length}

    @rule(mask=masks, dropped=st.integers(1, 7))
    def truncate(self, mask, dropped):
        self.keep([max(0, len(t) - dropped) if mask[s] else len(t) for s, t in enumerate(self.tokens)])

    @rule(mask=masks, length=st.integers(1, 9))
    def start_over(self, mask, length):
        """A new sequence in an old one's place."""
        self.keep([0 if mask[s] else len(tokens) for s, tokens in enumerate(self.tokens)])
        if any(mask[: self.batch]):
            new = [self.fresh(length) if mask[s] else [] for s in range(self.batch)]
            prefill(self.model, new, self.cache)
            for s, row in enumerate(new):
                self.tokens[s] += row

    @rule(value=garbage)
    def spoil_the_slack(self, value):
        poison(self.cache, value)

    @rule(spare=st.integers(0, 5))
    def resize(self, spare):
        old, before = self.cache, snapshot(self.cache)
        capacity = max(len(tokens) for tokens in self.tokens) + spare
        self.cache = old.resized(capacity)
        assert self.cache.capacity == capacity
        for stored in (self.cache.keys, self.cache.values, self.cache.bounds, self.cache.lengths):
            stored.add_(1)  # the copy has memory of its own
        assert_untouched(old, before, range(self.batch))
        self.cache = old.resized(capacity).resized(max(CAPACITY, capacity))

    @rule(order=st.lists(st.integers(0, 2), min_size=3, max_size=3))
    def select(self, order):
        """The sequences in another order, some perhaps twice and some no more."""
        rows = [s % self.batch for s in order[: self.batch]]
        old, before = self.cache, snapshot(self.cache)
        copy = old.selected(rows)
        for stored in (copy.keys, copy.values, copy.bounds, copy.lengths):
            stored.add_(1)  # the copy has memory of its own
        assert_untouched(old, before, range(self.batch))
        self.cache = old.selected(rows)
        self.tokens = [list(self.tokens[s]) for s in rows]
        self.open = [self.open[s] for s in rows]
        self.sparse_tokens = [set(self.sparse_tokens[s]) for s in rows]

    @precondition(lambda self: min(len(tokens) for tokens in self.tokens) < CAPACITY)
    @rule(shift=st.sampled_from([1, 2]))
    def refuse_a_gap(self, shift):
        before = snapshot(self.cache)
        start, counts = self.cache.lengths + shift, torch.ones_like(self.cache.lengths)
        with pytest.raises(ValueError, match="start"):
            self.model.dense_pass(torch.zeros(self.batch, 1, dtype=torch.int64), self.cache, start, counts)
        assert_untouched(self.cache, before, range(self.batch))

    @rule()
    def refuse_to_grow_by_truncating(self):
        before = snapshot(self.cache)
        with pytest.raises(ValueError, match="lengths"):
            self.cache.truncate(self.cache.lengths + 1)
        assert_untouched(self.cache, before, range(self.batch))

    @invariant()
    def lengths_count_the_tokens(self):
        assert self.cache.lengths.tolist() == [len(tokens) for tokens in self.tokens]
        assert self.cache.lengths.dtype == torch.int32

    @invariant()
    def bounds_are_those_of_the_keys(self):
        """Bit for bit as rebuilt, and as the oracle has them in one layer, in turn."""
        assert_bounds_rebuilt(self.cache)
        layer = self.bounds_seen % self.shape.layers
        self.bounds_seen += 1
        expected = oracle.block_bounds(
            self.cache.keys[layer].numpy(), self.cache.lengths.tolist(), self.cache.block_size
        )
        assert np.array_equal(self.cache.bounds[layer].numpy(), expected)

    @invariant()
    def only_open_windows_drift(self):
        if not all(self.tokens):
            present = [tokens or [0] for tokens in self.tokens]  # an empty sequence has nothing to compare
        else:
            present = self.tokens
        exact, _ = dense_cache(self.model, present, self.config.block_size)
        for s, tokens in enumerate(self.tokens):
            if tokens:
                worst = drift(self.cache, s, exact)
                assert (worst[: len(tokens) - self.open[s]] <= EXACT).all(), f"sequence {s}: {worst}"
                assert all(worst[position] > VISIBLE for position in self.sparse_tokens[s])

    def teardown(self):
        """Once per run: the exact part equals the oracle's dense pass as well."""
        if not hasattr(self, "tokens"):
            return
        for s, tokens in enumerate(self.tokens):
            kept = len(tokens) - self.open[s]
            note(f"sequence {s}: {kept} exact tokens of {len(tokens)}")
            if kept:
                expected = oracle.Cache.empty(asdict(self.model.config))
                oracle.dense_pass(weights(self.model), asdict(self.model.config), expected, tokens[:kept], 0)
                for layer in range(self.shape.layers):
                    for name in ("keys", "values"):
                        ours = getattr(self.cache, name)[layer, s, :, :kept].numpy()
                        theirs = getattr(expected, name)[layer]
                        assert np.abs(ours - theirs).max() <= EXACT * np.abs(theirs).max()


def test_truncate_keeps_no_hold_of_the_callers_tensor():
    """A caller that goes on counting in the tensor it passed must not move the cache's lengths."""
    shape = Shape()
    cache, _ = dense_cache(shape.model(), shape.prompts((6, 4)), 2)
    kept = cache.lengths - 1
    cache.truncate(kept)
    kept -= 1
    assert cache.lengths.tolist() == [5, 3]


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(share(2), stateful_step_count=20)
