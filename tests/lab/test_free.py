"""Text that ways of decoding write by themselves, and what dense decoding makes of it."""

import pytest
import torch

from resa.reference import GPT, GPTConfig, ReSAConfig, Sampling, generate, load_model, load_tokenizer
from resa.reference.cli.demo import demo_prompt
from resa.reference.lab import free
from resa.reference.lab.free import measure_free, own_text

CONFIG = ReSAConfig(block_size=16, active_ratio=0.1, min_blocks=1, interval=8, schedule="paper")


@pytest.fixture(scope="module")
def model():
    return load_model()


@pytest.fixture(scope="module")
def prompts():
    tokens = load_tokenizer().encode_ordinary(demo_prompt()[1])
    return [tokens[:160], tokens[300:460]]


def test_text_is_measured_as_it_was_written(model, prompts):
    """The surprise is that of the tokens that `generate` gives, under one dense pass over them."""
    found = own_text(model, prompts[0], 12, CONFIG, 3)
    own = [torch.Generator().manual_seed(3)]
    (written,) = generate(model, prompts[:1], 13, CONFIG, Sampling(1.0), generators=own)
    log_probs = model(torch.tensor([prompts[0] + written.tokens])).log_softmax(dim=-1)[0, 160:-1]
    wanted = torch.tensor(written.tokens[1:])
    assert found["surprise"] == pytest.approx((-log_probs[range(12), wanted]).tolist(), rel=1e-3, abs=1e-3)
    likely = (log_probs.topk(3).indices == wanted[:, None]).any(dim=-1)
    assert found["likely"].tolist() == likely.tolist()


def test_dense_decoding_agrees_with_itself_and_sparse_drifts(model, prompts, monkeypatch):
    monkeypatch.setattr(free, "TEMPERATURE", 0.0)
    result = measure_free(model, prompts, 24, CONFIG, [8])
    ways = result["ways"]
    assert list(ways) == ["dense", "sparse", "ReSA f=8", "decode-only"]
    assert ways["dense"]["likely"] == 1  # greedy: the likeliest of all
    assert ways["dense"]["kl"] < 1e-5
    assert ways["dense"]["mean_drift"] == ways["decode-only"]["mean_drift"] == 0
    assert ways["decode-only"]["kl"] > 1e-3
    assert ways["sparse"]["mean_drift"] > ways["ReSA f=8"]["mean_drift"] > 0.01
    assert len(ways["sparse"]["by_position"]) == 1


def test_prompts_have_random_numbers_of_their_own_and_curves_are_parts(model, prompts, monkeypatch):
    monkeypatch.setattr(free, "WIDTH", 4)
    result = measure_free(model, prompts, 10, CONFIG, [8])
    ways = {"sparse": ReSAConfig(**{**vars(CONFIG), "interval": None}), "ReSA f=8": CONFIG}
    for name, config in ways.items():
        alone = [own_text(model, p, 10, config, i) for i, p in enumerate(prompts)]
        surprise = [each["surprise"] for each in alone]
        assert result["ways"][name]["surprise"] == pytest.approx(sum(each.mean() for each in surprise) / 2)
        parts = [part["surprise"] for part in result["ways"][name]["by_position"]]
        cuts = ((0, 4), (4, 8), (8, 10))
        assert parts == pytest.approx([sum(each[a:b].mean() for each in surprise) / 2 for a, b in cuts])


@pytest.mark.parametrize(
    ("named", "changes"),
    [
        ("n_tokens", {"n_tokens": 0}),
        ("n_tokens: got 29; allowed: < 29, for the context", {"n_tokens": 29}),
        ("documents", {"prompts": []}),
        ("interval", {"intervals": [0]}),
    ],
)
def test_bad_arguments_are_refused_by_name(named, changes):
    model = GPT(GPTConfig(16, 1, 2, 1, 8, 16, 16, context=32))
    arguments = {"prompts": [[1, 2, 3]], "n_tokens": 4, "config": CONFIG, "intervals": [8]}
    with pytest.raises(ValueError, match=named):
        measure_free(model, **{**arguments, **changes})
