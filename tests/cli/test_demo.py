"""The demo: its table adds up, its numbers are the measurements', its figure is a picture, its prompt is held out."""

import io
import json
import plistlib
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from resa.reference import ReSAConfig, Sampling, generate
from resa.reference.cli import demo
from resa.reference.cli.demo import (
    DEMO_MODULE,
    DemoOptions,
    demo_prompt,
    draw_figure,
    run_all,
    run_demo,
    side_by_side,
    verdict,
)
from resa.reference.lab.corpus import is_held_out
from resa.reference.lab.fidelity import decoding_variants, read_ratio
from resa.reference.lab.follow import follow, teach
from small_models import VISIBLE, Shape

CONFIG = ReSAConfig(block_size=4, active_ratio=0.1, min_blocks=2, schedule="paper")
OPTIONS = DemoOptions(n_tokens=36, intervals=(4, 32), temperature=0.8, seed=3, config=CONFIG)
NAMES = ["dense", "sparse", "ReSA f=32", "ReSA f=4", "decode-only"]
NUMBERS = {
    "kl", "step_error", "drift_loss", "agreement", "mean_drift", "largest_drift", "after_rectification",
    "bytes_per_token", "read_ratio", "cost_model",
}  # fmt: skip
CodeShape = type("CodeShape", (Shape,), {"vocab": 4096})  # over the shipped tokenizer's vocabulary


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
    row = rows["dense"]  # the unit
    assert [row[name] for name in ("kl", "step_error", "drift_loss", "mean_drift", "largest_drift")] == [0.0] * 5
    assert [row[name] for name in ("agreement", "read_ratio", "cost_model")] == [1.0] * 3
    assert row["after_rectification"] is None


def test_the_rows_are_the_measurements(watched, model, prompt):
    rows = watched[0]["rows"]
    # Keys and values of the tokens before each step and of its own, in float64.
    shape = CodeShape(seed=5)
    per_token = shape.layers * shape.kv_heads * 2 * shape.head_dim * 8
    dense = sum((40 + step) * per_token for step in range(1, 37)) / 36
    assert rows["dense"]["bytes_per_token"] == pytest.approx(dense, rel=1e-12)
    teacher = teach(model, prompt, OPTIONS.n_tokens, CONFIG, temperature=0.8, seed=3)  # the same seed, the same numbers
    for name, config in decoding_variants(CONFIG, OPTIONS.intervals).items():
        found, row = follow(model, teacher, config), rows[name]
        assert row["kl"] == pytest.approx(float(found.kl.mean()), rel=1e-6)
        assert row["agreement"] == pytest.approx(float(found.agreement.double().mean()), rel=1e-6)
        assert row["mean_drift"] == pytest.approx(float(found.mean_drift.mean()), rel=1e-6)
        assert row["largest_drift"] == found.largest_drift
        assert row["after_rectification"] == found.drift_after_rectification
        assert row["bytes_per_token"] == found.bytes_per_token
        assert row["read_ratio"] == pytest.approx(found.bytes_per_token / dense, rel=1e-12)
        # 39 tokens are ten blocks of four, and a share of ten blocks is fewer than min_blocks: no model for that.
        is_modelled = config.active_ratio * 39 / config.block_size >= config.min_blocks
        assert row["cost_model"] == (read_ratio(config) if is_modelled else None)
        assert watched[0]["curves"][name] == found.mean_drift.tolist()


@pytest.mark.parametrize("platform", ["linux", "win32"])
def test_jobs_run_in_processes_or_in_turn(monkeypatch, platform):
    monkeypatch.setattr(demo.sys, "platform", platform)
    jobs = {name: lambda name=name: name * 2 for name in ("a", "b")}
    assert dict(run_all(jobs, torch.device("cpu"))) == {"a": "aa", "b": "bb"}


def test_a_process_that_dies_is_named(monkeypatch):
    monkeypatch.setattr(demo.sys, "platform", "linux")
    with pytest.raises(ChildProcessError, match="sparse: its process ended early"):
        list(run_all({"sparse": lambda: demo.sys.exit(9)}, torch.device("cpu")))


# ---- What is printed -------------------------------------------------------------------------------------------------


def test_the_tables_name_every_way_of_decoding_and_its_loss(watched):
    result, text = watched
    for name, row in result["rows"].items():
        lines = [line for line in text.splitlines() if line.strip().startswith(name)]
        assert any(f"{row['kl']:.4f}" in line and f"{row['drift_loss']:+.4f}" in line for line in lines), name
        cost = "–" if row["cost_model"] is None else f"{row['cost_model']:.3f}"
        read = f"{row['bytes_per_token'] / 2**20:.2f}"
        assert any(f"{row['read_ratio']:.3f}" in line and cost in line and read in line for line in lines), name
    assert "nan" not in text


def test_the_log_goes_to_standard_error(model, tokenizer, prompt, watched, capsys):
    run_demo(model, tokenizer, prompt, OPTIONS, Console(file=io.StringIO(), width=120))
    out, err = capsys.readouterr()
    assert out == ""
    for name in NAMES[1:]:
        loss = watched[0]["rows"][name]["kl"]
        assert any(name in line and f"{loss:.4f} nats" in line for line in err.splitlines()), name


@pytest.mark.parametrize(("kl", "step_error", "share"), [(0.4, 0.1, "25%"), (0.2, 0.19, "95%"), (0.2, 0.0, "0%")])
def test_the_verdict_gives_the_share_of_step_error(kl, step_error, share):
    assert f" {share} " in verdict({"sparse": {"kl": kl, "step_error": step_error}})


@pytest.mark.parametrize(("kl", "step_error"), [(0.2, 0.2), (0.2, 0.5), (0.0, 0.0)])
def test_the_verdict_claims_no_drift_where_none_is_seen(kl, step_error):
    said = verdict({"sparse": {"kl": kl, "step_error": step_error}})
    assert "%" not in said
    assert "no loss to drift is seen" in said


@pytest.mark.parametrize(("intervals", "shown"), [((2, 32, 40), 32), ((2, 3), 3)])
def test_dense_sparse_and_one_rectified_text_are_shown(model, tokenizer, prompt, monkeypatch, intervals, shown):
    """Each as the library writes it: from the same prompt, with the same random numbers."""
    texts = {}
    monkeypatch.setattr(demo, "side_by_side", lambda given, tokenizer: texts.update(given) or "")
    options = replace(OPTIONS, n_tokens=12, intervals=intervals)
    run_demo(model, tokenizer, prompt, options, Console(file=io.StringIO()))
    ways = {"dense": ReSAConfig(4, interval=1)} | decoding_variants(CONFIG, intervals)
    assert list(texts) == ["dense", "sparse", f"ReSA f={shown}"]
    for name, tokens in texts.items():
        own = [torch.Generator().manual_seed(3)]
        assert tokens == generate(model, [prompt], 12, ways[name], Sampling(0.8), generators=own)[0].tokens, name
    assert len({tuple(tokens) for tokens in texts.values()}) > 1


def rendered(table, **options):
    console = Console(file=io.StringIO(), width=120, **options)
    console.print(table)
    return console.file.getvalue()


def continued(tokenizer, *texts):
    tokens = (tokenizer.encode_ordinary(text) for text in texts)
    return side_by_side(dict(zip(("dense", "sparse", "ReSA f=32"), tokens, strict=True)), tokenizer)


def test_continuations_stand_side_by_side(tokenizer):
    shown = rendered(continued(tokenizer, "alpha = 1\n", "alpha = 2\n", "alpha = 1\n"))
    row = next(line for line in shown.splitlines() if "alpha" in line)
    assert (row.count("alpha = 1"), row.count("alpha = 2")) == (2, 1)
    assert row.index("alpha = 1") < row.index("alpha = 2") < row.rindex("alpha = 1")  # dense, sparse, rectified


@pytest.mark.parametrize("indent", ["", "    ", "\t\t"])
def test_what_differs_from_dense_is_coloured(tokenizer, indent):
    table = continued(tokenizer, f"{indent}a = 1 + 3\n", f"{indent}a = 2 + 3\n", f"{indent}a = 1 + 4\n")
    text = rendered(table, force_terminal=True, color_system="standard")
    yellow = "\x1b[1;33m"
    assert f"a = {yellow}2 + 3" in text
    assert f"a = 1 + {yellow}4" in text
    assert text.count(yellow) == 2  # nothing of dense


def test_long_continuations_are_cut(tokenizer):
    text = "".join(f"v = {digit}\n" for digit in range(100))
    shown = rendered(continued(tokenizer, text, text, text))
    assert "v = 15" in shown
    assert "v = 16" not in shown


# ---- The figure ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "PNG"])
def test_the_figure_is_a_png(watched, tmp_path, suffix):
    draw_figure(watched[0], tmp_path / f"figure.{suffix}", "a file")
    content = (tmp_path / f"figure.{suffix}").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert content[-8:-4] == b"IEND"
    assert len(list(tmp_path.iterdir())) == 1  # nothing temporary is left


def test_the_figure_draws_the_curves_and_names_them(watched, tmp_path, monkeypatch):
    import matplotlib
    from matplotlib.axes import Axes

    drawn, plot = [], Axes.plot

    def record(axes, x, y, *arguments, **options):
        drawn.append((list(x), list(y), options["color"]))
        return plot(axes, x, y, *arguments, **options)

    monkeypatch.setattr(Axes, "plot", record)
    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")  # letters as text, not as outlines
    draw_figure(watched[0], tmp_path / "figure.svg", "subject.py")
    curves = watched[0]["curves"]
    assert [y for _, y, _ in drawn] == [curves[name] for name in ("sparse", "ReSA f=32", "ReSA f=4")]
    assert all(x == list(range(1, 37)) for x, _, _ in drawn)
    assert len({color for _, _, color in drawn}) == 3
    root = ElementTree.parse(tmp_path / "figure.svg").getroot()
    assert root.tag.endswith("svg")
    text = " ".join(root.itertext())
    for expected in ("subject.py", "never rectified", "every 4 tokens", "every 32 tokens", "tokens generated"):
        assert expected in text
    assert "decode-only" not in text  # it is zero throughout


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
