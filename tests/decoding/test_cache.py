"""Any order of passes over one cache: appended, stepped, rectified, truncated, started over, moved, poisoned.

A state machine drives a cache through the public passes of a tiny model and keeps, beside it, only what the cache was
fed: the token ids, and how many of the newest may have drifted. After every step the cache must be what those say.
"""

from copy import deepcopy

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import oracle
from resa.reference import Generation, ReSAConfig, prefill, rectify, sparse_step
from resa.reference.generate import dense_pass
from resa.reference.requests import open_caches
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
    relative,
    share,
)

CAPACITY = 40
garbage = st.sampled_from([NAN, float("inf"), float("-inf"), 1e300])


class CacheMachine(RuleBasedStateMachine):
    """`tokens` is what the cache holds; `open` counts its newest tokens from the first sparse step on.

    A dense chunk appended to an open window attends to drifted tokens, so it lies in the window too.
    """

    @initialize(
        seed=st.integers(0, 2**32 - 1),
        group=st.sampled_from([3, 1]),
        block_size=st.sampled_from([2, 1, 3, 4]),
        sketch_bits=st.sampled_from([None, 2, 1]),
        length=st.integers(1, 14),
    )
    def begin(self, seed, group, block_size, sketch_bits, length):
        self.shape = Shape(seed=seed, group=group, qk_norm=seed % 2 == 1, qkv_bias=seed % 3 == 1)
        self.model = self.shape.model()
        selected = {} if sketch_bits is None else {"selection": "sketch", "sketch_bits": sketch_bits}
        self.config = ReSAConfig(block_size=block_size, active_ratio=0.2, min_blocks=2, **selected)
        self.cache = self.model.new_cache(CAPACITY, block_size, sketch_bits)
        self.drawn = self.open = self.bounds_seen = 0
        self.tokens = self.fresh(length)
        self.sparse_tokens = set()  # positions whose own step left blocks out
        prefill(self.model, self.tokens, self.cache)

    def fresh(self, count):
        self.drawn += 1
        return self.shape.tokens(count, stream=self.drawn)

    def room(self):
        return self.cache.capacity - len(self.tokens)

    @precondition(lambda self: self.room() > 0)
    @rule(count=st.integers(1, 6), chunk_size=st.sampled_from([1, 2, 512]))
    def append_densely(self, count, chunk_size):
        new = self.fresh(min(count, self.room()))
        logits = prefill(self.model, new, self.cache, chunk_size=chunk_size)
        self.tokens += new
        if self.open:
            self.open += len(new)
        else:
            assert relative(logits, self.model(torch.tensor([self.tokens]))[0, -1]) <= EXACT

    @precondition(lambda self: self.room() > 0)
    @rule(steps=st.integers(1, 3))
    def step_sparsely(self, steps):
        for token in self.fresh(min(steps, self.room())):
            sparse_step(self.model, token, self.cache, self.config)
            if leaves_out(self.config, len(self.tokens) + 1):
                self.sparse_tokens.add(len(self.tokens))
            self.tokens.append(token)
            self.open += 1

    @rule(appended=st.integers(0, 2), wider=st.integers(0, 2))
    def rectify_window(self, appended, wider):
        """The open window, and perhaps some of the exact tokens before it, and new ones after it."""
        width = min(self.open + wider, len(self.tokens))
        new = self.fresh(min(appended, self.room()))
        window = self.tokens[len(self.tokens) - width :] + new
        if window:
            rectify(self.model, window, self.cache, width)
            self.tokens += new
            self.open = 0
            self.sparse_tokens.clear()

    @rule(dropped=st.integers(1, 7), is_all=st.booleans())
    def truncate(self, dropped, is_all):
        """A few tokens or all; a new sequence then takes the old one's place."""
        length = 0 if is_all else max(0, len(self.tokens) - dropped)
        self.cache.truncate(length)
        self.open = max(0, self.open - (len(self.tokens) - length))
        del self.tokens[length:]
        self.sparse_tokens = {position for position in self.sparse_tokens if position < length}

    @rule(value=garbage)
    def spoil_the_slack(self, value):
        poison(self.cache, value)

    @precondition(lambda self: self.open < len(self.tokens))
    @rule()
    def move(self):
        """Resuming: the exact part goes to a cache of its own, the rest is to be fed there."""
        old, before = self.cache, deepcopy(self.cache)
        kept = len(self.tokens) - self.open
        pending = self.fresh(1)
        resume = Generation(self.tokens[kept:] + pending, old, self.open)
        [(new, feed)] = open_caches(self.model, [[]], CAPACITY - len(self.tokens), self.config, resume)
        assert feed == self.tokens[kept:] + pending
        assert new.length == kept
        for stored in (new.keys, new.values, new.bounds, new.codes, new.scales):
            if stored is not None:
                stored.add_(1)  # the copy has memory of its own
        assert_untouched(old, before)
        [(self.cache, feed)] = open_caches(self.model, [[]], CAPACITY - len(self.tokens), self.config, resume)
        self.tokens, self.open = self.tokens[:kept], 0
        self.sparse_tokens.clear()

    @precondition(lambda self: self.room() > 0)
    @rule(shift=st.sampled_from([1, 2]))
    def refuse_a_gap(self, shift):
        before = deepcopy(self.cache)
        with pytest.raises(ValueError, match="start"):
            dense_pass(self.model, [0], self.cache, self.cache.length + shift)
        with pytest.raises(ValueError, match="length"):
            self.cache.truncate(self.cache.length + shift)
        assert_untouched(self.cache, before)

    @invariant()
    def the_length_counts_the_tokens(self):
        assert self.cache.length == len(self.tokens)

    @invariant()
    def bounds_are_those_of_the_keys(self):
        """Bit for bit as rebuilt, and as the oracle has them in one layer, in turn."""
        assert_bounds_rebuilt(self.cache)
        if self.cache.bounds is None:
            return
        layer = self.bounds_seen % self.shape.layers
        self.bounds_seen += 1
        keys = self.cache.keys[layer].numpy()
        expected = oracle.block_bounds(keys, [self.cache.length], self.cache.block_size)
        assert np.array_equal(self.cache.bounds[layer].numpy(), expected)

    @invariant()
    def only_the_open_window_drifts(self):
        if self.tokens:
            exact, _ = dense_cache(self.model, self.tokens, self.config.block_size)
            worst = drift(self.cache, exact)
            assert (worst[: len(self.tokens) - self.open] <= EXACT).all(), worst
            assert all(worst[position] > VISIBLE for position in self.sparse_tokens)


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(share(1), stateful_step_count=20)
