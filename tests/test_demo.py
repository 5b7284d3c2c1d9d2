"""The demo: its table adds up, its numbers are the measurements', its figure is a picture, its prompt is held out."""

import io
import json
import plistlib
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from small_models import EXACT, VISIBLE, Shape

from resa.reference import ReSAConfig, demo
from resa.reference.corpus import is_held_out
from resa.reference.demo import (
    DEMO_MODULE,
    DemoOptions,
    common_prefix,
    demo_prompt,
    draw_figure,
    run_demo,
    shown_beside,
    side_by_side,
    summarise,
    verdict,
)
from resa.reference.evals.fidelity import decoding_variants, follow, read_ratio, teach
from resa.reference.tokenizer import load_tokenizer

CONFIG = ReSAConfig(block_size=4, active_ratio=0.1, min_blocks=2, schedule="paper")
OPTIONS = DemoOptions(n_tokens=36, intervals=(4, 32), temperature=0.8, seed=3, config=CONFIG)
NAMES = ["dense", "sparse", "ReSA f=32", "ReSA f=4", "decode-only"]
NUMBERS = {
    "kl", "step_error", "drift_loss", "agreement", "mean_drift", "largest_drift", "after_rectification",
    "bytes_per_token", "read_ratio", "cost_model",
}  # fmt: skip


class CodeShape(Shape):
    """A small model over the shipped tokenizer's vocabulary."""

    vocab = 4096


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="module")
def model():
    return CodeShape(seed=5, context=128).model()


@pytest.fixture(scope="module")
def prompt():
    return CodeShape(seed=5).tokens(40)


@pytest.fixture(scope="module")
def watched(model, tokenizer, prompt):
    """The result of one run, and what it printed."""
    console = Console(file=io.StringIO(), width=120, highlight=False)
    return run_demo(model, tokenizer, prompt, OPTIONS, console), console.file.getvalue()


@pytest.fixture(scope="module")
def measured(model, prompt):
    """The same run from the measurements themselves."""
    teacher = teach(model, [prompt], OPTIONS.n_tokens, CONFIG, temperature=0.8, seed=3)
    variants = decoding_variants(CONFIG, OPTIONS.intervals)
    shown = shown_beside(variants)
    return (
        teacher,
        variants,
        {name: follow(model, teacher, config, own_choice=name in shown) for name, config in variants.items()},
    )


# ---- Numbers ---------------------------------------------------------------------------------------------------------


def test_the_result_is_whole_and_fits_into_json(watched):
    result, _ = watched
    assert json.loads(json.dumps(result, allow_nan=False))["rows"] == result["rows"]
    assert list(result["rows"]) == NAMES
    assert all(set(row) == NUMBERS for row in result["rows"].values())
    assert result["prompt_tokens"] == 40
    assert result["options"]["n_tokens"] == 36
    assert result["options"]["config"]["schedule"] == "paper"
    assert list(result["curves"]) == NAMES[1:]
    assert all(len(curve) == 36 for curve in result["curves"].values())
    assert result["seconds"] > 0


def test_every_loss_is_step_error_plus_drift(watched):
    rows = watched[0]["rows"]
    for name, row in rows.items():
        assert row["kl"] == pytest.approx(row["step_error"] + row["drift_loss"], abs=1e-12), name
    assert rows["decode-only"]["drift_loss"] == 0.0
    assert rows["decode-only"]["step_error"] > VISIBLE
    assert {row["step_error"] for name, row in rows.items() if name != "dense"} == {rows["decode-only"]["kl"]}
    assert abs(rows["sparse"]["drift_loss"]) > VISIBLE


def test_the_dense_row_is_the_unit(watched):
    row = watched[0]["rows"]["dense"]
    assert [row[name] for name in ("kl", "step_error", "drift_loss", "mean_drift", "largest_drift")] == [0.0] * 5
    assert [row[name] for name in ("agreement", "read_ratio", "cost_model")] == [1.0] * 3
    assert row["after_rectification"] is None


def test_the_rows_are_the_measurements(watched, measured):
    rows = watched[0]["rows"]
    teacher, variants, found = measured
    # Keys and values of the tokens before each step and of its own, in float64.
    shape = CodeShape(seed=5)
    per_token = shape.layers * shape.kv_heads * 2 * shape.head_dim * 8
    dense = sum((40 + step) * per_token for step in range(1, 37)) / 36
    assert rows["dense"]["bytes_per_token"] == pytest.approx(dense, rel=1e-12)
    for name, comparison in found.items():
        row = rows[name]
        assert row["kl"] == pytest.approx(float(comparison.kl.mean()), rel=1e-6)
        assert row["agreement"] == pytest.approx(float(comparison.agreement.double().mean()), rel=1e-6)
        assert row["mean_drift"] == pytest.approx(float(comparison.mean_drift.mean()), rel=1e-6)
        assert row["largest_drift"] == comparison.largest_drift
        assert row["after_rectification"] == comparison.drift_after_rectification
        assert row["bytes_per_token"] == comparison.bytes_per_token
        assert row["read_ratio"] == pytest.approx(comparison.bytes_per_token / dense, rel=1e-12)
        # 39 tokens are ten blocks of four, and a share of ten blocks is fewer than min_blocks: no model for that.
        blocks = 39 / variants[name].block_size
        is_modelled = variants[name].active_ratio * blocks >= variants[name].min_blocks
        assert row["cost_model"] == (read_ratio(variants[name]) if is_modelled else None)
        assert watched[0]["curves"][name] == comparison.mean_drift[0].tolist()
    assert summarise(teacher, variants, found) == rows  # the same seed, the same numbers


def test_rectification_shows(watched):
    rows, curves = watched[0]["rows"], watched[0]["curves"]
    assert rows["sparse"]["after_rectification"] is None
    for name in ("ReSA f=32", "ReSA f=4", "decode-only"):
        assert rows[name]["after_rectification"] < EXACT
    assert max(curves["decode-only"]) < EXACT
    assert max(curves["ReSA f=4"][3::4]) < EXACT < VISIBLE < curves["ReSA f=4"][2]
    assert curves["ReSA f=32"][31] < EXACT < VISIBLE < min(curves["ReSA f=32"][:31])
    assert min(curves["sparse"]) > VISIBLE


def test_another_seed_is_another_continuation(model, tokenizer, prompt, watched):
    quiet = Console(file=io.StringIO(), quiet=True)
    options = replace(OPTIONS, n_tokens=6, intervals=(4,))
    first, second, other = (
        run_demo(model, tokenizer, prompt, replace(options, seed=seed), quiet) for seed in (3, 3, 4)
    )
    assert first["rows"] == second["rows"]
    assert first["rows"] != other["rows"]
    assert list(first["rows"]) == ["dense", "sparse", "ReSA f=4", "decode-only"]
    assert quiet.file.getvalue() == ""


@pytest.mark.parametrize("schedule", ["fused", "paper"])
def test_where_nothing_is_left_out_nothing_is_lost(model, tokenizer, prompt, schedule):
    options = replace(OPTIONS, n_tokens=8, intervals=(3,), config=replace(CONFIG, active_ratio=1.0, schedule=schedule))
    console = Console(file=io.StringIO(), width=120)
    rows = run_demo(model, tokenizer, prompt, options, console)["rows"]
    for name, row in rows.items():
        assert abs(row["kl"]) < EXACT, name
        assert row["largest_drift"] < EXACT, name
        assert row["agreement"] == 1.0, name
    assert "nan" not in console.file.getvalue()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_tokens": 1}, "tokens: got 1; allowed: an integer ≥ 2"),
        ({"n_tokens": 8.0}, "tokens: got 8.0; allowed: an integer ≥ 2"),
        ({"intervals": ()}, r"intervals: got \(\); allowed: integers ≥ 1, at least one"),
    ],
)
def test_options_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        DemoOptions(**change)


# ---- What is printed -------------------------------------------------------------------------------------------------


def test_the_tables_name_every_way_of_decoding_and_its_loss(watched):
    result, text = watched
    for name, row in result["rows"].items():
        lines = [line for line in text.splitlines() if line.strip().startswith(name)]
        assert any(f"{row['kl']:.4f}" in line and f"{row['drift_loss']:+.4f}" in line for line in lines), name
        cost = "–" if row["cost_model"] is None else f"{row['cost_model']:.3f}"
        assert any(f"{row['read_ratio']:.3f}" in line and cost in line for line in lines), name
    assert "nan" not in text


def test_the_log_goes_to_standard_error(model, tokenizer, prompt, measured, capsys):
    run_demo(model, tokenizer, prompt, OPTIONS, Console(file=io.StringIO(), width=120))
    out, err = capsys.readouterr()
    assert out == ""
    for name, comparison in measured[2].items():
        loss = float(comparison.kl.mean())
        assert any(name in line and f"{loss:.4f} nats" in line for line in err.splitlines()), name


@pytest.mark.parametrize(("kl", "step_error", "share"), [(0.4, 0.1, "25%"), (0.2, 0.19, "95%"), (0.2, 0.0, "0%")])
def test_the_verdict_gives_the_share_of_step_error(kl, step_error, share):
    assert f" {share} " in verdict({"sparse": {"kl": kl, "step_error": step_error}})


@pytest.mark.parametrize(("kl", "step_error"), [(0.2, 0.2), (0.2, 0.5), (0.0, 0.0)])
def test_the_verdict_claims_no_drift_where_none_is_seen(kl, step_error):
    said = verdict({"sparse": {"kl": kl, "step_error": step_error}})
    assert "%" not in said
    assert "no loss to drift is seen" in said


def test_a_rectified_text_is_shown_whatever_the_intervals(model, tokenizer, prompt):
    console = Console(file=io.StringIO(), width=120, highlight=False)
    run_demo(model, tokenizer, prompt, replace(OPTIONS, n_tokens=4, intervals=(2, 3)), console)
    shown = next(line for line in console.file.getvalue().splitlines() if "dense" in line)
    assert [word for word in shown.split() if word.isascii()] == ["dense", "sparse", "ReSA", "f=3"]
    assert "Other intervals: --intervals" in console.file.getvalue()


def test_a_common_prefix_by_hand():
    assert common_prefix([], []) == 0
    assert common_prefix([1], [2]) == 0
    assert common_prefix([1, 2, 3], [1, 5, 3]) == 1
    assert common_prefix([1, 2, 3], [1, 2, 3]) == 3


@given(st.lists(st.integers(0, 3), max_size=6), st.lists(st.integers(0, 3), min_size=6, max_size=6))
def test_a_common_prefix_is_common_and_the_longest(first, second):
    second = second[: len(first)]
    same = common_prefix(first, second)
    assert first[:same] == second[:same]
    assert first == second or first[same] != second[same]


def continuations(tokenizer, dense, sparse, rectified):
    """A teacher and comparisons that only chose tokens."""
    dense, sparse, rectified = (tokenizer.encode_ordinary(text) for text in (dense, sparse, rectified))
    found = {"sparse": sparse, "ReSA f=8": [0] * len(dense), "ReSA f=32": rectified, "decode-only": [0] * len(dense)}
    return SimpleNamespace(tokens=[dense]), {name: SimpleNamespace(own_tokens=own) for name, own in found.items()}


def rendered(table, **options):
    console = Console(file=io.StringIO(), width=120, **options)
    console.print(table)
    return console.file.getvalue()


def test_continuations_stand_side_by_side(tokenizer):
    table = side_by_side(*continuations(tokenizer, "alpha = 1\n", "alpha = 2\n", "alpha = 1\n"), tokenizer)
    row = next(line for line in rendered(table).splitlines() if "alpha" in line)
    assert (row.count("alpha = 1"), row.count("alpha = 2")) == (2, 1)
    assert row.index("alpha = 1") < row.index("alpha = 2") < row.rindex("alpha = 1")  # dense, sparse, rectified


@pytest.mark.parametrize("indent", ["", "    ", "\t\t"])
def test_what_differs_from_dense_is_coloured(tokenizer, indent):
    told = continuations(tokenizer, f"{indent}a = 1 + 3\n", f"{indent}a = 2 + 3\n", f"{indent}a = 1 + 4\n")
    text = rendered(side_by_side(*told, tokenizer), force_terminal=True, color_system="standard")
    yellow = "\x1b[1;33m"
    assert f"a = {yellow}2 + 3" in text
    assert f"a = 1 + {yellow}4" in text
    assert text.count(yellow) == 2  # nothing of dense


def test_long_continuations_are_cut(tokenizer):
    text = "".join(f"v = {digit}\n" for digit in range(100))
    shown = rendered(side_by_side(*continuations(tokenizer, text, text, text), tokenizer))
    assert "v = 15" in shown
    assert "v = 16" not in shown


# ---- The figure ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "PNG"])
def test_the_figure_is_a_png(watched, tmp_path, suffix):
    path = tmp_path / "new" / "folder" / f"figure.{suffix}"
    draw_figure(watched[0], path, "a file")
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert content[-8:-4] == b"IEND"
    assert [found.name for found in path.parent.iterdir()] == [path.name]  # nothing temporary is left


def test_the_figure_is_an_svg_that_names_its_lines(watched, tmp_path, monkeypatch):
    import matplotlib

    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")  # letters as text, not as outlines
    draw_figure(watched[0], tmp_path / "figure.svg", "subject.py")
    root = ElementTree.parse(tmp_path / "figure.svg").getroot()
    assert root.tag.endswith("svg")
    text = " ".join(root.itertext())
    for expected in ("subject.py", "never rectified", "every 4 tokens", "every 32 tokens", "tokens generated"):
        assert expected in text
    assert "decode-only" not in text  # it is zero throughout


def test_the_figure_draws_the_curves(watched, tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn = []
    plot = Axes.plot

    def record(axes, x, y, *arguments, **options):
        drawn.append((list(x), list(y), options["color"]))
        return plot(axes, x, y, *arguments, **options)

    monkeypatch.setattr(Axes, "plot", record)
    draw_figure(watched[0], tmp_path / "figure.png", "a file")
    curves = watched[0]["curves"]
    assert [y for _, y, _ in drawn] == [curves[name] for name in ("sparse", "ReSA f=32", "ReSA f=4")]
    assert all(x == list(range(1, 37)) for x, _, _ in drawn)
    assert len({color for _, _, color in drawn}) == 3


# ---- The prompt ------------------------------------------------------------------------------------------------------


def test_the_prompt_is_held_out_of_training(tokenizer):
    subject, text = demo_prompt()
    assert is_held_out(DEMO_MODULE)
    assert plistlib.__name__ == DEMO_MODULE
    assert text == Path(plistlib.__file__).read_text(encoding="utf-8")
    assert "plistlib.py" in subject
    assert len(tokenizer.encode_ordinary(text)) > 4096 + 512  # what is read and written by default


def test_a_python_without_that_file_is_told_so(monkeypatch):
    monkeypatch.setattr(demo, "held_out_library", list)
    with pytest.raises(FileNotFoundError, match=r"prompt file: .*plistlib"):
        demo_prompt()
