"""Batches in the porting kit: no step is a close call, requests end where they are meant to, faults are told."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from make_vectors import CLEARANCE, MARGIN, clearance
from port_mistakes import OF_BATCHES, PORTS, Some, edited
from resa.conformance import kit, parts
from resa.conformance.vectors import load_vectors, part_of

BATCHES = [entry for entry in parts.part_entries() if entry["operation"] == "decode_batch"]
MISTAKES = [*OF_BATCHES]


@pytest.fixture(scope="module")
def vectors():
    """Batches alone."""
    return Some(load_vectors(), BATCHES, {})


@pytest.fixture(scope="module")
def model(vectors):
    return part_of(vectors.weights, parts.BATCH_MODEL), vectors.manifest["models"][parts.BATCH_MODEL]


def decoded(entry, model):
    """Requests of a case, and what they leave."""
    requests = parts.requests_of(entry["case"], model[1]["vocab_size"])
    return requests, parts.decoded_alone(model, requests, entry["config"])


# The cases.


def watch(monkeypatch):
    """Note the relative lead of every token and of every selection, and how far sketches are from thresholds."""
    leads, rooms, exact = [], [1.0], parts.exact

    def note(first, second):
        leads.append((first - second) / max(abs(first), abs(second)))

    def selected(scores, lengths, config, select=exact.select_blocks):
        indices = select(scores, lengths, config)
        for score, row in zip(scores[0], indices[0], strict=True):
            older = range(-(-lengths[0] // config["block_size"]) - config["local_blocks"])
            others, chosen = ([score[i] for i in older if (i in row) == is_in] for is_in in (False, True))
            if others and chosen:
                note(min(chosen), max(others))
        return indices

    def sketched(keys, bits, sketch=exact.sketch_keys):
        rooms.append(clearance(keys, bits))
        return sketch(keys, bits)

    def forward(model, *arguments, forward=exact.Model.forward):
        logits = forward(model, *arguments)
        note(*np.sort(logits)[:-3:-1])
        return logits

    monkeypatch.setattr(exact, "select_blocks", selected)
    monkeypatch.setattr(exact, "sketch_keys", sketched)
    monkeypatch.setattr(exact.Model, "forward", forward)
    return leads, rooms


@pytest.mark.parametrize("entry", BATCHES, ids=lambda entry: entry["case"])
def test_no_step_of_a_batch_is_a_close_call(entry, model, monkeypatch):
    leads, rooms = watch(monkeypatch)
    decoded(entry, model)
    assert len(leads) > 50
    assert min(leads) > MARGIN
    assert min(rooms) > CLEARANCE


def test_requests_stop_where_they_are_meant_to(model):
    """At a stop token before N; where none is chosen, it stands in the prompt, and others choose it."""
    n_stopped = 0
    for entry in BATCHES:
        requests, results = decoded(entry, model)
        for i, (request, result) in enumerate(zip(requests, results, strict=True)):
            stops, tokens = {*request["stop_tokens"]}, result["tokens"]
            if stops & {*tokens}:
                assert len(tokens) < request["max_new_tokens"]
                n_stopped += 1
                continue
            assert len(tokens) == request["max_new_tokens"]
            others = {token for at, other in enumerate(results) if at != i for token in other["tokens"]}
            assert stops <= {*request["prompt"]} & others
    assert n_stopped == 4


def test_open_windows_have_drifted(model):
    """Where there are blocks to leave out; so a rectification too many or too few shows."""
    n_drifted = 0
    for entry in BATCHES:
        for request, result in zip(*decoded(entry, model), strict=True):
            w = result["window"]
            if not w or request["resumes"] is not None:
                continue
            text = [*request["prompt"], *result["tokens"][:-1]]
            dense = parts.exact.decode_trace(*model, text, entry["config"] | {"max_new_tokens": 1})[0]["keys"]
            drift = np.abs(result["keys"] - dense).max(axis=(0, 1, 3))  # [T]
            assert drift[:-w].max() < 1e-9
            n_drifted += drift[-w:].max() > 100 * parts.DRIFT
    assert n_drifted >= 10


def test_turns_resume_what_has_ended(model):
    for entry in BATCHES:
        requests = parts.requests_of(entry["case"], model[1]["vocab_size"])
        resumed = Counter(each["resumes"] for each in requests if each["resumes"] is not None)
        assert max(resumed.values(), default=1) == 1
        for i, request in enumerate(requests):
            if request["resumes"] is not None:
                before = requests[request["resumes"]]
                assert request["resumes"] < i
                assert before["arrival"] + max(0, before["max_new_tokens"] - 1) < request["arrival"]


# Ports.


def first_failure(port, vectors):
    return next(iter(kit.first_failures(kit.check_port(port, vectors))), None)


@pytest.mark.usefixtures("remembered")
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_its_law(vectors, name):
    laws, old, new = OF_BATCHES[name]
    row = first_failure(edited(PORTS["numpy_port.py"].read_text(), old, new), vectors)
    assert row.law in ((laws,) if isinstance(laws, str) else laws)


@pytest.mark.parametrize(
    ("change", "law", "said"),
    [
        (lambda results: results[:-1], "4.8 batches", "4 results for 5 requests"),
        (lambda results: [each | {"window": 0.5} for each in results], parts.BY_ITSELF, "'float' object cannot be"),
        (lambda results: [{"tokens": each["tokens"]} for each in results], parts.BY_ITSELF, "KeyError: 'keys'"),
        (lambda results: [each | {"window": 0} for each in results], "4.3 window", "w is 0 instead of 2"),
        (lambda results: [each | {"keys": 0 * each["keys"]} for each in results], "law 7 bounded drift", "rows [0, 1,"),
    ],
)
def test_results_that_are_wrong_alone_as_well(vectors, change, law, said):
    exact = parts.exact
    port = SimpleNamespace(decode_batch=lambda *arguments: change(exact.decode_batch(*arguments)))
    row = first_failure(port, vectors)
    assert (row.case, row.law, said in row.says) == ("join", law, True), row.says
