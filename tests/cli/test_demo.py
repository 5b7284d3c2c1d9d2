"""The demo: its texts are the library's, its words say what its numbers show, its figure draws them."""

import io
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch
from rich.console import Console

from resa.reference import ReSAConfig, Sampling, generate
from resa.reference.cli import demo_carried
from resa.reference.cli.demo import (
    draw_figure,
    loss_table,
    n_blocks,
    n_read,
    side_by_side,
    verdict,
    what_is_read,
    write_texts,
)
from resa.reference.lab.carried import Checks, Way, marked
from resa.reference.lab.fidelity import decoding_variants
from resa.reference.lab.programs import alias_program
from resa.reference.weights.models import TextModel
from small_models import Shape

CONFIG = ReSAConfig(block_size=4, active_ratio=0.1, min_blocks=2, schedule="paper")
SAMPLING, SEED, N_TOKENS = Sampling(0.8), 3, 36
CodeShape = type("CodeShape", (Shape,), {"vocab": 4096})  # over the shipped tokenizer's vocabulary


def test_every_text_is_the_librarys():
    """From the same prompt, with the same random numbers, whoever else has written from its cache."""
    model, prompt = CodeShape(seed=5, context=128).model(), CodeShape(seed=5).tokens(40)
    ways = {"dense": ReSAConfig(4, interval=1), **decoding_variants(CONFIG, [4])}
    texts = write_texts(model, prompt, N_TOKENS, ways, SAMPLING, SEED)
    assert list(texts) == list(ways)
    for name, tokens in texts.items():
        own = [torch.Generator().manual_seed(SEED)]
        assert tokens == generate(model, [prompt], N_TOKENS, ways[name], SAMPLING, generators=own)[0].tokens, name
    assert len({tuple(tokens) for tokens in texts.values()}) > 2


@pytest.mark.parametrize(("tokens", "read", "there"), [(7, 2, 2), (8, 2, 2), (9, 2, 3), (84, 3, 21), (0, 0, 0)])
def test_how_much_is_read_is_said_and_what_to_change_where_that_is_all(tokens, read, there):
    assert (n_read(CONFIG, tokens), n_blocks(CONFIG, tokens)) == (read, there)
    said = what_is_read(CONFIG, tokens)
    if read < there:
        read_of = f"At the end a sparse step reads {read} of {there} blocks of 4 tokens."
        assert said == f"{read_of} It never reads fewer than 2."
    else:
        assert "a step reads all of them: all ways are dense decoding" in said
        assert "lower --min-blocks" in said


def row(way, kl, step_error, gain, ends, *, recovered=None, drift_ends=(0.01, 0.2)):
    about = {"kl_95": [kl - 0.01, kl + 0.01], "agreement": 0.914, "by_position": {"from": [0, 5], "kl": [kl, 2 * kl]}}
    numbers = {"kl": kl, "step_error": step_error, "drift": kl - step_error, "drift_95": list(drift_ends)}
    numbers |= {"gain": gain, "gain_95": list(ends), "recovered": recovered, "recovered_95": [0.2, 0.5]}
    return {"way": way, **numbers, **about}


def rows(*, drift_ends=(0.01, 0.2)):
    return [
        row("sparse", 0.3, 0.2, 0.0, (0.0, 0.0), drift_ends=drift_ends),
        row("ReSA f=32", 0.29, 0.2, 0.01, (-0.005, 0.02), recovered=0.1),
        row("ReSA f=8", 0.26, 0.2, 0.04, (0.02, 0.06), recovered=0.4),
        row("decode-only", 0.2, 0.2, 0.1, (0.05, 0.2)),
    ]


def test_words_say_which_differences_can_be_distinguished():
    first, *others = verdict(rows())
    assert first.startswith("Sparse decoding loses 0.300 nats a token: 0.200 because it does not read all blocks")
    assert "0.100 because its errors stay in the cache" in first
    assert others[:2] == [
        "Rectifying every 32 tokens cannot be distinguished from never rectifying here.",
        "Rectifying every 8 tokens repairs 0.040, 40% of the drift.",
    ]
    assert "repaired after every token (decode-only), sparse decoding still loses 0.200:" in others[2]
    assert "cannot tell this drift from zero" in verdict(rows(drift_ends=(-0.01, 0.2)))[1]
    assert verdict([]) == []


def rendered(table, width=80, **options):
    console = Console(file=io.StringIO(), width=width, **options)
    console.print(table)
    return console.file.getvalue()


def test_the_table_fits_a_terminal_and_holds_every_number():
    lines = rendered(loss_table(rows())).splitlines()
    assert "…" not in "".join(lines)
    (line,) = (line for line in lines if line.strip().startswith("ReSA f=8"))
    for cell in ("0.260", "0.200", "0.060 [0.010, 0.200]", "40% [20%, 50%]", "91%"):
        assert cell in line
    (exact,) = (line for line in lines if line.strip().startswith("decode-only"))
    assert exact.split() == ["decode-only", "0.200", "0.200", "0", "–", "91%"]


def continued(tokenizer, *texts):
    tokens = (tokenizer.encode_ordinary(text) for text in texts)
    return side_by_side(dict(zip(("dense", "sparse", "ReSA f=32"), tokens, strict=True)), tokenizer)


@pytest.mark.parametrize("indent", ["", "    ", "\t\t"])
def test_continuations_stand_side_by_side_and_what_differs_from_dense_is_coloured(tokenizer, indent):
    table = continued(tokenizer, f"{indent}a = 1 + 3\n", f"{indent}a = 2 + 3\n", f"{indent}a = 1 + 4\n")
    text, yellow = rendered(table, 120, force_terminal=True, color_system="standard"), "\x1b[1;33m"
    line = next(line for line in text.splitlines() if "a = " in line)
    assert line.index("a = 1 + 3") < line.index(f"a = {yellow}2 + 3") < line.index(f"a = 1 + {yellow}4")
    assert text.count(yellow) == 2


def test_long_continuations_are_cut(tokenizer):
    text = "".join(f"v = {digit}\n" for digit in range(100))
    shown = rendered(continued(tokenizer, text, text, text))
    assert "v = 15" in shown
    assert "v = 16" not in shown


def test_the_figure_draws_losses_as_they_add_up_and_their_parts(tmp_path, monkeypatch):
    import matplotlib
    from matplotlib.axes import Axes

    lines, bars = {}, []
    plot, barh = Axes.plot, Axes.barh

    def record_line(axes, x, y, *arguments, **options):
        lines[options["label"]] = (list(x), [round(value, 6) for value in y])
        return plot(axes, x, y, *arguments, **options)

    def record_bars(axes, names, widths, *arguments, **options):
        bars.append([round(width, 6) for width in widths])
        return barh(axes, names, widths, *arguments, **options)

    monkeypatch.setattr(Axes, "plot", record_line)
    monkeypatch.setattr(Axes, "barh", record_bars)
    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")  # letters as text, not as outlines
    draw_figure(rows(), 15, tmp_path / "figure.svg", "a title")
    # Five tokens at 0.3 nats, then ten at 0.6.
    assert lines["sparse"] == ([0, 5, 15], [0.0, 1.5, 7.5])
    assert list(lines) == ["sparse", "ReSA f=32", "ReSA f=8", "decode-only"]
    assert bars == [[0.2] * 4, [0.1, 0.09, 0.06, 0.0]]
    text = " ".join(ElementTree.parse(tmp_path / "figure.svg").getroot().itertext())
    for expected in ("a title", "tokens decoded", "step error", "drift"):
        assert expected in text


def test_programs_are_shown_line_by_line_with_a_mark_for_every_way(tokenizer, monkeypatch):
    monkeypatch.setattr(demo_carried, "N_PROGRAMS", 2)
    monkeypatch.setattr(demo_carried, "LENGTH", 300)
    monkeypatch.setattr(demo_carried, "READ", 100)
    monkeypatch.setattr(demo_carried, "SHOWN", 3)
    model = CodeShape(seed=5, context=300).model(torch.float32)
    console = Console(file=io.StringIO(), width=120)
    result = demo_carried.demo_carried(TextModel(model, tokenizer, [], None), CONFIG, [4], console)
    text = console.file.getvalue()

    # What it prints is what the measurement marks.
    seeds = [(demo_carried.SEED, 300, index, demo_carried.UNSEEN) for index in range(2)]
    programs = [alias_program(tokenizer, np.random.default_rng(seed), 300) for seed in seeds]
    checks = Checks.of(programs, 100)
    never = Way(ReSAConfig(4, 0.1, 2, interval=None, schedule="paper"))
    right = marked(model, programs, checks, [never], 100)
    shares = checks.per_program(right[never]).mean(), checks.per_program(right[None]).mean()
    rows = {row["way"]: row for row in result["rows"]}
    assert (list(rows), result["checks"]) == (["dense", "sparse", "ReSA f=4", "decode-only"], len(checks.at))
    assert rows["dense"]["gain"] == pytest.approx(shares[1] - shares[0])
    for name, share in zip(("sparse", "dense"), shares, strict=True):
        assert rows[name]["right"] == pytest.approx(share)
        (line,) = (line for line in text.splitlines() if line.strip().startswith(f"{name} "))
        assert f"{share:.1%} [" in line
    asserted = [line.split() for line in text.splitlines() if line.strip().startswith("assert ")]
    assert len(asserted) == 3
    code = [tokenizer.decode(program.tokens) for program in programs]
    for words in asserted:
        assert any(f"{' '.join(words[:4])}\n" in each for each in code)
        assert len(words) == 4 + 4  # a mark for dense, sparse, ReSA and decode-only
        assert set(words[4:]) <= {"✓", "✗"}
