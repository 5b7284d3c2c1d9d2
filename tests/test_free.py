"""Text that ways of decoding write by themselves, and what dense decoding makes of it."""

import pytest
import torch

from resa.reference import GPT, GPTConfig, ReSAConfig, generate, load_model, load_tokenizer
from resa.reference.demo import demo_prompt
from resa.reference.evals import free
from resa.reference.evals.free import measure_free, written_text

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
    own = [torch.Generator().manual_seed(index) for index in range(2)]
    found = written_text(model, prompts, 12, CONFIG, 1.0, own)
    again = [torch.Generator().manual_seed(index) for index in range(2)]
    texts = generate(model, prompts, 13, CONFIG, temperature=1.0, generator=again).tokens
    for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        log_probs = model(torch.tensor([prompt + text])).log_softmax(dim=-1)[0, len(prompt) : -1]
        wanted = torch.tensor(text[1:])
        torch.testing.assert_close(found["surprise"][row].float(), -log_probs[range(12), wanted], rtol=1e-3, atol=1e-3)
        likely = (log_probs.topk(3).indices == wanted[:, None]).any(dim=-1)
        assert found["likely"][row].bool().tolist() == likely.tolist()


def test_dense_decoding_agrees_with_itself_and_sparse_drifts(model, prompts):
    result = measure_free(model, prompts, 24, CONFIG, [8], temperature=0.0, batch=1, progress=False)
    ways = result["ways"]
    assert set(ways) == {"dense", "sparse", "ReSA f=8", "decode-only"}
    assert ways["dense"]["likely"] == 1  # greedy: the likeliest of all
    assert ways["dense"]["kl"] < 1e-5
    assert ways["dense"]["mean_drift"] < 1e-4
    assert ways["decode-only"]["mean_drift"] < 1e-4
    assert ways["decode-only"]["kl"] > 1e-3
    assert ways["sparse"]["mean_drift"] > ways["ReSA f=8"]["mean_drift"] > 0.01
    assert len(ways["sparse"]["by_position"]) == 1


def test_a_prompt_writes_the_same_in_any_batch_and_curves_are_its_parts(model, prompts, monkeypatch):
    monkeypatch.setattr(free, "WIDTH", 4)
    alone, together = (
        measure_free(model, prompts, 10, CONFIG, [8], batch=batch, progress=False)["ways"] for batch in (1, 2)
    )
    for name, way in together.items():
        assert way["surprise"] == pytest.approx(alone[name]["surprise"], rel=1e-3)
        assert [part["likely"] for part in way["by_position"]] == [
            part["likely"] for part in alone[name]["by_position"]
        ]
        surprise = [part["surprise"] for part in way["by_position"]]
        assert len(set(surprise)) == 3
        assert way["surprise"] == pytest.approx((4 * surprise[0] + 4 * surprise[1] + 2 * surprise[2]) / 10)


def test_all_blocks_write_what_dense_decoding_writes(model, prompts):
    config = ReSAConfig(block_size=16, active_ratio=1.0, interval=8, schedule="paper")
    ways = measure_free(model, prompts, 10, config, [8], progress=False)["ways"]
    for way in ways.values():
        assert way["surprise"] == pytest.approx(ways["dense"]["surprise"], abs=1e-4)
        assert way["likely"] == ways["dense"]["likely"]


@pytest.mark.parametrize(
    ("named", "changes"),
    [
        ("n_tokens", {"n_tokens": 0}),
        ("n_tokens", {"n_tokens": 29}),
        ("batch", {"batch": 0}),
        ("seed", {"seed": -1}),
        ("temperature", {"temperature": -1.0}),
        ("prompts", {"prompts": []}),
        ("interval", {"intervals": [0]}),
    ],
)
def test_bad_arguments_are_refused_by_name(named, changes):
    model = GPT(GPTConfig(16, 1, 2, 1, 8, 16, 16, context=32))
    arguments = {"prompts": [[1, 2, 3]], "n_tokens": 4, "intervals": [8]} | changes
    prompts, n, intervals = (arguments.pop(name) for name in ("prompts", "n_tokens", "intervals"))
    with pytest.raises(ValueError, match=named):
        measure_free(model, prompts, n, CONFIG, intervals, progress=False, **arguments)
