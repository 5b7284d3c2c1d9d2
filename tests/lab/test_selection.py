"""The mass that selection misses, measured again by plain loops; and the certified bound, never exceeded."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resa.reference import ReSAConfig, block_bounds, score_blocks
from resa.reference.lab import selection
from resa.reference.lab.scorers import in_eight_bits
from resa.reference.lab.selection import (
    Step,
    certified_bound,
    is_selected,
    left_out,
    measure_selection,
    scores_by_name,
)
from small_models import EXACT, Shape, dense_cache

SHAPE = Shape(seed=7)
CONFIG = ReSAConfig(block_size=4, active_ratio=0.2, min_blocks=2)
WAYS = ["pooled", "per-head", "8-bits", "sketch-1", "sketch-2", "mean-key", "newest", "mass"]
SEEDS = st.integers(0, 2**32 - 1)


def drawn(seed, batch=2, kv_heads=2, group=3, tokens=37, size=8, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    query = scale * torch.randn(batch, kv_heads * group, size, generator=generator, dtype=torch.float64)
    keys = torch.randn(batch, kv_heads, tokens, size, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, tokens + 1, (batch,), generator=generator, dtype=torch.int32)
    return Step(query, keys, lengths, 4)


def mass_by_loops(step):
    """Softmax of every head, summed over the tokens of every block: [B, Hkv, G, M]."""
    batch, kv_heads, tokens, size = step.keys.shape
    group = step.query.shape[1] // kv_heads
    mass = torch.zeros(batch, kv_heads, group, -(-tokens // 4), dtype=torch.float64)
    for s, length in enumerate(step.lengths.tolist()):
        for h in range(step.query.shape[1]):
            logits = step.keys[s, h // group, :length] @ step.query[s, h] * size**-0.5
            for token, share in enumerate(logits.softmax(dim=0).tolist()):
                mass[s, h // group, h % group, token // 4] += share
    return mass


@given(SEEDS)
def test_mass_is_a_softmax_by_blocks(seed):
    step = drawn(seed)
    torch.testing.assert_close(step.mass, mass_by_loops(step))


@given(SEEDS)
def test_ways_are_what_they_are_called(seed):
    step = drawn(seed)
    mass = mass_by_loops(step)
    found = scores_by_name(step, mass)
    assert list(found) == WAYS
    bounds = block_bounds(step.keys, step.lengths, 4)
    torch.testing.assert_close(found["pooled"], score_blocks(step.query, bounds, step.lengths, 4))
    torch.testing.assert_close(found["mass"], mass.mean(dim=2))
    rounded = score_blocks(step.query, in_eight_bits(bounds), step.lengths, 4)
    torch.testing.assert_close(found["8-bits"], rounded)
    assert (found["8-bits"] >= found["pooled"]).all(), "bounds that are rounded outward score higher"
    assert not torch.equal(found["8-bits"], found["pooled"])
    for s, length in enumerate(step.lengths.tolist()):
        for i in range(-(-length // 4)):
            block = step.keys[s, :, 4 * i : min(4 * i + 4, length)]  # [Hkv, tokens, D]
            for h in range(2):
                heads = step.query[s, 3 * h : 3 * h + 3]
                upper = max(float(torch.maximum(q * block[h].amin(0), q * block[h].amax(0)).sum()) for q in heads)
                assert found["per-head"][s, h, i] == pytest.approx(upper * 8**-0.5)
                mean = float(heads.mean(0) @ block[h].mean(0))
                assert found["mean-key"][s, h, i] == pytest.approx(mean * 8**-0.5)
        assert (found["newest"][s, 0].diff() > 0).all()


@given(SEEDS, st.sampled_from([0.1, 1.0, 8.0]))
def test_nothing_exceeds_the_certified_bound(seed, scale):
    """And it is zero exactly where every block is selected."""
    step = drawn(seed, scale=scale)
    mass = mass_by_loops(step)
    chosen = is_selected(scores_by_name(step, mass)["pooled"], step.lengths, CONFIG)
    left = mass.masked_fill(chosen[:, :, None], 0.0).sum(dim=-1)
    bound = certified_bound(step, chosen)
    assert (left <= bound + 1e-9).all()
    is_whole = chosen.sum(dim=-1) == ((step.lengths + 3) // 4)[:, None]  # [B, Hkv]
    assert (bound[is_whole] == 0).all()
    assert (bound[~is_whole] > 0).all()


@given(SEEDS, st.integers(-20, 20))
def test_eight_bits_round_outward_and_not_far(seed, exponent):
    """By at most an eighth of the bound, or of the least normal number there; what is such a number stays."""
    bounds = block_bounds(2.0**exponent * drawn(seed).keys.float(), torch.tensor([37, 9]), 4)
    rounded = in_eight_bits(bounds)
    finite = bounds.isfinite()
    assert torch.equal(rounded[~finite], bounds[~finite])
    assert (rounded[:, :, 0] <= bounds[:, :, 0]).all()
    assert (rounded[:, :, 1] >= bounds[:, :, 1]).all()
    largest = torch.where(finite, bounds, 0).abs().amax(dim=(2, 4), keepdim=True)
    moved = torch.where(finite, rounded - bounds, 0).abs()
    assert (moved <= torch.maximum(torch.where(finite, bounds, 0).abs() / 8, largest * 2.0**-15)).all()
    assert torch.equal(in_eight_bits(rounded), rounded)


@torch.no_grad()
def test_mass_is_left_out_of_what_a_cache_holds(monkeypatch):
    """Queries looked at over the shoulder of dense steps, their attention computed by plain loops."""
    monkeypatch.setattr(selection, "SLICE", 4)  # of the six steps
    model, document, n = SHAPE.model(), SHAPE.tokens(50), 6
    found = left_out(model, document, n, CONFIG)
    assert set(found) == {*WAYS, "bound"}
    cache, _ = dense_cache(model, document, 4)
    seen = []

    def attend(layer, query, keys, values):
        seen.append(query[0].transpose(0, 1))
        return model.ops.dense_attention(query, keys, values, torch.tensor([50], dtype=torch.int32))

    model.hidden_states(torch.tensor([document]), torch.arange(50)[None], attend)
    for layer, queries in enumerate(seen):
        for token in range(n):
            length = torch.tensor([50 - n + token + 1], dtype=torch.int32)
            step = Step(queries[50 - n + token][None], cache.keys[layer], length, 4)
            mass = mass_by_loops(step)
            for name, scores in scores_by_name(step, mass).items():
                chosen = is_selected(scores, length, CONFIG)
                left = mass.masked_fill(chosen[:, :, None], 0.0).sum(dim=-1).flatten()
                assert found[name][token, layer] == pytest.approx(left.numpy(), abs=EXACT)
                if name == "pooled":
                    assert found["bound"][token, layer] == pytest.approx(certified_bound(step, chosen).flatten())


def test_the_measurement_is_a_mean_over_layers_heads_and_steps():
    model, documents = SHAPE.model(), [SHAPE.tokens(length, stream) for stream, length in enumerate((50, 61, 70))]
    result = measure_selection(model, documents, 6, CONFIG)
    json.dumps(result, allow_nan=False)
    assert list(result["mass_left_out"]) == WAYS
    assert result["certified_bound"]["violations"] == 0
    found = [left_out(model, document, 6, CONFIG) for document in documents]
    for name, row in (*result["mass_left_out"].items(), ("bound", result["certified_bound"])):
        assert {each[name].shape for each in found} == {(6, 2, 6)}
        assert row["mean"] == pytest.approx(sum(each[name].mean() for each in found) / 3)
        layers = [sum(each[name][:, layer].mean() for each in found) / 3 for layer in range(2)]
        assert row["layers"] == pytest.approx(layers)
        assert 0 < row["mean"] < 1
        assert row["mean_95"][0] <= row["mean"] <= row["mean_95"][1]
    means = {name: row["mean"] for name, row in result["mass_left_out"].items()}
    assert means["mass"] == min(means.values())
    assert means["newest"] == max(means.values())


@pytest.mark.parametrize(
    ("n_tokens", "message"), [(0, "n_tokens: got 0"), (50, "documents: got 50 tokens; allowed: documents of 51 … 96")]
)
def test_bad_input_is_named(n_tokens, message):
    with pytest.raises(ValueError, match=message):
        measure_selection(SHAPE.model(), [SHAPE.tokens(50)], n_tokens, CONFIG)
