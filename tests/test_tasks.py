"""The tasks: a solver that knows nothing of the generators agrees, right answers run and wrong ones do not."""

import builtins
import hashlib
import heapq
import inspect
import json
import keyword
import re
import textwrap
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example as case
from hypothesis import given
from hypothesis import strategies as st

from resa.reference import tasks
from resa.reference.tasks import FAMILIES, SHORTEST, documents, scatter, short_names, tracing
from resa.reference.tokenizer import END_OF_TEXT, load_tokenizer, make_tokenizer

TOKENIZER = load_tokenizer()
BYTES = make_tokenizer({bytes([byte]): byte for byte in range(256)})
CODE = [inspect.getsource(heapq), inspect.getsource(textwrap)]
TRACING = [name for name in FAMILIES if name.startswith("tracing")]
RETRIEVAL = [name for name in FAMILIES if name not in TRACING]
every_family = pytest.mark.parametrize("family", FAMILIES)
seeds, lengths = st.integers(0, 2**32), st.integers(SHORTEST, 4000)


def rng(seed=0):
    return np.random.default_rng(seed)


def make(family, seed, length, code=()):
    return FAMILIES[family](TOKENIZER, rng(seed), length, code)


def texts(example):
    return TOKENIZER.decode(example.prompt), TOKENIZER.decode(example.answer)


def tokens(text):
    return len(TOKENIZER.encode_ordinary(text))


# ---- The solver ----------------------------------------------------------------------------------------------------


def solve(family, prompt):
    """The answer to a prompt without code, from its text alone."""
    if family in TRACING:
        return solve_tracing(prompt, every=2 if family == "tracing_every_second" else 1, terse="terse" in family)
    body, question = prompt.rsplit("assert ", 1)
    if family.endswith("_words"):
        return f" {json.dumps(solve_words(body, 'sorted' in question))}\n"
    values = {}
    for line in body.splitlines():
        if added := re.fullmatch(r"(\w+)\.append\((\d+)\)", line):
            values[added[1]] = values[added[1]][:-1] + (", " if "," in line or values[added[1]] != "[]" else "")
            values[added[1]] += f"{added[2]}]"
        else:
            name, value = line.split(" = ")
            assert name not in values
            values[name] = values.get(value, value)
    asked = question.removesuffix(" ==")
    if asked.startswith("("):
        return f" ({', '.join(values[name] for name in asked[1:-1].split(', '))})\n"
    return f" {values[asked]}\n"


def solve_words(body, is_sorted):
    words = re.findall(r"\b(\w+)\b", "".join(re.findall(r'^words \+= "(.*)"\.split\(\)$', body, re.MULTILINE)))
    first, second, third, fourth = sorted({(words.count(word), word) for word in words}, reverse=True)[:4]
    assert third[0] > fourth[0]
    if is_sorted:
        return sorted(word for _, word in (first, second, third))
    assert first[0] > second[0] > third[0]
    return [word for _, word in (first, second, third)]


def solve_tracing(prompt, every, terse):
    *program, last = prompt.splitlines()
    values, lines, step = {}, [], 0
    for line in program:
        if root := re.fullmatch(r"(\w+) = (\d)", line):
            values[root[1]] = int(root[2])
            continue
        name, left, right = re.fullmatch(r"(\w+) = (\w+) \^ (\w+)", line).groups()
        a, b = (int(operand) if operand.isdigit() else values[operand] for operand in (left, right))
        values[name] = a + b - 2 * (a & b)
        step += 1
        if step % every == 0:
            middle = "" if terse else f" == {a} ^ {b}"
            lines.append(f"assert {name} == {left} ^ {right}{middle} == {values[name]}\n")
    asked = re.fullmatch(r"result = \((\w+), (\w+), (\w+)\)", last).groups()
    found = ", ".join(str(values[name]) for name in asked)
    return "".join(lines) + f"assert result == ({', '.join(asked)}) == ({found})\n"


# ---- What all families promise -------------------------------------------------------------------------------------


@every_family
@given(seed=seeds, length=lengths, data=st.data())
def test_the_solver_agrees_and_wrong_answers_fail(family, seed, length, data):
    example = make(family, seed, length)
    prompt, answer = texts(example)
    assert answer == solve(family, prompt)
    exec(example.text, {})
    places = [match.start() for match in re.finditer(r'\d|(?<=")[a-z]', answer)]
    place = places[data.draw(st.integers(0, len(places) - 1), label="place")]
    other = str(int(answer[place]) % 9 + 1) if answer[place].isdigit() else "ab"[answer[place] == "a"]
    with pytest.raises(AssertionError):
        exec(prompt + answer[:place] + other + answer[place + 1 :], {})


@every_family
@given(seed=seeds, length=lengths, code=st.sampled_from([(), CODE]))
def test_tokens_are_those_of_the_text_and_fill_the_length(family, seed, length, code):
    example = make(family, seed, length, code)
    prompt, answer = texts(example)
    assert prompt + answer == example.text
    assert TOKENIZER.encode_ordinary(example.text) == example.prompt + example.answer
    assert tokens(answer) == len(example.answer)
    # The last line answers the question.
    assert TOKENIZER.decode(example.answer[-example.checked :]) == answer.splitlines(keepends=True)[-1]
    if family in TRACING:
        every = 2 if family == "tracing_every_second" else 1
        missing = every * tokens(prompt.splitlines()[-2] + "\n") + tokens(answer[: answer.index("\n") + 1])
    else:
        missing = 26  # a line, or a word as often as it must occur, at its longest
    assert length - missing < len(example.prompt + example.answer) <= length
    exec(example.text, {})
    assert make(family, seed, length, code) == example


@every_family
def test_seeds_give_different_examples(family):
    assert len({make(family, seed, 500).text for seed in range(50)}) == 50


@every_family
def test_any_tokenizer_of_bytes_will_do(family):
    example = FAMILIES[family](BYTES, rng(), 3000)
    assert BYTES.decode(example.prompt + example.answer) == example.text
    assert 2800 < len(example.prompt + example.answer) == len(example.text) <= 3000
    exec(example.text, {})


@every_family
@case(seed=0, code=["''\0'"])  # three quotes once the byte that Python refuses is gone
@given(seed=seeds, code=st.lists(st.text(alphabet="'\"\\\n\r\0\x0c# aé{", max_size=60), min_size=1, max_size=3))
def test_no_text_given_as_code_can_break_an_example(family, seed, code):
    example = make(family, seed, 1000, code)
    exec(example.text, {})
    assert TOKENIZER.encode_ordinary(example.text) == example.prompt + example.answer


@every_family
def test_code_takes_a_part_of_the_prompt(family):
    found = [make(family, seed, 6000, CODE) for seed in range(20)]
    blocks = [re.findall(r"^r'''\n(.*?)\n'''$", example.text, re.MULTILINE | re.DOTALL) for example in found]
    shares = [tokens("".join(each)) / 6000 for each in blocks]
    assert min(shares) < 0.15 < 0.3 < max(shares) < 0.5
    lines = {line for text in CODE for line in text.splitlines()}
    block = max(max(blocks, key=len), key=len).splitlines()
    assert set(block[1:-1]) <= lines  # the first and last are stripped
    assert len(block) >= 10


# ---- Retrieval -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "asked"), [("single_needle", 1), ("multi_key", 1), ("multi_query", 4)])
def test_needles_stand_at_every_depth(family, asked):
    depths = []
    for seed in range(400):
        prompt = texts(make(family, seed, 800))[0]
        body, question = prompt.rsplit("assert ", 1)
        names = re.findall(r"\w+", question)
        assert len(names) == asked
        # Where the line begins, out of all places where it could.
        depths += [body.index(f"{name} = ") / body.rindex("\n", 0, -1) for name in names]
    counts = np.histogram(depths, bins=8, range=(0, 1.0001))[0]
    expected = len(depths) / 8
    assert (abs(counts - expected) < 4 * np.sqrt(expected)).all()


def test_lines_are_scattered_over_all_places_in_their_order():
    found = Counter("".join(scatter(rng(seed), "abc", "xy")) for seed in range(1600))
    # Both lines go to any of four places, each by itself: in one order of the two or the other, where they differ.
    expected = {"abcxy": 100, "xyabc": 100, "xabcy": 200, "axbcy": 200, "axybc": 100}
    assert len(found) == 10
    assert all(abs(found[mixed] - number) < 4 * np.sqrt(number) for mixed, number in expected.items())


def test_only_the_needle_is_marked():
    prompt, answer = texts(make("single_needle", 0, 2000))
    assert re.findall(r"^needle_\w+ =(.*\n)", prompt, re.MULTILINE) == [answer]


def test_distractors_resemble_the_key():
    prompt = texts(make("multi_key", 0, 4000))[0]
    names = re.findall(r"^(\w+) = \d{4}$", prompt, re.MULTILINE)
    assert len(names) == len(set(names)) == prompt.count("\n") > 200
    assert len({name.split("_")[0] for name in names}) == 1


def test_several_values_are_scattered_in_the_order_asked_for():
    places, ascending = [], 0
    for seed in range(100):
        prompt, answer = texts(make("multi_value", seed, 2000))
        added = re.findall(r"append\((\d+)\)", prompt)
        assert answer == f" [{', '.join(added)}]\n"
        assert len(added) == 4
        ascending += added == sorted(added)
        places += [match.start() / len(prompt) for match in re.finditer("append", prompt)]
    assert ascending < 20  # 4 expected
    # Of four places and one before them, drawn in order, the first lies at a third on average and the last at 5/6.
    means = np.reshape(places, (-1, 4)).mean(axis=0)
    assert means == pytest.approx([2 / 6, 3 / 6, 4 / 6, 5 / 6], abs=0.07)  # four standard errors


def test_several_queries_come_in_another_order_than_their_needles():
    orders = Counter()
    for seed in range(240):
        prompt = texts(make("multi_query", seed, 400))[0]
        *names, _ = re.findall(r"\w+", prompt[prompt.rindex("(") :] + "_")
        places = [prompt.index(f"{name} = ") for name in names]
        orders[tuple(np.argsort(places))] += 1
    assert len(orders) == 24
    assert max(orders.values()) < 30  # 10 expected


def chain_length(assigned, name):
    links = 0
    while (name := assigned[name]) in assigned:
        links += 1
    return links


def test_chains_are_among_chains():
    others = []
    for seed in range(20):
        *lines, question = texts(make("variable_tracking", seed, 4000))[0].splitlines()
        assigned = dict(line.split(" = ") for line in lines)
        asked = question.split()[1]
        assert chain_length(assigned, asked) == tasks.LINKS
        ends = set(assigned) - set(assigned.values())
        assert asked in ends
        others += [chain_length(assigned, name) for name in ends - {asked}]
    assert len(others) > 20 * 30
    assert np.mean(others) == pytest.approx(tasks.LINKS, abs=0.5)


@pytest.mark.parametrize(("length", "often", "seldom"), [(400, 6, 1), (4000, 30, 3)])
def test_common_words_are_common(length, often, seldom):
    for seed in range(10):
        exec(make("common_words", seed, length).text, names := {})
        counts = Counter(Counter(names["words"]).values())
        assert set(counts) == {often, seldom}
        assert counts[often] == 3
        assert counts[seldom] > 10


def test_frequent_words_follow_zipfs_law():
    exec(make("frequent_words", 0, 16_000).text, names := {})
    counts = np.array([number for _, number in Counter(names["words"]).most_common()])
    assert counts[0] > 300
    ranks = np.arange(1, len(counts) + 1)
    assert (abs(counts - counts[0] / ranks) <= 1).all()


def test_the_three_most_frequent_words_are_no_tie_even_where_nothing_else_fits():
    for seed in range(20):
        with pytest.raises(ValueError, match="length") as refused:
            make("frequent_words", seed, 1)
        least = int(re.search(r"≥ (\d+)", str(refused.value))[1])
        prompt, answer = texts(make("frequent_words", seed, least))
        assert tokens(prompt + answer) == least
        assert answer == solve("frequent_words", prompt)  # which refuses ties


def test_words_come_in_random_order():
    words = re.findall(r"[a-z]+", texts(make("common_words", 0, 4000))[0].split(" += ", 1)[1])
    answer = json.loads(texts(make("common_words", 0, 4000))[1])
    places = [index / len(words) for index, word in enumerate(words) if word in answer]
    assert np.mean(places) == pytest.approx(0.5, abs=0.13)  # four standard errors of 90 uniform places


# ---- Tracing -------------------------------------------------------------------------------------------------------


def program_of(example):
    """Roots and steps: {name: digit} and [(name, left, right)]."""
    prompt = texts(example)[0]
    roots = dict(re.findall(r"^(\w+) = (\d)$", prompt, re.MULTILINE))
    return roots, re.findall(r"^(\w+) = (\w+) \^ (\w+)$", prompt, re.MULTILINE)


@pytest.mark.parametrize("family", TRACING)
def test_the_prompt_gives_no_result_away(family):
    for seed in range(20):
        example = make(family, seed, 4000)
        roots, steps = program_of(example)
        prompt, answer = texts(example)
        assert "assert" not in prompt
        assert len(roots) == 4
        assert len(roots) + len(steps) + 1 == prompt.count("\n")  # no line but roots, steps and the question
        assert not set(roots) & {name for name, _, _ in steps}
        assert len({name for name, _, _ in steps}) == len(steps)
        # What stands in front of each answer in the trace stands nowhere in the prompt.
        assert not any(f"{name} == " in prompt for name in roots)
        results = Counter(re.findall(r"(\d)$", answer, re.MULTILINE))
        assert max(results.values()) < 0.3 * results.total()  # an eighth expected


def test_a_trace_can_have_hundreds_of_steps():
    example = tracing(TOKENIZER, rng(), 14_000)
    assert len(program_of(example)[1]) > 400
    assert len(example.answer) > 8000
    exec(example.text, {})


@pytest.mark.parametrize("family", TRACING)
def test_lines_of_a_trace_have_the_same_tokens_at_the_same_places(family):
    lines = texts(make(family, 0, 3000))[1].splitlines(keepends=True)[:-1]
    encoded = [TOKENIZER.encode_ordinary(line) for line in lines]
    (count,) = {len(line) for line in encoded}
    assert count <= 21
    fixed = {place for place in range(count) if len({line[place] for line in encoded}) == 1}
    frame = [place for place, token in enumerate(encoded[0]) if TOKENIZER.decode([token]) in ("assert", " ==", "\n")]
    assert set(frame) <= fixed
    assert len(frame) == lines[0].count("==") + 2


def test_short_names_look_alike_with_and_without_a_space():
    names = short_names(TOKENIZER)
    assert len(names) > 800
    for name in names:
        bare, spaced = TOKENIZER.encode_ordinary(name), TOKENIZER.encode_ordinary(f" {name}")
        assert len(bare) == len(spaced) == 2
        assert bare[1] == spaced[1]
        assert name.isidentifier()
        assert not keyword.iskeyword(name)
        assert not hasattr(builtins, name)


def test_distances_are_log_uniform():
    counts, expected = np.zeros(8), np.zeros(8)
    edges = [1, *(2**octave - 0.5 for octave in range(1, 9))]  # distances are rounded
    for seed in range(20):
        roots, steps = program_of(make("tracing_terse", seed, 8000))
        order = [*roots, *(name for name, _, _ in steps)]
        for index, (_, left, _) in enumerate(steps, start=len(roots)):
            if index >= 256:
                distance = index - order.index(left)
                counts += np.histogram([distance], bins=[0.5, *edges[1:]])[0]
                expected += np.diff(np.log(edges)) / np.log(index)
    assert expected.sum() > 1500
    assert (abs(counts - expected) < 4 * np.sqrt(expected)).all()


@given(seed=seeds, near=st.integers(1, 12), spread=st.integers(0, 30), every=st.integers(1, 3))
def test_distances_keep_to_their_bounds(seed, near, spread, every):
    example = tracing(TOKENIZER, rng(seed), 2000, distances=(near, near + spread), every=every)
    roots, steps = program_of(example)
    readable = list(roots)
    unwritten = None
    for index, (name, *operands) in enumerate(steps, start=1):
        if unwritten is not None:
            assert operands.pop(0) == unwritten  # the step before, of which the trace has no line
        for operand in operands:
            if operand.isdigit():
                assert operand in "1234567"
            else:
                distance = len(readable) - readable.index(operand)
                assert min(near, len(readable)) <= distance <= near + spread
        unwritten = name if index % every else None
        if unwritten is None:
            readable.append(name)
    traced = re.findall(r"^assert (?!result)(\w+)", texts(example)[1], re.MULTILINE)
    assert traced == readable[len(roots) :]


def test_about_half_of_the_right_operands_are_digits_and_none_repeats_the_left():
    steps = [step for seed in range(10) for step in program_of(make("tracing", seed, 4000))[1]]
    assert all(left != right for _, left, right in steps)
    share = np.mean([right.isdigit() for _, _, right in steps])
    assert 0.47 < share < 0.65  # operands drawn twice become digits too


def test_the_variables_asked_for_come_from_every_third():
    places = []
    for seed in range(100):
        answer = texts(make("tracing", seed, 1000))[1]
        names = re.findall(r"^assert (?!result)(\w+)", answer, re.MULTILINE)
        asked = re.search(r"result == \((\w+), (\w+), (\w+)\)", answer).groups()
        places.append([names.index(name) / len(names) for name in asked])
    places = np.array(places)
    assert (places[:, 0] < places[:, 1]).all()
    assert (places[:, 1] < places[:, 2]).all()
    assert places.mean(axis=0) == pytest.approx([1 / 6, 3 / 6, 5 / 6], abs=0.05)  # four standard errors


# ---- Training text -------------------------------------------------------------------------------------------------


def pieces(row):
    """Whole examples of a row as texts, and what is left at its end."""
    *examples, rest = TOKENIZER.decode(row.tolist()).split(END_OF_TEXT)
    return examples, rest


def test_rows_hold_whole_examples_of_all_families():
    rows = documents(TOKENIZER, 3, 24, 3000, list(FAMILIES), CODE, progress=False)
    assert rows.dtype == np.uint16
    assert rows.shape == (24, 3000)
    seen = Counter()
    for row in rows:
        examples, rest = pieces(row)
        assert tokens(rest) <= SHORTEST
        for text in examples:
            exec(text, {})
            marks = ("needle_", "append", "assert (", "sorted", "[word", "result")
            seen[next((mark for mark in marks if mark in text), "other")] += 1
            seen["tokens"] += tokens(text) + 1
    assert len(seen) == len(marks) + 2
    assert seen["tokens"] > 0.95 * rows.size


def test_rows_depend_on_seed_and_index_alone():
    rows = documents(TOKENIZER, 5, 6, 2000, ["single_needle", "tracing"], CODE, progress=False)
    again = documents(TOKENIZER, 5, 4, 2000, ["single_needle", "tracing"], CODE, progress=False)
    assert (again == rows[:4]).all()
    others = documents(TOKENIZER, 7, 6, 2000, ["single_needle", "tracing"], CODE, progress=False)
    assert len({row.tobytes() for row in (*rows, *others)}) == 12
    rows = documents(TOKENIZER, 5, 8, 16_000, ["single_needle", "tracing"], CODE, progress=False)
    has_code = ["r'''" in TOKENIZER.decode(row.tolist()) for row in rows]
    assert has_code == [False, True] * 4


def test_sizes_are_log_uniform_and_families_weighted():
    rows = documents(TOKENIZER, 0, 200, 3600, ["multi_key", "multi_key", "multi_key", "tracing_terse"], progress=False)
    firsts = [pieces(row)[0][0] for row in rows]
    sizes = np.log([tokens(text) / SHORTEST for text in firsts]) / np.log(3600 / SHORTEST)
    counts = np.histogram(sizes.clip(0), bins=4, range=(0, 1))[0]  # an example may lack a line, so be below
    assert (abs(counts - 50) < 4 * np.sqrt(50)).all()
    assert np.mean(["_" in text for text in firsts]) == pytest.approx(0.75, abs=0.12)  # four standard errors


def test_rows_of_training_stay_what_they_were():
    """The shipped model that answers questions was trained on such rows."""
    code = ["x = 1\n" * 300, "y = [2]\n" * 200]
    rows = documents(TOKENIZER, 4, 6, 2049, tasks.RETRIEVAL, code, progress=False)
    assert hashlib.sha256(rows.tobytes()).hexdigest().startswith("721e9d8668498649")


@pytest.mark.parametrize("long_share", [0.5, 1.0])
def test_long_rows_are_one_example(long_share):
    """At most a line is missing, and what is left is too little for a whole one."""
    rows = documents(TOKENIZER, 1, 100, 1500, ["single_needle"], progress=False, long_share=long_share)
    n_long = sum(tokens(pieces(row)[0][0]) > 1500 - 40 for row in rows)
    assert n_long == 100 if long_share == 1 else 35 < n_long < 65


# ---- Bad input -----------------------------------------------------------------------------------------------------


@every_family
def test_families_refuse_bad_lengths_and_code(family):
    for length in (0, 15, True, 500.0, "500"):
        with pytest.raises(ValueError, match=f"length: got {length}; allowed: "):
            make(family, 0, length)
    with pytest.raises(ValueError, match="code: got one text; allowed: a sequence of texts"):
        make(family, 0, 500, "x = 1\n")


@every_family
def test_the_shortest_length_is_enough_for_every_seed(family):
    for seed in range(300):
        example = make(family, seed, SHORTEST)
        assert len(example.prompt + example.answer) <= SHORTEST


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("every", 0, "an integer ≥ 1"),
        ("every", 1.0, "an integer ≥ 1"),
        ("distances", (0, 3), "two integers"),
        ("distances", (3, 2), "two integers"),
        ("distances", (1, 2, 3), "two integers"),
        ("distances", (1, 2.5), "two integers"),
        ("distances", 7, "two integers"),
    ],
)
def test_tracing_refuses_bad_options(option, value, allowed):
    with pytest.raises(ValueError, match=f"{option}: got {re.escape(str(value))}; allowed: {allowed}"):
        tracing(TOKENIZER, rng(), 1000, **{option: value})


def test_tracing_needs_names(monkeypatch):
    monkeypatch.setattr(tasks, "NAMES_LEAST", 5000)
    other = make_tokenizer({bytes([byte]): byte for byte in range(256)})  # one whose names nobody asked for yet
    with pytest.raises(ValueError, match="tokenizer: got resa-code; allowed: one that splits 5000 names"):
        tracing(other, rng(), 1000)


@pytest.mark.parametrize(
    ("argument", "value", "given"),
    [
        ("seed", -1, "-1"),
        ("count", 1.5, "1.5"),
        ("length", SHORTEST - 1, str(SHORTEST - 1)),
        ("families", "tracing", "'tracing'"),
        ("families", [], r"\[\]"),
        ("families", ["tracing", "sorting"], "'sorting'"),
        ("code", "x = 1\n", "one text"),
        ("long_share", 1.5, "1.5"),
    ],
)
def test_documents_refuse_bad_input(argument, value, given):
    good = {"seed": 0, "count": 1, "length": 1000, "families": ["single_needle"], "code": (), "progress": False}
    with pytest.raises(ValueError, match=f"{argument}: got {given}; allowed: "):
        documents(TOKENIZER, **{**good, argument: value})


def test_documents_refuse_a_vocabulary_too_large_for_their_type():
    with pytest.raises(ValueError, match="tokenizer: got 70000 tokens; allowed: ≤ 65536"):
        documents(SimpleNamespace(n_vocab=70_000), 0, 2, 1000, ["tracing"], progress=False)
