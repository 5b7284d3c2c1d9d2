"""The demo: its numbers are the measurements', its texts are the library's, its figure shows the curves."""

import io
import plistlib
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from rich.console import Console

from resa.reference import ReSAConfig, Sampling, generate
from resa.reference.cli import demo
from resa.reference.cli.demo import DEMO_MODULE, demo_prompt, draw_figure, loss_table, run_demo, side_by_side
from resa.reference.lab.corpus import is_held_out
from resa.reference.lab.fidelity import compare, decoding_variants, read, read_ratio
from small_models import VISIBLE, Shape

CONFIG = ReSAConfig(block_size=4, active_ratio=0.1, min_blocks=2, schedule="paper")
SAMPLING, SEED, N_TOKENS = Sampling(0.8), 3, 36
CodeShape = type("CodeShape", (Shape,), {"vocab": 4096})  # over the shipped tokenizer's vocabulary


@pytest.fixture(scope="module")
def model():
    return CodeShape(seed=5, context=128).model()


@pytest.fixture(scope="module")
def prompt():
    return CodeShape(seed=5).tokens(40)


@pytest.fixture(scope="module", params=[((4, 32), 32), ((2, 3), 3)], ids=str)
def run(model, prompt, request):
    """One run → its ways of decoding, the interval whose text is shown, and what it found."""
    intervals, shown = request.param
    variants = decoding_variants(CONFIG, intervals)
    return variants, shown, *run_demo(model, prompt, N_TOKENS, variants, SAMPLING, SEED)


def test_dense_sparse_and_one_rectified_text_are_shown(run, model, prompt):
    """Each as the library writes it: from the same prompt, with the same random numbers."""
    variants, shown, texts, _, _ = run
    ways = {"dense": ReSAConfig(4, interval=1)} | variants
    assert list(texts) == ["dense", "sparse", f"ReSA f={shown}"]
    for name, tokens in texts.items():
        own = [torch.Generator().manual_seed(SEED)]
        assert tokens == generate(model, [prompt], N_TOKENS, ways[name], SAMPLING, generators=own)[0].tokens, name
    assert len({tuple(tokens) for tokens in texts.values()}) > 1


def test_the_rows_are_the_measurements(run, model, prompt):
    """Every loss is step error and drift; the cache of decode-only is exact, so its loss is step error alone."""
    variants, _, texts, rows, curves = run
    assert list(rows) == list(curves) == list(variants)
    reading = read(model, prompt + texts["dense"], len(prompt))
    step_error = compare(model, reading, variants["decode-only"])["kl"].mean()
    assert step_error > VISIBLE
    for name, config in variants.items():
        found, row = compare(model, reading, config), rows[name]
        assert row["kl"] == pytest.approx(found["kl"].mean(), abs=1e-12)
        assert row["step_error"] == pytest.approx(step_error, abs=1e-12)
        assert row["drift_loss"] == pytest.approx(row["kl"] - step_error, abs=1e-12)
        assert row["agreement"] == found["agreement"].mean()
        assert row["mean_drift"] == found["mean_drift"].mean()
        assert curves[name] == found["mean_drift"].tolist()
        assert row["read_ratio"] is None  # a tenth of ten blocks is less than min_blocks: no model for that
    assert abs(rows["sparse"]["drift_loss"]) > VISIBLE


def test_the_cost_model_is_given_where_it_holds(model, prompt):
    variants = decoding_variants(ReSAConfig(4, 0.5, 2), [4])
    rows = run_demo(model, prompt, 2, variants, SAMPLING, SEED)[1]
    assert {name: row["read_ratio"] for name, row in rows.items()} == {n: read_ratio(c) for n, c in variants.items()}


def rendered(table, **options):
    console = Console(file=io.StringIO(), width=120, **options)
    console.print(table)
    return console.file.getvalue()


def test_the_table_names_every_way_of_decoding_and_its_loss(run):
    rows = run[3]
    lines = rendered(loss_table(rows)).splitlines()
    for name, row in rows.items():
        (line,) = (line for line in lines if line.strip().startswith(name))
        cells = f"{row['kl']:.4f}", f"{row['step_error']:.4f}", f"{row['drift_loss']:+.4f}", "–"
        assert all(cell in line for cell in cells), line


def continued(tokenizer, *texts):
    tokens = (tokenizer.encode_ordinary(text) for text in texts)
    return side_by_side(dict(zip(("dense", "sparse", "ReSA f=32"), tokens, strict=True)), tokenizer)


@pytest.mark.parametrize("indent", ["", "    ", "\t\t"])
def test_continuations_stand_side_by_side_and_what_differs_from_dense_is_coloured(tokenizer, indent):
    table = continued(tokenizer, f"{indent}a = 1 + 3\n", f"{indent}a = 2 + 3\n", f"{indent}a = 1 + 4\n")
    text, yellow = rendered(table, force_terminal=True, color_system="standard"), "\x1b[1;33m"
    row = next(line for line in text.splitlines() if "a = " in line)
    assert row.index("a = 1 + 3") < row.index(f"a = {yellow}2 + 3") < row.index(f"a = 1 + {yellow}4")
    assert text.count(yellow) == 2


def test_long_continuations_are_cut(tokenizer):
    text = "".join(f"v = {digit}\n" for digit in range(100))
    shown = rendered(continued(tokenizer, text, text, text))
    assert "v = 15" in shown
    assert "v = 16" not in shown


def test_the_figure_draws_the_curves_and_names_them(tmp_path, monkeypatch):
    import matplotlib
    from matplotlib.axes import Axes

    curves = {"sparse": [0.5, 0.7], "ReSA f=32": [0.5, 0.0], "ReSA f=4": [0.4, 0.2], "decode-only": [0.0, 0.0]}
    drawn, plot = [], Axes.plot

    def record(axes, x, y, *arguments, **options):
        drawn.append((list(x), list(y), options["color"]))
        return plot(axes, x, y, *arguments, **options)

    monkeypatch.setattr(Axes, "plot", record)
    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")  # letters as text, not as outlines
    draw_figure(curves, tmp_path / "figure.svg", "subject.py")
    assert [(x, y) for x, y, _ in drawn] == [([1, 2], curves[n]) for n in ("sparse", "ReSA f=32", "ReSA f=4")]
    assert len({color for _, _, color in drawn}) == 3
    text = " ".join(ElementTree.parse(tmp_path / "figure.svg").getroot().itertext())
    for expected in ("subject.py", "never rectified", "every 4 tokens", "every 32 tokens", "tokens generated"):
        assert expected in text
    assert "decode-only" not in text  # it is zero throughout


def test_the_prompt_is_held_out_of_training(tokenizer, monkeypatch):
    subject, text = demo_prompt()
    assert is_held_out(DEMO_MODULE)
    assert text == Path(plistlib.__file__).read_text(encoding="utf-8")
    assert "plistlib.py" in subject
    assert len(tokenizer.encode_ordinary(text)) > 4096 + 512  # what is read and written by default
    monkeypatch.setattr(demo, "held_out_library", list)
    with pytest.raises(FileNotFoundError, match=r"prompt file: .*plistlib"):
        demo_prompt()
