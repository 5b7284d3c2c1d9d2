"""The two decoders that a law of decoding is stated for: the reference, and the Triton path.

The reference decodes in float64, where a law holds to 1e-9; its truth is the oracle's. The Triton path decodes in
float32, interpreted or compiled; its truth is the reference, prompt by prompt. What rounding may do to it is measured:
keys and values may be twice as far from float64's dense prefill as dense prefill in float32 is, the worst of several
chunkings, and where tokens part, float64 must show a near tie.
"""

from contextlib import nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from importlib import import_module

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracle
from backends import poisoned_memory
from near_ties import agreement
from resa import reference
from resa.reference import Generation, ReSAConfig
from small_models import EXACT, Shape, assert_bounds_rebuilt, dense_cache, drift, shapes, share, sparse_configs, weights
from strategies import DEVICE

COMPILED = DEVICE == "cuda"


@dataclass(frozen=True)
class Run:
    """A model, a batch of prompts, and how to go on from them."""

    shape: Shape
    lengths: tuple[int, ...]  # of the prompts
    n_tokens: int
    config: ReSAConfig

    def prompts(self):
        return self.shape.prompts(self.lengths)

    def __str__(self):
        config, lengths = self.config, "x".join(map(str, self.lengths))
        return f"{config.interval}-{config.schedule}-{self.shape.seed}-{lengths}"


@st.composite
def runs(draw, max_tokens=14):
    """Runs for the reference; one prompt at least is so long that all of `sparse_configs` leave blocks out."""
    first = draw(st.sampled_from([17, 13, 24]))
    others = draw(st.lists(st.sampled_from([1, 2, 5, 9]), max_size=1))
    config = draw(sparse_configs())
    config = replace(config, interval=draw(st.sampled_from([config.interval, config.interval, None])))
    return Run(draw(shapes()), (first, *others), draw(st.integers(1, max_tokens)), config)


class ReferenceDecoder:
    """One sequence after another, in float64."""

    device, dtype = torch.device("cpu"), torch.float64
    shape, lengths = Shape(seed=11), (19, 1, 8)
    config = ReSAConfig(block_size=2, min_blocks=2, interval=3)

    def model(self, shape=None):
        return (shape or self.shape).model(self.dtype).to(self.device)

    def prompts(self):
        return self.shape.prompts(self.lengths)

    def generate(self, *arguments, **options):
        return reference.generate(*arguments, **options)

    def sketch_keys(self, *arguments):
        return reference.sketch_keys(*arguments)

    def truth(self, model, prompts, n_tokens, config):
        """The oracle's result, as `Generation`s."""
        return [self._truth(model, prompt, n_tokens, config) for prompt in prompts]

    def _truth(self, model, prompt, n_tokens, config):
        done = oracle.generate(weights(model), asdict(model.config), asdict(config), prompt, n_tokens)
        cache = model.new_cache(done.cache.length, config.block_size, config.kept_bits)
        for name in ("keys", "values"):
            for layer, array in enumerate(getattr(done.cache, name)):
                getattr(cache, name)[layer, 0] = torch.from_numpy(array)
        return Generation(done.tokens, replace(cache, length=done.cache.length), done.w)

    def exact(self, model, text, block_size):
        """The cache of dense prefill in float64, and how far from it an exact one may be."""
        return dense_cache(model, text, block_size)[0], EXACT

    def agreement(self, model, prompt, found, expected, config):
        """Number of tokens that are the expected ones: all of them."""
        assert found == expected
        return len(found)


class TritonDecoder(ReferenceDecoder):
    """All sequences at once, in float32."""

    device, dtype = torch.device(DEVICE), torch.float32
    # One KV head: half the work. With tied embeddings the model would say one token over and over.
    shape, lengths = Shape(seed=36, kv_heads=1, head_dim=16, hidden=32, context=512, tied=False), (25, 6)
    config = ReSAConfig(block_size=8, min_blocks=2, interval=3)  # leaves blocks out from 17 tokens on
    chunks = (1, 7, 256)  # tokens per dense pass of the prefills that rounding is measured on

    def generate(self, *arguments, **options):
        """Decode where memory that kernels allocate holds garbage. A graph would write the garbage anew."""
        with nullcontext() if COMPILED else poisoned_memory():
            return import_module("resa.fast.generate").generate(*arguments, **options)

    def sketch_keys(self, *arguments):
        return import_module("resa.fast").sketch_keys(*arguments)

    def truth(self, model, prompts, n_tokens, config):
        return reference.generate(model, prompts, n_tokens, config)

    def exact(self, model, text, block_size):
        exact, _ = dense_cache(deepcopy(model).double(), text, block_size)
        chunked = (dense_cache(model, text, block_size, chunk_size=size)[0] for size in self.chunks)
        return exact, 2 * max(float(drift(cache, exact).max()) for cache in chunked)

    def agreement(self, model, prompt, found, expected, config):
        return agreement(model, prompt, found, expected, config)


REFERENCE, TRITON = ReferenceDecoder(), TritonDecoder()


def for_both_decoders(drawn, fixed, part=2):
    """Make a test of `statement(decoder, run)`: the reference decodes drawn runs, the Triton path the `fixed` ones.

    Those are fixed because a measured allowance for rounding is exceeded by chance, once in many runs.
    """

    def decorate(statement):
        def on_the_reference(run):
            statement(REFERENCE, run)

        on_the_reference.__qualname__ = statement.__name__  # Hypothesis keeps failures under this name
        on_the_reference = share(part)(given(drawn)(on_the_reference))

        @pytest.mark.parametrize(
            "run",
            [
                pytest.param(None, id="drawn"),
                *(pytest.param(run, id=str(run), marks=pytest.mark.fast) for run in fixed),
            ],
        )
        def test(run):
            if run is None:
                return on_the_reference()
            pytest.importorskip("triton", reason="triton comes for Linux only")
            return statement(TRITON, run)

        test.__doc__ = statement.__doc__
        return test

    return decorate


def assert_dense_before_the_window(decoder, model, text, done):
    """The cache holds `text`; what the open window does not cover is dense prefill's (law 6); bounds follow (law 2).

    Returns the drift of every token, and the drift that an exact token may have.
    """
    exact, allowed = decoder.exact(model, text, done.cache.block_size)
    assert done.cache.length == len(text)
    worst, kept = drift(done.cache, exact), len(text) - done.n_drifted
    assert (worst[:kept] <= allowed).all(), f"drift before the window: {worst[:kept].max():.2g} of {allowed:.2g}"
    assert_bounds_rebuilt(done.cache, decoder.sketch_keys)
    return worst, allowed
