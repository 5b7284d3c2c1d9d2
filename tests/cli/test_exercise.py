"""`resa exercise`: right solutions are green, each mistake is told under its rule, and a file is never overwritten."""

import inspect
import re
import signal
from pathlib import Path

import numpy as np
import pytest

from resa.conformance import kit
from resa.conformance.vectors import load_vectors
from resa.examples import numpy_port
from resa.reference.cli import exercise, exercise_cases
from resa.reference.cli.main import main

PORT = inspect.getsource(numpy_port)  # has a right solution of the first three
LOOP = """
import numpy as np

def decode(model, prompt, n_tokens, interval):
    cached, window = list(prompt), 0
    tokens = [int(np.argmax(model.dense_pass(cached, 0)))]
    while len(tokens) < n_tokens:
        cached.append(tokens[-1])
        logits = model.sparse_step(tokens[-1])
        window += 1
        if interval is not None and window == interval:
            start = len(cached) - window
            model.dense_pass(cached[start:], start)
            window = 0
        tokens.append(int(np.argmax(logits)))
    return tokens
"""
SOLUTIONS = {1: PORT, 2: PORT, 3: PORT, 4: LOOP}
FUNCTIONS = {number: names.split() for number, (_, _, names) in exercise.EXERCISES.items()}
SCALE = ("* query.shape[1] ** -0.5", "")
# Exercise: an edit of its solution, and what is said: in the function's own line, then in full.
MISTAKES = {
    1: [
        (*SCALE, "dense_attention, eq. 2: .*D\\*\\*-0.5", "Hint: Divide by sqrt"),
        ("counts[s] + i + 1", "counts[s] + i", "causality: .*including its own", "yours = \\[+0, 0\\]"),
        ("counts[s] + i + 1", "counts[s] + i + 2", "causality", "Hint: Query i stands at T - Q \\+ i and sees itself"),
        ("h // group", "h % keys.shape[1]", "group order: query head h reads KV head h // G"),
        ("end = lengths[s]", "end = keys.shape[2]", "positions: the window ends at each sequence's own length"),
        ("exp(logits - largest)", "exp(logits)", "large logits", "Subtract the largest"),
    ],
    2: [
        (
            "best + list(range(oldest_local, total))",
            "sorted(range(total), key=rank)[:count]",
            "select_blocks, local blocks: the newest are in, whatever they score",
            r"scores = \[\[\[4, 9, 6, 1\]\]\]\n.*\n  right = \[\[\[1, 3\]\]\]\n  yours = \[\[\[1, 2\]\]\]\n",
        ),
        ("-score[i], i)", "-score[i], -i)", "ties: of equal scores the lower block index wins", "argsort"),
        ("= sorted(taken)", "= taken", "order: the right blocks, but not in ascending order"),
        ("- 1e-9", "", "exact products"),
        (
            "mean(axis=2)",
            "sum(axis=2)",
            "score_blocks, pooling",
            r"right = \[\[\[5, -5\]\]\]\n  yours = \[\[\[10, -10\]",
        ),
        ("min((i + 1) * block_size, length)]", "(i + 1) * block_size]", "block_bounds, partial block", "99"),
    ],
    3: [
        (*SCALE, "sparse_attention, eq. 2"),
        ("min((i + 1) * block_size, length))]", "(i + 1) * block_size)]", "partial block", "99"),
        (" if i >= 0", "", "padding: -1 stands for nothing", "in Python it is the last block"),
        ("slice(h * group, (h + 1) * group)", "slice(h, None, keys.shape[1])", "group order"),
        ("len(keys) == 0", "False", "nothing visible", "line \\d+: ValueError: zero-size", "yours = an exception"),
    ],
    4: [
        ("- window\n", "- window + 1\n", "rectification is exact: step 4: .*the newest w tokens", "dense 22–24"),
        (
            "model.dense_pass(cached[start",
            "logits = model.dense_pass(cached[start",
            "schedules: .*sparse step's logits",
        ),
        ("window == interval", "window > interval", "schedules: .*rectification is due, every 4"),
        ("cached[start:], start", "cached[start:], len(cached)", "sparse step: .*every step caches one token more"),
        ("return", "model.sparse_step(tokens[-1])\n    return", "end of generation: .*last token is never fed"),
        ("return tokens", "return [*tokens, 0]", "end of generation", "passes = \\[dense 0–20\\]"),
        ("return tokens", "return", "end of generation: a NoneType is returned"),
        ("(cached, 0)", "(cached[:-1], 0)", "prefill"),
    ],
}


@pytest.fixture
def asked(called, tmp_path, monkeypatch):
    """Asks for an exercise in a folder of its own, with the file's text if there is one → status, output, errors."""
    monkeypatch.chdir(tmp_path)

    def ask(number, source=None):
        if source is not None:
            Path(f"exercise_{number}.py").write_text(source)
        return called(main, "exercise", number)

    return ask


@pytest.mark.parametrize("number", SOLUTIONS)
def test_right_solutions_are_green(asked, number):
    status, out, err = asked(number, SOLUTIONS[number])
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert [re.split(" +", line)[:2] for line in lines[:-1]] == [[name, "green"] for name in FUNCTIONS[number]]
    assert lines[-1].startswith("Everything is green.")
    assert ("resa exercise" in lines[-1]) == (number < 4)
    assert [path.name for path in Path().iterdir()] == [f"exercise_{number}.py"], "nothing is left beside it"


@pytest.mark.parametrize(
    ("number", "old", "new", "said"),
    [(number, *each[:2], each[2:]) for number in MISTAKES for each in MISTAKES[number]],
)
def test_mistakes_are_told_under_their_rule(asked, number, old, new, said):
    source = SOLUTIONS[number]
    assert old in source
    status, out, err = asked(number, source.replace(old, new))
    assert (status, err) == (1, "")
    assert len(re.findall("^\\w+ +red ", out, re.MULTILINE)) == 1
    assert all(re.search(each, out) for each in said), out
    assert re.search("\nMore on it: docs/porting.md, (law|section) [0-9.]+$", out.rstrip())


@pytest.mark.parametrize("number", SOLUTIONS)
def test_the_first_call_writes_a_file_that_says_what_to_do(asked, number):
    status, out, err = asked(number)
    assert (status, err) == (1, "")
    path = Path(f"exercise_{number}.py")
    assert f"{path} is new. Write {', '.join(FUNCTIONS[number])} and" in out
    assert re.search(r"docs/tutorials/\d\d_\w+\.md", out)[0].endswith(f"{exercise.EXERCISES[number][1]}.md")
    module = kit.load_port(str(path))
    assert [name for name, _ in inspect.getmembers(module, inspect.isfunction)] == sorted(FUNCTIONS[number])

    # It says the same in the file, and once more when it is checked, without a traceback.
    before = path.read_bytes()
    status, out, err = asked(number)
    assert (status, err) == (1, "")
    assert out == "".join(f"{name:18}{'red':7}not written yet\n" for name in FUNCTIONS[number])
    assert path.read_bytes() == before
    for name in FUNCTIONS[number]:
        parameters = inspect.signature(getattr(module, name)).parameters
        assert all(parameter in inspect.getdoc(getattr(module, name)) for parameter in parameters)


def test_without_a_number_the_exercises_are_listed(called):
    status, out, err = called(main, "exercise")
    assert (status, err) == (0, "")
    assert re.findall(r"^(\d) .*(docs/tutorials/\d\d_\w+\.md)$", out, re.MULTILINE) == [
        (str(number), f"docs/tutorials/{tutorial}.md") for number, (_, tutorial, _) in exercise.EXERCISES.items()
    ]


def test_a_file_may_have_another_name(called, tmp_path):
    path = tmp_path / "new" / "mine.py"
    assert called(main, "exercise", 3, "--file", path)[1].startswith(f"{path} is new.")
    path.write_text(PORT)
    assert called(main, "exercise", 3, "--file", path)[0] == 0


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("def f(:\n", "SyntaxError: .*line 1"),
        ("x = 1\ny = x / 0\n", "ZeroDivisionError: division by zero at exercise_2.py:2"),
        ("import no_such_module\n", "no_such_module"),
    ],
)
def test_a_file_that_cannot_be_imported_is_one_line(asked, source, said):
    status, out, err = asked(2, source)
    assert (status, out) == (2, "")
    assert re.fullmatch(f"resa exercise: exercise_2.py can't be imported: .*{said}.*\n", err), err


@pytest.mark.parametrize(
    "arguments", [["5"], ["two"], ["1", "--file", "a.txt"], ["1", "--file", "."], ["--file", "a.py"]]
)
def test_bad_arguments_are_one_line(called, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    status, out, err = called(main, "exercise", *arguments)
    assert (status, out) == (2, "")
    assert re.fullmatch("resa exercise: [^\n]+\n", err)
    assert list(tmp_path.iterdir()) == []


def test_an_exception_is_told_with_its_line(asked):
    """No rule is blamed for code that does not run at all. The other functions are checked all the same."""
    source = PORT.replace("keys = numbers(keys)\n", "keys = numbers(keyz)\n", 1)
    line = source[: source.index("keyz")].count("\n") + 1
    status, out, err = asked(2, source)
    assert (status, err) == (1, "")
    told = f"line {line}: NameError: name 'keyz' is not defined"
    assert out.splitlines()[0] == f"{'block_bounds':18}{'red':7}{told}"
    assert [re.split(" +", each)[1] for each in out.splitlines()[1:]] == ["green", "green"]
    assert asked(2, "x = 1\n")[1].count("the file has no such function") == 3
    assert "red    line 5: ZeroDivisionError" in asked(4, LOOP.replace("list(prompt), 0", "list(prompt), 1 / 0"))[1]


def test_what_never_ends_is_stopped_in_its_line(asked, monkeypatch):
    monkeypatch.setattr(exercise, "LIMIT", 0.2)
    running = signal.getitimer(signal.ITIMER_REAL), signal.getsignal(signal.SIGALRM)
    _, out, _ = asked(1, "def dense_attention(query, keys, values, lengths):\n    while True:\n        pass\n")
    assert re.search(r"red    line [23]: TimeoutError: no result within 0\.2 s\n", out)
    left = signal.getitimer(signal.ITIMER_REAL)
    assert signal.getsignal(signal.SIGALRM) == running[1]
    assert (left[0] > 0) == (running[0][0] > 0), "a timer that was there goes on"


@pytest.mark.parametrize("name", [name for names in FUNCTIONS.values() for name in names])
def test_cases_are_the_kits_small_ones_first_and_each_rule_has_a_hint(name):
    vectors = load_vectors()
    operation = "decode_trace" if name == "decode" else name
    own, cases = exercise_cases.lessons(vectors, operation)
    recorded = {entry["case"]: entry for entry in vectors.entries() if entry["operation"] == operation}
    rules = {case["law"].removeprefix("law ").split(" ", 1)[1] for case in cases}
    if name != "decode":  # its entries name what they are about, and a trace what broke
        assert rules <= exercise_cases.HINTS.keys()
        sizes = [sum(array.size for array in own.arrays(case).values()) for case in cases]
        n_small = sum(case["case"].startswith("small_") for case in cases)
        assert max(sizes[:n_small]) <= exercise.SHOWN
        assert n_small >= 2
        cases = cases[n_small:]
    assert len(cases) >= 5
    assert all(case["case"] in recorded and case["says"] == recorded[case["case"]]["says"] for case in cases)


def test_every_hint_belongs_to_a_rule_of_the_kit():
    laws = " ".join(path.read_text() for path in Path(kit.__file__).parent.glob("*.py"))
    laws += " ".join(f'"{entry["law"]}"' for entry in load_vectors().entries())
    for rule in exercise_cases.HINTS:
        assert re.search(rf'"(law )?[\d.]+ {rule}"', laws), rule


def test_what_is_shown_is_short():
    assert exercise._plain(np.array([[1.0, -0.25], [1 / 3, np.inf]])) == "[[1, -0.25], [0.3333, inf]]"
    assert exercise._plain([np.int32(3), "a"]) == "[3, a]"
    assert exercise._plain(np.float32(2)) == "2"
