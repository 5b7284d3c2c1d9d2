"""Tasks whose answers can be checked by running them: retrieval after RULER, and long traces of straight-line programs.

Every example is Python text that runs without an error if the answer is right and raises AssertionError if it is not.
Models are trained on `documents` and asked fresh examples.

- *Retrieval* (Hsieh et al. 2024, RULER, arXiv 2404.06654): something assigned somewhere in a long prompt is asked for
  at its end. RULER hides sentences in essays; here assignments stand among assignments and stretches of real code.
- *Tracing*: the prompt is a program, the answer its trace, thousands of tokens long. Each step needs values that
  stand only in the trace, so what the model wrote long ago must still be found, and an error spreads.

Neighbour: `corpus.py` writes lookups for training without an end; here an example is whole, with one answer.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import count, islice, pairwise, product

import numpy as np
import tiktoken
from rich.console import Console
from rich.progress import track

from .checks import is_integer, require
from .corpus import SYLLABLES, assignments, code_stretch
from .tokenizer import END_OF_TEXT

SHORTEST = 224  # tokens: with the shipped tokenizer every family fits, whatever words are drawn


@dataclass(frozen=True)
class Example:
    """One question. `prompt` and `answer` are the tokens of `text`, cut where no token spans the cut."""

    prompt: list[int]
    answer: list[int]  # what must follow the prompt exactly, the newline at its end included
    checked: int  # tokens of the answer's last line, which answers the question; all of them outside tracing
    text: str  # prompt and answer


def whole(tokenizer: tiktoken.Encoding, prompt: str, answer: str) -> Example:
    """The example of two texts. The prompt ends in a newline, or the answer begins with a space, but not both."""
    last = answer.splitlines(keepends=True)[-1]
    return Example(
        tokenizer.encode_ordinary(prompt), tokenizer.encode_ordinary(answer), size(tokenizer, last), prompt + answer
    )


def size(tokenizer: tiktoken.Encoding, *texts: str) -> int:
    """Tokens of texts that are encoded one by one."""
    return sum(len(tokenizer.encode_ordinary(text)) for text in texts)


def code_blocks(tokenizer: tiktoken.Encoding, rng: np.random.Generator, length: int, code: Sequence[str]) -> list[str]:
    """Stretches of `code` as strings that nobody uses; how much is random, up to half of what `length` has to spare.

    As strings, because lines cut out of a file seldom compile.
    """
    check_code(code)
    blocks: list[str] = []
    room = rng.random() * (length - 2 * SHORTEST) / 2
    while code:
        stretch = code_stretch(rng, code).replace("\x00", "")  # a byte that Python refuses
        block = "r'''\n" + stretch.replace("'''", '"""') + "'''\n"
        room -= size(tokenizer, block)
        if room < 0:
            break
        blocks.append(block)
    return blocks


def check_code(code: Sequence[str]) -> None:
    """One string is a sequence of strings too, of one letter each: surely a mistake."""
    require(not isinstance(code, str), "code", "one text", "a sequence of texts")


def scatter(rng: np.random.Generator, among: Sequence[str], lines: Sequence[str]) -> list[str]:
    """`lines` in their order at random places among others, every place as likely as any other."""
    places = np.sort(rng.integers(len(among), size=len(lines), endpoint=True)).tolist()
    mixed = list(among)
    for place, line in reversed(list(zip(places, lines, strict=True))):
        mixed.insert(place, line)
    return mixed


def distinct_words(rng: np.random.Generator, fewest: int, most: int) -> Iterator[str]:
    """Endless different words of `fewest` to `most` syllables."""
    taken: set[str] = set()
    while True:
        syllables = rng.integers(len(SYLLABLES), size=rng.integers(fewest, most, endpoint=True)).tolist()
        word = "".join(SYLLABLES[index] for index in syllables)
        if word not in taken:
            taken.add(word)
            yield word


# ---- Retrieval of values -------------------------------------------------------------------------------------------

NEEDLES = 4  # values of one name, or names asked for together
LINKS = 4  # lines `b = a` in the chain asked for
ROOT_SHARE = 0.2  # of the other chains' lines: the others are about as long as the one asked for


def haystack(
    tokenizer: tiktoken.Encoding,
    rng: np.random.Generator,
    length: int,
    code: Sequence[str],
    needles: Sequence[str],
    filler: Iterator[str],
    question: str,
    answer: str,
) -> Example:
    """The lines `needles`, in order, among as many lines of `filler` as fit, then the question."""
    needed = size(tokenizer, *needles, question, answer)
    require(is_integer(length, needed), "length", length, f"an integer ≥ {needed}, for what is asked")
    blocks = code_blocks(tokenizer, rng, length, code)
    room = length - needed - size(tokenizer, *blocks)
    lines: list[str] = []
    for line in filler:
        room -= size(tokenizer, line)
        if room < 0:
            break
        lines.append(line)
    return whole(tokenizer, "".join(scatter(rng, scatter(rng, lines, blocks), needles)) + question, answer)


def single_needle(
    tokenizer: tiktoken.Encoding, rng: np.random.Generator, length: int, code: Sequence[str] = ()
) -> Example:
    """One assignment among others, marked by its name: `needle_tamiko = 4821`.

    `length` bounds prompt and answer together, in tokens; at most one line is missing. Text of `code` may stand
    between the lines. Errors: ValueError if `length` is too short, or `code` is one string. So do all families.
    """
    fresh = assignments(rng)
    name, value = next(fresh)
    filler = (f"{other} = {its}\n" for other, its in fresh)
    question = f"assert needle_{name} =="
    return haystack(
        tokenizer, rng, length, code, [f"needle_{name} = {value}\n"], filler, question, answer=f" {value}\n"
    )


def multi_key(tokenizer: tiktoken.Encoding, rng: np.random.Generator, length: int, code: Sequence[str] = ()) -> Example:
    """One assignment among others whose names begin like its own: `zelo_tamiko = 4821`, `zelo_barufi = 1707`."""
    stem = next(distinct_words(rng, 2, 2))
    lines = (f"{stem}_{word} = {rng.integers(1000, 10_000)}\n" for word in distinct_words(rng, 3, 3))
    needle = next(lines)
    name, value = needle.split(" = ")
    return haystack(tokenizer, rng, length, code, [needle], lines, f"assert {name} ==", answer=f" {value}")


def multi_value(
    tokenizer: tiktoken.Encoding, rng: np.random.Generator, length: int, code: Sequence[str] = ()
) -> Example:
    """Values appended to one list at different places: `tamiko.append(4821)`. All are asked for, in order."""
    fresh = assignments(rng)
    name, _ = next(fresh)
    values = rng.integers(1000, 10_000, size=NEEDLES).tolist()
    needles = [f"{name} = []\n", *(f"{name}.append({value})\n" for value in values)]
    filler = (f"{other} = {its}\n" for other, its in fresh)
    return haystack(tokenizer, rng, length, code, needles, filler, f"assert {name} ==", answer=f" {values}\n")


def multi_query(
    tokenizer: tiktoken.Encoding, rng: np.random.Generator, length: int, code: Sequence[str] = ()
) -> Example:
    """Several assignments among others, asked for one after another: `assert (tamiko, zelo_bati) == (4821, 1707)`.

    The order asked for is not the order of assignment.
    """
    fresh = assignments(rng)
    pairs = list(islice(fresh, NEEDLES))
    needles = [f"{name} = {value}\n" for name, value in pairs]
    names, values = zip(*(pairs[index] for index in rng.permutation(NEEDLES)), strict=True)
    filler = (f"{other} = {its}\n" for other, its in fresh)
    question = f"assert ({', '.join(names)}) =="
    return haystack(tokenizer, rng, length, code, needles, filler, question, answer=f" ({', '.join(values)})\n")


def variable_tracking(
    tokenizer: tiktoken.Encoding, rng: np.random.Generator, length: int, code: Sequence[str] = ()
) -> Example:
    """A chain `a = 4821`, `b = a`, `c = b` among other chains; the value of its last name is asked for."""
    fresh = assignments(rng)
    name, value = next(fresh)
    names = [name, *(other for other, _ in islice(fresh, LINKS))]
    links = [f"{later} = {earlier}\n" for earlier, later in pairwise(names)]
    needles = [f"{name} = {value}\n", *links]
    return haystack(
        tokenizer, rng, length, code, needles, chained(rng, fresh), f"assert {names[-1]} ==", answer=f" {value}\n"
    )


def chained(rng: np.random.Generator, fresh: Iterator[tuple[str, str]]) -> Iterator[str]:
    """Endless lines that begin a chain, `a = 4821`, or continue one at its end, `b = a`."""
    ends: list[str] = []
    for name, value in fresh:
        if not ends or rng.random() < ROOT_SHARE:
            ends.append(name)
            yield f"{name} = {value}\n"
        else:
            index = rng.integers(len(ends))
            yield f"{name} = {ends[index]}\n"
            ends[index] = name


# ---- Retrieval by counting -----------------------------------------------------------------------------------------

COUNTED = 3  # words asked for
LINE_WORDS = 12
# Common and other words occur so often, as in RULER; short examples lack the room.
OCCURRENCES, OCCURRENCES_SHORT, SHORT = (30, 3), (6, 1), 1024
# From here on, and for every larger c, the counts c, c // 2, c // 3 and c // 4 differ.
ZIPF_LEAST = 9


def word_list(
    tokenizer: tiktoken.Encoding,
    rng: np.random.Generator,
    length: int,
    code: Sequence[str],
    words: Sequence[str],
    others: Iterable[list[str]],
    question: str,
    answer: str,
) -> Example:
    """`words` and as many of the groups `others` as fit, shuffled, added to a list line by line; then the question."""
    head = "from collections import Counter\nwords = []\n"
    line_size = size(tokenizer, 'words += "', '".split()\n')
    fixed = size(tokenizer, head, question, answer)
    spent = size(tokenizer, *(f" {word}" for word in words))
    needed = fixed + spent + lines_of(len(words)) * line_size
    require(length >= needed, "length", length, f"an integer ≥ {needed}, for what is asked")
    blocks = code_blocks(tokenizer, rng, length, code)
    room = length - fixed - size(tokenizer, *blocks)
    words = list(words)
    for group in others:
        spent += size(tokenizer, *(f" {word}" for word in group))
        if spent + lines_of(len(words) + len(group)) * line_size > room:
            break
        words += group
    rng.shuffle(words)
    # A space before the first word too, so that a word has the same tokens wherever it stands.
    lines = [
        f'words += " {" ".join(words[start : start + LINE_WORDS])}".split()\n'
        for start in range(0, len(words), LINE_WORDS)
    ]
    return whole(tokenizer, head + "".join(scatter(rng, lines, blocks)) + question, answer)


def lines_of(n_words: int) -> int:
    """Lines that so many words fill, the last perhaps in part."""
    return -(-n_words // LINE_WORDS)


def common_words(
    tokenizer: tiktoken.Encoding, rng: np.random.Generator, length: int, code: Sequence[str] = ()
) -> Example:
    """Three words of a list occur 30 times, all others 3 times; the three are asked for in the order of the alphabet.

    Below 1,024 tokens they occur 6 times, the others once.
    """
    require(is_integer(length, 1), "length", length, "an integer ≥ 1")
    fresh = distinct_words(rng, 2, 3)
    common = list(islice(fresh, COUNTED))
    often, seldom = OCCURRENCES if length >= SHORT else OCCURRENCES_SHORT
    others = ([word] * seldom for word in fresh)
    question = f"assert sorted(word for word, _ in Counter(words).most_common({COUNTED})) =="
    return word_list(
        tokenizer, rng, length, code, common * often, others, question, answer=f" {json.dumps(sorted(common))}\n"
    )


def frequent_words(
    tokenizer: tiktoken.Encoding, rng: np.random.Generator, length: int, code: Sequence[str] = ()
) -> Example:
    """Words of a list occur after Zipf's law, the r-th about 1/r as often as the first; the top three are asked for.

    RULER's exponent is 2; Zipf's own, 1, leaves the three closer together and the tail longer.
    """
    require(is_integer(length, 1), "length", length, "an integer ≥ 1")
    fresh = distinct_words(rng, 2, 3)
    ranked = list(islice(fresh, ZIPF_LEAST))
    least = [word for rank, word in enumerate(ranked, start=1) for _ in range(ZIPF_LEAST // rank)]
    question = f"assert [word for word, _ in Counter(words).most_common({COUNTED})] =="
    answer = f" {json.dumps(ranked[:COUNTED])}\n"
    return word_list(tokenizer, rng, length, code, least, zipf(ranked, fresh), question, answer)


def zipf(ranked: Sequence[str], fresh: Iterator[str]) -> Iterator[list[str]]:
    """Endless single words that take the counts from c // rank to (c + 1) // rank, and so on, c = len(ranked).

    The ranks whose count grows are the divisors of c + 1. The first grow first, so the order holds at every word.
    """
    ranked = list(ranked)
    for c in count(len(ranked) + 1):
        ranked.append(next(fresh))
        for rank in range(1, c + 1):
            if c % rank == 0:
                yield [ranked[rank - 1]]


# ---- Tracing -------------------------------------------------------------------------------------------------------

DIGITS = 8  # values are 0 … 7, which exclusive or never leaves, so that no line needs a modulus
ROOTS = 4  # variables that the program assigns digits
RESULTS = 3  # variables asked for at the end
NAMES_LEAST = 512  # names that a program can choose from


@lru_cache(maxsize=8)
def short_names(tokenizer: tiktoken.Encoding) -> tuple[str, ...]:
    """Names of two syllables which all cost the same number of tokens: the cheapest of which there are enough.

    With a space in front only the first token differs. So all lines of a trace have the same tokens at the same
    places, and one name looks alike wherever it stands. Errors: ValueError if the tokenizer has no such names.
    """
    kinds: dict[tuple[int, int], list[str]] = defaultdict(list)
    for name in map("".join, product(SYLLABLES, repeat=2)):
        bare, spaced = tokenizer.encode_ordinary(name), tokenizer.encode_ordinary(f" {name}")
        if spaced[len(spaced) - len(bare) + 1 :] == bare[1:]:
            kinds[len(bare), len(spaced)].append(name)
    enough = [kind for kind, names in kinds.items() if len(names) >= NAMES_LEAST]
    require(bool(enough), "tokenizer", tokenizer.name, f"one that splits {NAMES_LEAST} names of two syllables alike")
    return tuple(kinds[min(enough, key=sum)])


@dataclass(frozen=True)
class Step:
    """One line of a program, `name = left ^ right`; the operands are names or digits."""

    name: str
    left: str
    right: str

    @property
    def line(self) -> str:
        return f"{self.name} = {self.left} ^ {self.right}\n"

    def trace(self, values: dict[str, int], working: bool) -> str:
        """The line that asserts the result, given the values of names and digits."""
        operands = f" == {values[self.left]} ^ {values[self.right]}" if working else ""
        return f"assert {self.name} == {self.left} ^ {self.right}{operands} == {values[self.name]}\n"


def tracing(
    tokenizer: tiktoken.Encoding,
    rng: np.random.Generator,
    length: int,
    code: Sequence[str] = (),
    *,
    every: int = 1,
    distances: tuple[int, int] = (1, 10_000),
    working: bool = True,
) -> Example:
    """A program of steps `kepo = tuna ^ 4`, and as answer its trace `assert kepo == tuna ^ 4 == 3 ^ 4 == 7`.

    The last line of the program names three variables, out of its first, second and last third; the last line of the
    answer gives their values. Exclusive or has no weak operand: if one is wrong, the result is wrong.

    every: only every so-many-th step has a line in the trace; those between must be worked out unwritten. Each of
        them is an operand of the next step and of no other.
    distances: fewest and most lines of the trace back to an operand's own line, drawn log-uniformly from as much of
        that as there is, the program's first assignments counted as lines before the trace.
    working: False leaves `== 3 ^ 4` out. Then a value stands in one line only, and distances are exact; with it, a
        value stands in the lines that use it as well.

    `length` bounds prompt and answer together; at most one step's lines (`every` steps') are missing, unless all of
    `short_names` are used up, about 1,000. `code` stands before the program. Errors: ValueError for bad arguments.
    """
    require(is_integer(length, 1), "length", length, "an integer ≥ 1")
    require(is_integer(every, 1), "every", every, "an integer ≥ 1")
    is_pair = isinstance(distances, Sequence) and len(distances) == 2
    is_range = is_pair and is_integer(distances[0], 1) and is_integer(distances[1], distances[0])
    require(is_range, "distances", distances, "two integers, 1 ≤ fewest ≤ most")
    names = rng.permutation(short_names(tokenizer)).tolist()
    roots = dict(zip(names, rng.integers(DIGITS, size=ROOTS).tolist(), strict=False))
    values = {str(digit): digit for digit in range(DIGITS)} | roots
    prompt = code_blocks(tokenizer, rng, length, code) + [f"{name} = {value}\n" for name, value in roots.items()]
    answer: list[str] = []
    traced: list[str] = []
    # All names cost the same, so any will do for measuring the last lines.
    room = length - size(tokenizer, *prompt, *result_lines(names[:RESULTS], values))
    for steps in step_groups(rng, names, every, distances):
        for step in steps:
            values[step.name] = values[step.left] ^ values[step.right]
        lines, trace = [step.line for step in steps], steps[-1].trace(values, working)
        room -= size(tokenizer, *lines, trace)
        if room < 0:
            break
        prompt += lines
        answer.append(trace)
        traced.append(steps[-1].name)
    require(len(traced) >= RESULTS, "length", length, f"more, for {RESULTS} lines of a trace")
    asked = [str(rng.choice(third)) for third in np.array_split(traced, RESULTS)]
    names_line, values_line = result_lines(asked, values)
    return whole(tokenizer, "".join([*prompt, names_line]), "".join([*answer, values_line]))


def result_lines(names: Sequence[str], values: dict[str, int]) -> tuple[str, str]:
    """The last line of a program and the last of its trace."""
    asked, found = ", ".join(names), ", ".join(str(values[name]) for name in names)
    return f"result = ({asked})\n", f"assert result == ({asked}) == ({found})\n"


def step_groups(
    rng: np.random.Generator, names: Sequence[str], every: int, distances: tuple[int, int]
) -> Iterator[list[Step]]:
    """Groups of `every` steps, each the operand of the next, until `names` are used up; the first names are roots."""
    readable = list(names[:ROOTS])  # what the trace or the roots give, in order

    def operand() -> str:
        fewest, most = (min(distance, len(readable)) for distance in distances)
        return readable[-round(fewest * (most / fewest) ** rng.random())]

    for start in range(ROOTS, len(names) - every + 1, every):
        steps: list[Step] = []
        for name in names[start : start + every]:
            left = steps[-1].name if steps else operand()
            # Half of the right operands are digits, without 0, which would leave the value as it is.
            right = operand() if rng.random() < 0.5 else left
            if right == left:
                right = str(rng.integers(1, DIGITS))
            steps.append(Step(name, left, right))
        readable.append(steps[-1].name)
        yield steps


# ---- All of them ---------------------------------------------------------------------------------------------------

FAMILIES: dict[str, Callable[..., Example]] = {
    "single_needle": single_needle,
    "multi_key": multi_key,
    "multi_value": multi_value,
    "multi_query": multi_query,
    "variable_tracking": variable_tracking,
    "common_words": common_words,
    "frequent_words": frequent_words,
    "tracing": tracing,
    "tracing_terse": partial(tracing, working=False),
    "tracing_every_second": partial(tracing, every=2),
}
RETRIEVAL = tuple(name for name in FAMILIES if not name.startswith("tracing"))  # RULER's, paper, Table 2


def documents(
    tokenizer: tiktoken.Encoding,
    seed: int,
    count: int,
    length: int,
    families: Sequence[str],
    code: Sequence[str] = (),
    progress: bool = True,
    long_share: float = 0.0,
) -> np.ndarray:
    """`count` rows of examples for training, `END_OF_TEXT` after each: [count, length] uint16.

    The families are equally likely; one that is named twice is twice as likely. Sizes are log-uniform from SHORTEST
    to what is left of the row, so all examples but a short last one are whole; in a share `long_share` of the rows one
    example fills the row instead. In every second row the longer examples have stretches of `code`. Errors: ValueError
    for bad arguments.
    """
    check_code(code)
    known = ", ".join(FAMILIES)
    require(not isinstance(families, str) and len(families) > 0, "families", repr(families), f"names out of {known}")
    for name in families:
        require(name in FAMILIES, "families", repr(name), known)
    require(is_integer(seed, 0), "seed", seed, "an integer ≥ 0")
    require(is_integer(count, 0), "count", count, "an integer ≥ 0")
    require(is_integer(length, SHORTEST), "length", length, f"an integer ≥ {SHORTEST}")
    require(0 <= long_share <= 1, "long_share", long_share, "a number in 0 … 1")
    require(tokenizer.n_vocab <= 2**16, "tokenizer", f"{tokenizer.n_vocab} tokens", f"≤ {2**16}, to fit in uint16")
    rows = np.zeros((count, length), dtype=np.uint16)
    for index in track(range(count), "Writing tasks", console=Console(stderr=True), disable=not progress):
        rng = np.random.default_rng((seed, index))
        is_long = long_share > 0 and rng.random() < long_share
        rows[index] = document(tokenizer, rng, length, families, code if index % 2 else (), is_long)
    return rows


def document(
    tokenizer: tiktoken.Encoding,
    rng: np.random.Generator,
    length: int,
    families: Sequence[str],
    code: Sequence[str],
    is_long: bool = False,
) -> list[int]:
    """One row of `documents`: [length] tokens."""
    end = tokenizer.encode_single_token(END_OF_TEXT)
    tokens: list[int] = []
    while len(tokens) < length:
        room = max(length - len(tokens) - 1, SHORTEST)
        drawn = room if is_long else round(SHORTEST * (room / SHORTEST) ** rng.random())
        example = FAMILIES[families[rng.integers(len(families))]](tokenizer, rng, drawn, code)
        tokens += [*example.prompt, *example.answer, end]
    return tokens[:length]
