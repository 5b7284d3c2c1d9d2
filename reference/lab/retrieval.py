"""Questions about a long text: the share that dense decoding answers, and each other way.

The families are RULER's (arXiv 2404.06654) in plain English: numbers hidden in a story, a parcel
that passes from hand to hand, words that are frequent in a list. A question follows its context. It
has gaps, each with one right answer, which the context alone decides.

The measure is teacher-forced: an answer is right if each of its tokens is the likeliest one after
the right tokens before it, those of earlier answers included. So all ways of decoding read the same
tokens, and nothing is generated. Decoding begins in one of two places:

- *question*: the context is prefilled. Facts are exact in the cache, and drift has only the tokens
  of the question and its answers to build up in.
- *middle*: the second half of the context is decoded too, so facts in it lie in a drifted cache.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from ..checks import require, require_integer
from ..config import ReSAConfig
from ..model import GPT
from ..weights.models import Tokenizer, encode_onward
from .fidelity import decoding_variants
from .measure import over_documents, with_intervals
from .parallel import Stream, decode_at_once, exact_stream

SEED = 0  # of the questions
ANSWERED = 0.5  # a family counts as answered from this share of answers on, by dense decoding
STARTS = {"question": 1.0, "middle": 0.5}  # share of the context that is prefilled
GAP = "___"
LEAST = 64  # words of filler: in shorter lists, words would be equally frequent

# A sentence of the story takes one phrase of each row.
STORY = """
At noon|In the morning|Before dinner|After the rain|On Sunday|Late at night|Last week|Once
the old baker|the tall farmer|the young teacher|the quiet sailor|a painter|a tired driver|a doctor
carried|bought|found|cleaned|moved|sold|described|repaired
a wooden|a small|a heavy|a broken|a yellow|a dusty|a round|a cheap
chair|basket|lamp|bicycle|mirror|blanket|kettle|ladder
near the river|behind the house|at the market|in the kitchen|by the station|under the bridge
"""
WORDS_EACH = 12  # of its sentences, about
NAMES = """
Anna Peter Maria David Laura Simon Julia Martin Emma Oscar Helen Victor
Alice Henry Clara Frank Diana Thomas Sarah Walter Irene George Nina Robert
"""
THINGS = """
apple stone river cloud horse table music paper glass green ocean bread chain dream eagle flame
grape house jewel knife lemon metal night olive piano queen sugar tiger uncle valley water zebra
"""
# Shares of the words in a list; the first three are asked for.
COMMON = [1 / 9] * 3 + [1 / 45] * 29
FREQUENT = [0.6 / rank**2 for rank in range(1, 21)]


@dataclass(frozen=True)
class Question:
    """A question about a text."""

    context: str
    question: str  # one GAP for each answer
    answers: list[str]  # in the order of the gaps


def story(rng: np.random.Generator, n_words: int, facts: Sequence[str]) -> str:
    """Sentences that do not matter, with the facts scattered among them in their order."""
    phrases = [row.split("|") for row in STORY.split("\n")[1:-1]]
    n, places = n_words // WORDS_EACH, np.sort(rng.random(len(facts)))
    # Drawn sentence by sentence, so that a longer story begins like a shorter one.
    text = [
        " ".join(row[int(u * len(row))] for row, u in zip(phrases, draw, strict=True)) + "."
        for draw in rng.random((n, len(phrases))).tolist()
    ]
    for place, fact in zip(places[::-1], facts[::-1], strict=True):
        text.insert(int(place * (n + 1)), fact)
    return " ".join(text)


def numbers(rng: np.random.Generator, n: int) -> list[str]:
    """Draw different numbers of five digits."""
    return [str(number) for number in rng.choice(90_000, n, replace=False) + 10_000]


def needles(rng: np.random.Generator, n_words: int, n_names: int, n_asked: int) -> Question:
    """A secret number for every name; some names are asked for, in another order."""
    names, hidden = rng.permutation(NAMES.split())[:n_names].tolist(), numbers(rng, n_names)
    facts = [f"The secret number of {each} is {n}." for each, n in zip(names, hidden, strict=True)]
    asked = rng.permutation(n_names)[:n_asked].tolist()
    question = " ".join(f"The secret number of {names[each]} is {GAP}." for each in asked)
    return Question(story(rng, n_words, facts), question, [hidden[each] for each in asked])


def many_values(rng: np.random.Generator, n_words: int) -> Question:
    """Four secret numbers for one name, asked for in the order of the text."""
    name, hidden = rng.choice(NAMES.split()), numbers(rng, 4)
    facts = [f"A secret number of {name} is {number}." for number in hidden]
    gaps = f"{GAP}, {GAP}, {GAP} and {GAP}"
    question = f"The secret numbers of {name}, from first to last, are {gaps}."
    return Question(story(rng, n_words, facts), question, hidden)


def chains(rng: np.random.Generator, n_words: int) -> Question:
    """Two parcels that pass through five hands each; the hands of one are asked for."""
    hands, parcels = rng.permutation(NAMES.split())[:10].reshape(2, 5).tolist(), numbers(rng, 2)
    steps = [
        [f"The parcel {parcel} was sent to {names[0]}."]
        + [f"{a} sent the parcel to {b}." for a, b in pairwise(names)]
        for names, parcel in zip(hands, parcels, strict=True)
    ]
    turns = rng.permutation([0] * 5 + [1] * 5).tolist()
    facts = [steps[turn].pop(0) for turn in turns]
    path = ", who sent the parcel to ".join([GAP] * 5)
    question = f"The parcel {parcels[0]} was sent to {path}."
    return Question(story(rng, n_words, facts), question, hands[0])


def word_list(rng: np.random.Generator, n_words: int, shares: Sequence[float]) -> Question:
    """A list of words; the three most frequent are asked for."""
    drawn = rng.permutation(THINGS.split())[: len(shares)].tolist()
    # Rounding the sums, not the counts, lets the list grow word by word.
    counts = np.diff(np.floor(np.cumsum([0, *shares]) * n_words).astype(int))
    words = rng.permutation(np.repeat(drawn, counts)).tolist()
    answers, order = drawn[:3], "the most frequent first"
    if shares is COMMON:  # these are equally frequent
        answers, order = sorted(answers, key=words.index), "in the order of the list"
    question = f"The most frequent words, {order}, are {GAP}, {GAP} and {GAP}."
    return Question(", ".join(words) + ".", question, answers)


# (generator, words of filler) → question
FAMILIES: dict[str, Callable[[np.random.Generator, int], Question]] = {
    "single": partial(needles, n_names=1, n_asked=1),
    "multi-key": partial(needles, n_names=8, n_asked=1),
    "multi-value": many_values,
    "multi-query": partial(needles, n_names=8, n_asked=8),
    "variable tracking": chains,
    "common words": partial(word_list, shares=COMMON),
    "frequent words": partial(word_list, shares=FREQUENT),
}


@dataclass(frozen=True)
class Asked:
    """Tokens of a context, its question and the right answers."""

    tokens: list[int]
    n_context: int  # how many of them are the context
    answers: list[range]  # the places of each answer


def encode(tokenizer: Tokenizer, question: Question) -> Asked:
    """Tokenize piece by piece: no token then belongs to an answer and to what stands before it."""
    tokens = tokenizer.encode_ordinary(question.context + "\n\n")
    n_context, places = len(tokens), []
    for text, answer in zip(question.question.split(GAP), question.answers, strict=False):
        # Tokenizers join a space with the word that follows.
        tokens += encode_onward(tokenizer, text.removesuffix(" "))
        own = encode_onward(tokenizer, " " + answer)
        places.append(range(len(tokens), len(tokens) + len(own)))
        tokens += own
    return Asked(tokens, n_context, places)


def ask(tokenizer: Tokenizer, family: str, length: int, index: int) -> tuple[Question, Asked]:
    """Question number `index` of a family, with as much context as fits into `length` tokens."""

    def write(n_words: int) -> tuple[Question, Asked]:
        rng = np.random.default_rng((SEED, list(FAMILIES).index(family), length, index))
        question = FAMILIES[family](rng, n_words)
        return question, encode(tokenizer, question)

    least = len(write(LEAST)[1].tokens)
    require(length >= least, "lengths", length, f"≥ {least} for {family!r}")
    n_fitting = bisect_right(range(LEAST, length), length, key=lambda n: len(write(n)[1].tokens))
    return write(LEAST + n_fitting - 1)


def marks(
    model: GPT, asked: Asked, exact: Stream, way: ReSAConfig | None = None, share: float = 1.0
) -> list[bool]:
    """Mark every answer as right or not. `share` of the context is prefilled.

    A way of None is dense decoding.
    """
    if way is not None:
        exact = decode_at_once(model, exact, way, int(asked.n_context * share))
    right = []
    for places in asked.answers:
        before = exact.hidden[0, places.start - 1 : places.stop - 1]
        chosen = model.output(before).argmax(dim=-1).tolist()
        right.append(chosen == asked.tokens[places.start : places.stop])
    return right


@torch.no_grad()
def measure_retrieval(
    model: GPT,
    tokenizer: Tokenizer,
    n_questions: int,
    lengths: Sequence[int],
    config: ReSAConfig,
    intervals: Sequence[int],
) -> dict[str, Any]:
    """Shares of right answers for every family, length in tokens, start and way of decoding.

    Means are over questions, with intervals. `drift` is what decode-only finds more, `gain` what
    never rectifying finds less. Families that dense decoding does not answer are marked.
    JSON-ready.
    """
    # Check the request, and list the ways of decoding.
    require_integer("n_questions", n_questions, 1)
    require(len(lengths) > 0, "lengths", lengths, "at least one")
    context = model.config.context
    for length in lengths:
        require_integer("lengths", length, 1)
        require(length <= context, "lengths", length, f"≤ {context}, for the context")
    variants = decoding_variants(config, intervals)
    ways = {(start, name): way for start in STARTS for name, way in variants.items()}
    questions = {
        (family, length): [ask(tokenizer, family, length, i)[1] for i in range(n_questions)]
        for length in lengths
        for family in FAMILIES
    }

    def prepare(asked: Asked) -> tuple[Asked, Stream]:
        tokens = torch.tensor([asked.tokens], device=model.embed.weight.device)
        return asked, exact_stream(model, tokens)

    def mark(shared: tuple[Asked, Stream], key: tuple[str, str] | None) -> float:
        way = () if key is None else (ways[key], STARTS[key[0]])
        return float(np.mean(marks(model, *shared, *way)))

    # Compare each way with the ends of its own start.
    rows = []
    for (family, length), some in questions.items():
        results = over_documents(f"{family}, {length}", some, [None, *ways], prepare, mark)
        right = {key: np.array(shares) for key, shares in results.items()}  # [questions]
        is_answered = bool(right[None].mean() >= ANSWERED)
        for start, name in ways:
            own, exact, never = (right[start, each] for each in (name, "decode-only", "sparse"))
            row = {"family": family, "length": length, "start": start, "way": name}
            row |= {"is_answered": is_answered, "answers_each": len(some[0].answers)}
            parts = {"right": own, "dense": right[None], "drift": exact - own, "gain": own - never}
            rows.append(row | with_intervals(parts))
    about = {"questions": n_questions, "lengths": list(lengths), "seed": SEED}
    about |= {"answered_from": ANSWERED, "starts": STARTS, "config": asdict(config)}
    return {**about, "rows": rows}
