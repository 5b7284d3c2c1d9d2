"""Questions about a long text: one right answer each, found by reading alone; and what decoding makes of them."""

import hashlib
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resa.reference import GPT, ReSAConfig, generate, load_tokenizer
from resa.reference.lab import retrieval
from resa.reference.lab.parallel import exact_stream
from resa.reference.lab.retrieval import FAMILIES, GAP, LEAST, STARTS, Asked, ask, marks, measure_retrieval
from small_models import Shape, decoded_along

TOKENIZER = load_tokenizer()
CONFIG = ReSAConfig(block_size=4, active_ratio=0.1, min_blocks=2, interval=6, schedule="paper")
family_names = st.sampled_from(list(FAMILIES))


def solve(context, question):
    """Read the answers off the text: nothing is known but the two texts."""
    if path := re.match(r"The parcel (\d+) was sent", question):
        (name,) = re.findall(rf"The parcel {path[1]} was sent to (\w+)\.", context)
        hands = [name]
        while step := re.findall(rf"\b{hands[-1]} sent the parcel to (\w+)\.", context):
            hands += step
        return hands
    if several := re.match(r"The secret numbers of (\w+)", question):
        return re.findall(rf"A secret number of {several[1]} is (\d+)\.", context)
    if names := re.findall(r"The secret number of (\w+) is", question):
        return [number for name in names for number in re.findall(rf"number of {name} is (\d+)\.", context)]
    words = re.findall(r"\w+", context)
    third, fourth = Counter(words).most_common(4)[2:]
    assert third[1] > fourth[1], "three words are the most frequent"
    frequent = [word for word, _ in Counter(words).most_common(3)]
    return sorted(frequent, key=words.index) if "in the order of the list" in question else frequent


def exchanged(text, one, other):
    """The text with two words in each other's places."""
    return re.sub(rf"\b({one}|{other})\b", lambda found: other if found[0] == one else one, text)


def question_of(family, length=600, index=0):
    return ask(TOKENIZER, family, length, index)[0]


# Questions.


@given(family=family_names, n_words=st.integers(LEAST, 6000), seed=st.integers(0, 2**32))
def test_reading_the_text_finds_exactly_the_answers(family, n_words, seed):
    """And other ones, as soon as two of its words have changed places."""
    question = FAMILIES[family](np.random.default_rng(seed), n_words)
    assert solve(question.context, question.question) == question.answers
    other = question.answers[-1] if len(question.answers) > 1 else "00000"
    text = exchanged(question.context, question.answers[0], other)
    assert solve(text, question.question) != question.answers


@given(family=family_names, length=st.integers(520, 2000), index=st.integers(0, 1000))
def test_tokens_are_those_of_the_text_and_fill_the_length(family, length, index):
    question, asked = ask(TOKENIZER, family, length, index)
    assert length - 40 < len(asked.tokens) <= length
    assert TOKENIZER.decode(asked.tokens[: asked.n_context]) == question.context + "\n\n"
    filled = question.question
    for answer in question.answers:
        filled = filled.replace(GAP, answer, 1)
    assert filled.startswith(TOKENIZER.decode(asked.tokens[asked.n_context :]))
    stated = [TOKENIZER.decode([asked.tokens[at] for at in places]) for places in asked.answers]
    assert stated == [f" {answer}" for answer in question.answers]


def test_facts_lie_anywhere_in_the_text():
    """No third of the text is favoured."""
    places = []
    for index in range(60):
        context = question_of("single", 600, index).context
        places.append(context.index("The secret number") / len(context))
    assert np.histogram(places, bins=3, range=(0, 1))[0].min() >= 10


def test_all_questions_differ():
    texts = {question_of(family, length, i).context for family in FAMILIES for length in (520, 600) for i in range(3)}
    assert len(texts) == len(FAMILIES) * 2 * 3


@pytest.mark.parametrize(
    ("family", "digest"), [("variable tracking", "6bed9c8f2a7593e2"), ("frequent words", "1d3e6c12c7fda37b")]
)
def test_questions_are_the_same_everywhere(family, digest):
    question, asked = ask(TOKENIZER, family, 512, 3)
    text = "\n".join([question.context, question.question, *question.answers, str(asked.tokens)])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == digest


# Marks.


@pytest.mark.parametrize("interval", [1, 6, None])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_marks_are_those_of_decoding_step_by_step(interval, share):
    """Along what this way writes by itself, with one token exchanged."""
    shape = Shape(3)
    model, way = shape.model(), replace(CONFIG, interval=interval)
    context, n_prompt = shape.tokens(48), int(48 * share)
    (written,) = generate(model, [context], 24, way)
    tokens = context + written.tokens
    tokens[60] = (tokens[60] + 1) % shape.vocab
    asked = Asked(tokens, 48, [range(at, at + 3) for at in range(49, 70, 3)])
    exact = exact_stream(model, torch.tensor([tokens]))

    chosen = decoded_along(model, tokens[:n_prompt], tokens[n_prompt:], way).argmax(dim=-1).tolist()
    dense = model(torch.tensor([tokens]))[0].argmax(dim=-1).tolist()
    expected = [all(chosen[at - 1 - n_prompt] == tokens[at] for at in places) for places in asked.answers]
    by_dense = [all(dense[at - 1] == tokens[at] for at in places) for places in asked.answers]
    assert marks(model, asked, exact, way, share) == expected
    assert marks(model, asked, exact) == by_dense
    assert not expected[3], "the token that was exchanged is in this answer"
    assert share < 1 or any(expected)
    everything = replace(way, active_ratio=1.0)
    assert marks(model, asked, exact, everything, share) == by_dense, "all blocks are read"


# The measurement.


@pytest.fixture(scope="module")
def model():
    """Random weights that know the shipped tokenizer's tokens."""
    shape = Shape(1, context=640)
    return GPT(shape.config(vocab_size=TOKENIZER.n_vocab)).eval()


def test_every_row_is_compared_with_the_ends_of_its_own_start(model, monkeypatch):
    """Marks are drawn: a random model has no answer right."""
    seen = {}

    def drawn(model, asked, exact, way=None, share=1.0):
        answers = np.random.default_rng(len(seen)).random(len(asked.answers)) < 0.6
        return seen.setdefault((tuple(asked.tokens), way, share), answers.tolist())

    monkeypatch.setattr(retrieval, "exact_stream", lambda *_: None)
    monkeypatch.setattr(retrieval, "marks", drawn)
    result = measure_retrieval(model, TOKENIZER, 3, [520, 560], CONFIG, [6, 2])
    assert (result["questions"], result["lengths"]) == (3, [520, 560])
    assert len(result["rows"]) == len(FAMILIES) * 2 * len(STARTS) * 4
    asked = {
        (family, length): [tuple(ask(TOKENIZER, family, length, index)[1].tokens) for index in range(3)]
        for family in FAMILIES
        for length in (520, 560)
    }

    def right(row, name):
        ways = {"sparse": None, "ReSA f=6": 6, "ReSA f=2": 2, "decode-only": 1}
        key = (None, 1.0) if name == "dense" else (replace(CONFIG, interval=ways[name]), STARTS[row["start"]])
        return np.mean([np.mean(seen[(tokens, *key)]) for tokens in asked[row["family"], row["length"]]])

    for row in result["rows"]:
        own, exact, never, dense = (right(row, name) for name in (row["way"], "decode-only", "sparse", "dense"))
        parts = [row[name] for name in ("right", "dense", "drift", "gain")]
        assert parts == pytest.approx([own, dense, exact - own, own - never])
        assert row["is_answered"] == (dense >= 0.5)
        assert row["right_95"][0] <= row["right"] <= row["right_95"][1]
    assert {row["is_answered"] for row in result["rows"]} == {True, False}


def test_reading_all_blocks_is_dense_decoding(model):
    """With the marks of the model itself, from both starts."""
    result = measure_retrieval(model, TOKENIZER, 1, [520], replace(CONFIG, active_ratio=1.0), [6])
    assert len(result["rows"]) == len(FAMILIES) * len(STARTS) * 3
    assert all(row["right"] == row["dense"] and row["gain"] == row["drift"] == 0 for row in result["rows"])


@pytest.mark.parametrize(
    ("named", "changes"),
    [
        ("n_questions", {"n_questions": 0}),
        ("lengths: got 641; allowed: ≤ 640, for the context", {"lengths": [520, 641]}),
        (r"lengths: got 100; allowed: ≥ \d+ for 'single'", {"lengths": [100]}),
        ("lengths: got 520.0; allowed: an integer ≥ 1", {"lengths": [520.0]}),
        ("lengths", {"lengths": []}),
        ("interval", {"intervals": [0]}),
    ],
)
def test_bad_arguments_are_refused_by_name(model, monkeypatch, named, changes):
    monkeypatch.setattr(retrieval, "exact_stream", lambda *_: pytest.fail("something was read"))
    arguments = {"n_questions": 1, "lengths": [520], "config": CONFIG, "intervals": [6]}
    with pytest.raises(ValueError, match=named):
        measure_retrieval(model, TOKENIZER, **{**arguments, **changes})
