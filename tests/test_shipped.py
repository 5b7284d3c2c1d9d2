"""The checkpoint that comes with the package: what it is, what it answers, and the laws on real weights and text."""

import hashlib
import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from resa.reference import ReSAConfig, generate, load_model, load_tokenizer, prefill, rectify, sparse_step
from resa.reference.checkpoint import shipped_checkpoint
from resa.reference.corpus import held_out_library
from resa.reference.demo import DEMO_MODULE, demo_prompt

PROMPT = "import os\n\n\ndef read(path):\n    with open("


@pytest.fixture(scope="module")
def model():
    return load_model()


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="module")
def record():
    return json.loads((shipped_checkpoint().parent / "record.json").read_text())


def test_the_record_describes_the_file(model, record):
    assert hashlib.sha256(shipped_checkpoint().read_bytes()).hexdigest() == record["sha256"]
    assert {**record["runs"][-1]["model"], "rope_scaling": None} == asdict(model.config)  # a later field
    assert record["runs"][-1]["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert all(run["command"].startswith("resa train ") for run in record["runs"])
    assert sum(run["tokens_seen"] for run in record["runs"]) == record["tokens_seen"]


RESULTS = Path(__file__).parent.parent / "docs" / "results"


def test_the_results_are_of_this_file_and_meet_what_was_asked_of_it(record):
    language, fidelity = (json.loads((RESULTS / f"{name}.json").read_text()) for name in ("language", "fidelity"))
    assert language["checkpoint_sha256"] == fidelity["checkpoint_sha256"] == record["sha256"]
    assert language["bits_per_byte"] <= 1.00
    assert language["fewer_bits_than_xz"] >= 0.40
    assert language["position"]["difference_95"][1] < 0  # late in a document it is better than early
    assert language["position"]["context_gain_95"][1] < 0
    assert language["lookups"]["accuracy"]["4096"]["dense"] >= 0.90
    variants = fidelity["variants"]
    losses = [variants[name]["kl"] for name in ("decode-only", "ReSA f=8", "ReSA f=32", "ReSA f=128", "sparse")]
    assert losses == sorted(losses)
    assert variants["ReSA f=32"]["gain_over_sparse_95"][0] > 0
    assert variants["sparse"]["drift_after_rectification"] is None
    assert max(variants[name]["drift_after_rectification"] for name in ("ReSA f=8", "ReSA f=32")) < 1e-4


def test_the_models_are_small_enough_to_ship():
    sizes = [path.stat().st_size for path in shipped_checkpoint().parent.iterdir()]
    assert max(sizes) <= 12_000_000
    assert sum(sizes) <= 19_500_000


def test_the_record_describes_the_model_of_programs():
    path = shipped_checkpoint("carrying")
    record = json.loads(path.with_suffix(".json").read_text())
    assert hashlib.sha256(path.read_bytes()).hexdigest() == record["sha256"]
    first, second, third = record["runs"]
    assert {**third["model"], "rope_scaling": None} == asdict(load_model(path).config)
    assert first["init_sha256"] == hashlib.sha256(shipped_checkpoint().read_bytes()).hexdigest()
    assert sum(run["tokens_seen"] for run in record["runs"]) == record["tokens_seen"]
    assert [run["train"]["sparse_share"] for run in (first, second, third)] == [0, 1, 1]
    assert all(run["command"].startswith("resa train ") for run in record["runs"])


def test_the_record_describes_the_model_of_questions():
    path, base = shipped_checkpoint("retrieval"), shipped_checkpoint("carrying")
    record = json.loads(path.with_suffix(".json").read_text())
    assert hashlib.sha256(path.read_bytes()).hexdigest() == record["sha256"]
    assert sum(run["tokens_seen"] for run in record["runs"]) == record["tokens_seen"]
    first, *_, last = record["runs"]
    assert first["init_sha256"] == hashlib.sha256(base.read_bytes()).hexdigest()
    assert {run["train"]["part"] for run in record["runs"] if "lost" not in run} == {"attention"}
    inits = [run["command"].split("--init ")[1].split()[0] for run in record["runs"][1:]]
    assert inits == [f"runs/{run['name']}/model.safetensors" for run in record["runs"][:-1]]
    asked, given = (dict(load_model(each).named_parameters()) for each in (path, base))
    for name, weight in asked.items():
        assert torch.equal(weight, given[name]) == (".attn." not in name), name
    assert {**last["model"], "context": 16384} == asdict(load_model(path).config)


def test_the_results_about_programs_are_of_that_model():
    record = json.loads(shipped_checkpoint("carrying").with_suffix(".json").read_text())
    for name in ("carried", "carried_fused", "carried_scores", "carried_small", "written", "drift_carrying"):
        result = json.loads((RESULTS / "evidence" / f"{name}.json").read_text())
        assert result["checkpoint_sha256"] == record["sha256"]


def test_its_logits_are_pinned(model, tokenizer):
    """Float32 sums round by about 1e-6 of logits near 10 and differ between processors: 1e-3 leaves room for both."""
    tokens = tokenizer.encode_ordinary(PROMPT)
    assert tokens == [728, 1204, 469, 319, 1729, 40, 730, 315, 264, 955, 2545, 40]
    with torch.no_grad():
        logits = model(torch.tensor([tokens]))[0, -1]
    top = logits.topk(8)
    assert top.indices.tolist() == [730, 515, 898, 259, 102, 2329, 1964, 3296]
    expected = [14.1062, 10.4474, 9.4502, 8.925, 8.4943, 8.3481, 8.1191, 7.8075]
    assert top.values.tolist() == pytest.approx(expected, abs=1e-3)
    assert float(logits.logsumexp(0)) == pytest.approx(14.1724, abs=1e-3)


def test_it_has_learned_python(model, tokenizer):
    generation = generate(model, [tokenizer.encode_ordinary(PROMPT)], 16)
    assert tokenizer.decode(generation.tokens[0]).startswith('path, "rb") as f:\n        return f.read()')


def test_the_file_of_the_demo_is_held_out(tokenizer):
    _, text = demo_prompt()
    assert DEMO_MODULE in [document.name for document in held_out_library()]
    assert len(tokenizer.encode_ordinary(text)) > 4096


def test_rectification_is_exact_on_real_weights_and_text(tokenizer):
    """Law 6 where it matters: held-out code, trained weights, selection that leaves most blocks out."""
    model = load_model(dtype=torch.float64)
    tokens = tokenizer.encode_ordinary(demo_prompt()[1])[:800]
    prompt, window = tokens[:-12], tokens[-12:]
    config = ReSAConfig(min_blocks=4)
    exact, cache = (model.new_cache(1, len(tokens), config.block_size) for _ in range(2))
    prefill(model, [tokens], exact)
    prefill(model, [prompt], cache)
    for token in window:
        sparse_step(model, torch.tensor([token]), cache, config)
    before = (cache.keys - exact.keys).norm() / exact.keys[:, :, :, -12:].norm()
    rectify(model, [window], cache, torch.tensor([len(window)]))
    after = (cache.keys - exact.keys).norm() / exact.keys[:, :, :, -12:].norm()
    assert before > 1e-3
    assert after < 1e-9
    torch.testing.assert_close(cache.values, exact.values, rtol=0, atol=1e-9 * float(exact.values.abs().max()))


def test_held_out_code_costs_few_bits(model, tokenizer):
    """Far below the eight bits of a byte; the whole measurement stands in docs/results/language.json."""
    text = demo_prompt()[1]
    tokens = torch.tensor([tokenizer.encode_ordinary(text)[:2048]])
    with torch.no_grad():
        losses = torch.nn.functional.cross_entropy(model(tokens[:, :-1])[0], tokens[0, 1:], reduction="sum")
    size = len(tokenizer.decode(tokens[0, 1:].tolist()).encode())
    assert float(losses) / math.log(2) / size < 1.2
