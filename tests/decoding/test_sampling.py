"""Choosing a token: both samplers on logits, and the randomness of a whole generation."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st

from decoders import COMPILED, REFERENCE, TRITON
from resa.reference import Sampling, generate
from strategies import DEVICE


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def draw_from(probabilities, sampling, n, seed=0):
    """n tokens sampled from given probabilities, by one sequence."""
    logits, own = torch.tensor(probabilities, dtype=torch.float64).log(), generator(seed)
    return [sampling.token(logits, own) for _ in range(n)]


def draw_at_once(probabilities, sampling, n):
    """One token for each of n sequences, by the sampler of batches."""
    sampler = pytest.importorskip("resa.fast.sampling", reason="triton comes for Linux only").Sampler
    choose = sampler(sampling, [generator(s) for s in range(n)], 1, torch.device(DEVICE))
    logits = torch.tensor([probabilities] * n, dtype=torch.float64, device=DEVICE).log()
    return choose(logits, torch.zeros(n, dtype=torch.int64, device=DEVICE)).tolist()


# --- From logits ---

FIVE = [0.1, 0.4, 0.3, 0.15, 0.05]
KEPT = [  # probabilities, top_p, top_k, and the tokens that may be chosen: worked by hand
    ([0.1, 0.6, 0.3], 0.5, None, {1}),  # 0.6 alone reaches a half
    ([0.1, 0.6, 0.3], 0.61, None, {1, 2}),
    ([0.1, 0.6, 0.3], 0.89, None, {1, 2}),
    ([0.1, 0.6, 0.3], 0.91, None, {0, 1, 2}),
    ([0.1, 0.6, 0.3], 1e-9, None, {1}),  # never nothing
    ([0.25] * 4, 0.5, None, {0, 1}),  # a half exactly; among equals the lower ids
    ([0.25] * 4, 0.51, None, {0, 1, 2}),
    ([0.25] * 4, 0.25, None, {0}),
    ([0.25] * 4, 1.0, None, {0, 1, 2, 3}),
    ([0.1] * 10, 0.8, None, set(range(8))),  # eight tenths add up to a little less than 0.8 in float64
    ([0.125, 0.25, 0.125, 0.25, 0.25], 0.75, None, {1, 3, 4}),
    ([0.125, 0.25, 0.125, 0.25, 0.25], 0.76, None, {0, 1, 3, 4}),
    ([0.0, 0.5, 0.5, 0.0], 1.0, None, {1, 2}),  # mass 1 is reached before the impossible tokens
    (FIVE, 1.0, 1, {1}),
    (FIVE, 1.0, 2, {1, 2}),
    ([0.0, 0.4, 0.3, 0.15, 0.15], 1.0, 3, {1, 2, 3}),  # of two equals the lower id
    (FIVE, 1.0, 9, {0, 1, 2, 3, 4}),  # more than there are: all
    (FIVE, 0.6, 2, {1, 2}),  # 0.4 of the 0.7 that two tokens have is less than 0.6 …
    (FIVE, 0.57, 2, {1}),  # … and more than 0.57
]


@pytest.mark.parametrize("draw", [draw_from, pytest.param(draw_at_once, marks=pytest.mark.fast)])
@pytest.mark.parametrize(("probabilities", "top_p", "top_k", "kept"), KEPT)
def test_the_shortest_prefix_of_the_likeliest_is_kept(draw, probabilities, top_p, top_k, kept):
    """600 draws miss a kept token of at least a twentieth of the mass with probability below 1e-13."""
    assert set(draw(probabilities, Sampling(1.0, top_p, top_k), 600)) == kept


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
    chosen = Sampling(temperature, top_p).token(logits, own)
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


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-300, 5e-324])
def test_a_vanishing_temperature_is_greedy(temperature):
    """Down to the smallest positive number: the largest logit wins, and it costs its uniform number all the same."""
    own = generator(1)
    for seed in range(20):
        logits = torch.randn(50, generator=generator(seed), dtype=torch.float64) * 5
        before = own.get_state()
        assert Sampling(temperature).token(logits, own) == int(logits.argmax())
        assert not torch.equal(own.get_state(), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_greedy_takes_the_lower_id_of_equals_and_no_randomness(dtype):
    logits = torch.tensor([0.0, 2.0, -1.0, 2.0, 2.0], dtype=dtype)
    own, greedy = generator(), Sampling()
    before, default = own.get_state(), torch.get_rng_state()
    assert greedy.token(logits, own) == 1
    assert Sampling(0, 0.5).token(logits.flip(0), None) == 0
    assert greedy.token(torch.zeros(1000, dtype=dtype), own) == 0
    assert torch.equal(own.get_state(), before)
    assert torch.equal(torch.get_rng_state(), default)


@pytest.mark.fast
@given(
    seed=st.integers(0, 2**32 - 1),
    vocabulary=st.integers(1, 40),
    temperature=st.sampled_from([0.0, 1.0, 0.3, 2.0, 1e-30]),
    top_p=st.sampled_from([1.0, 0.9, 0.5, 0.1, 1e-9]),
    top_k=st.sampled_from([None, None, 1, 2, 7, 100]),
    kind=st.sampled_from(["normal", "whole", "equal", "impossible"]),
)
def test_a_batch_is_sampled_like_its_sequences(seed, vocabulary, temperature, top_p, top_k, kind):
    """Over logits of every kind, ties among them: the n-th token of a sequence costs its n-th uniform number."""
    sampler = pytest.importorskip("resa.fast.sampling", reason="triton comes for Linux only").Sampler
    logits = 3 * torch.randn(3, vocabulary, generator=generator(seed))
    if kind == "whole":
        logits = logits.round()
    elif kind == "equal":
        logits = torch.zeros_like(logits)
    elif kind == "impossible":
        logits[:, 1::2] = -float("inf")
    logits, sampling = logits.to(DEVICE), Sampling(temperature, top_p, top_k)
    own, twins = ([generator(seed % 2**31 + s) for s in range(3)] for _ in range(2))
    choose = sampler(sampling, own, 5, logits.device)
    expected = [[sampling.token(row, twin) for _ in range(5)] for row, twin in zip(logits, twins, strict=True)]
    for step in range(5):
        n_chosen = torch.tensor([step, 4 - step, 2], device=DEVICE)
        assert choose(logits, n_chosen).tolist() == [expected[s][n] for s, n in enumerate(n_chosen.tolist())]
    choose.advance_generators([5, 5, 5])
    assert all(torch.equal(one.get_state(), other.get_state()) for one, other in zip(own, twins, strict=True))


@pytest.mark.fast
@pytest.mark.parametrize("vocabulary", [2, 7, 4096, 151_936])
def test_ties_of_the_argmax_go_to_the_lower_id(vocabulary):
    """Also where a reduction is shared among many programs."""
    sampler = pytest.importorskip("resa.fast.sampling", reason="triton comes for Linux only").Sampler
    choose = sampler(Sampling(), [None] * 8, 1, torch.device(DEVICE))
    logits = torch.randn(8, vocabulary, generator=generator()).clamp(max=0.0)
    tied = torch.randint(vocabulary, (8, 5), generator=generator(1))
    logits.scatter_(1, tied, 0.5)
    assert choose(logits.to(DEVICE), torch.zeros(8, dtype=torch.int64, device=DEVICE)).tolist() == tied.amin(1).tolist()


# --- A whole generation ---

WARM = Sampling(1.0, 0.8)


def sampled(decoder, n_tokens, sampling=WARM, prompts=None, by=None, changes=None, **options):
    """Tokens of every sequence; `by` another loop than the decoder's."""
    prompts, config = prompts or decoder.prompts(), replace(decoder.config, **(changes or {}))
    done = (by or decoder.generate)(decoder.model(), prompts, n_tokens, config, sampling, **options)
    return [each.tokens for each in done]


def own_generators(decoder):
    return [generator(s) for s in range(len(decoder.lengths))]


def test_greedy_generation_uses_no_randomness(decoder):
    own, shared = own_generators(decoder), generator(9)
    states, default = [g.get_state() for g in (*own, shared)], torch.get_rng_state()
    expected = sampled(decoder, 2, Sampling(), by=generate)
    for generators in (own, shared, None):
        assert sampled(decoder, 2, Sampling(), generators=generators) == expected
    assert all(torch.equal(g.get_state(), state) for g, state in zip((*own, shared), states, strict=True))
    assert torch.equal(torch.get_rng_state(), default)


@pytest.mark.parametrize("changes", [{}, {"interval": 1}, {"interval": None}], ids=str)
def test_one_uniform_number_per_token(decoder, changes):
    """From the sequence's own generator, also where a stop token cuts one short; the tokens are the reference's."""
    endless = sampled(decoder, 8, by=generate, changes=changes, generators=own_generators(decoder))
    own, default = own_generators(decoder), torch.get_rng_state()
    done = sampled(decoder, 8, changes=changes, generators=own, stop_tokens={endless[1][3]})
    assert len(done[1]) <= 4
    for s, tokens in enumerate(done):
        assert tokens == endless[s][: len(tokens)]
        twin = generator(s)
        for _ in tokens:
            torch.rand((), dtype=torch.float64, generator=twin)
        assert torch.equal(own[s].get_state(), twin.get_state()), f"{len(tokens)} tokens of sequence {s}"
    assert torch.equal(torch.get_rng_state(), default)
    assert endless != sampled(decoder, 8, Sampling(), by=generate, changes=changes), "they were to be sampled"


def test_one_generator_seeds_each_prompt_by_its_index():
    """Prompt i's tokens do not depend on how many follow, nor on what they are; another index, other tokens."""
    prompts = REFERENCE.prompts()

    def seeded(prompts, seed=4):
        return sampled(REFERENCE, 10, prompts=prompts, generators=generator(seed))

    three = seeded(prompts)
    assert seeded(prompts[:2]) == three[:2]
    assert seeded(prompts[:1]) == three[:1]
    assert seeded([prompts[0], prompts[0], prompts[2]])[::2] == three[::2]
    same_prompt = seeded([prompts[0]] * 3)
    assert same_prompt[1] != same_prompt[0] != same_prompt[2] != same_prompt[1]
    assert seeded(prompts, seed=5) != three
    assert seeded(prompts) == three


def test_without_a_generator_torchs_default_decides():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        first, second = (sampled(REFERENCE, 14) for _ in range(2))
        torch.manual_seed(3)
        assert sampled(REFERENCE, 14) == first != second


def test_top_k_and_top_p_reach_generation(decoder):
    """One token kept is the greedy one at every temperature; all kept, it is not."""
    greedy = sampled(decoder, 4, Sampling(), by=generate)
    assert sampled(decoder, 4, Sampling(3.0), generators=generator()) != greedy
    for sampling in (Sampling(3.0, top_k=1), Sampling(3.0, top_p=1e-6)):
        assert sampled(decoder, 4, sampling, generators=generator()) == greedy


@pytest.mark.fast
@pytest.mark.parametrize("kind", ["cpu", "default", *["cuda"] * COMPILED])
def test_the_triton_path_is_seeded_like_the_reference(kind):
    """By one generator for all prompts, or by torch's own; it is left where the reference leaves it."""
    found = []
    with torch.random.fork_rng():
        for by in (generate, TRITON.generate):
            torch.manual_seed(5)
            shared = None if kind == "default" else torch.Generator(kind).manual_seed(3)
            rows = sampled(TRITON, 6, Sampling(0.9, 0.95), by=by, generators=shared)
            found.append((rows, [each.get_state().tolist() for each in (torch.default_generator, shared) if each]))
    assert found[0] == found[1]
