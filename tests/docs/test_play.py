"""The interactive page: its data are the shipped model's, and a browser shows what they say.

Tests marked `site` drive the system's Chromium over the page as it lies on the disk.
"""

import hashlib
import re
import sys
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
import torch

from near_ties import near_tie, parting
from resa.reference import ReSAConfig, active_blocks, load_model, load_tokenizer
from resa.reference.lab.corpus import is_held_out
from resa.reference.lab.fidelity import read_ratio
from resa.reference.weights.checkpoint import shipped_checkpoint

PLAY = Path(__file__).parents[2] / "docs" / "play"
sys.path.insert(0, str(PLAY.parent))
import record_play  # noqa: E402  a script of the documentation, in no package

INTERVALS, RATIOS = [8, 16, 32, 64, None], [0.05, 0.1, 0.2]
ROUNDING = 1e-5  # two dense prefills of the same tokens differ by less


@pytest.fixture(scope="module")
def data():
    return record_play.read_script()


def find(data, interval, ratio):
    """The setting of that interval and ratio."""
    return next(each for each in data["settings"] if (each["interval"], each["ratio"]) == (interval, ratio))


def selected(data, setting):
    """Blocks attended: [steps, layer, KV head, bits] bool."""
    runs, base = [], len(data["digits"])
    for long, high, low, short in re.findall(r"(~)(.)(.)|([^~])", setting["selected"]):
        values = [data["digits"].index(digit) for digit in (high + low if long else short)]
        runs.append(values[0] * base + values[1] if long else values[0])
    bits = np.repeat(np.arange(len(runs)) % 2 == 1, runs)  # unselected and selected in turn
    return bits.reshape(data["layers"], data["kv_heads"], -1, len(setting["drift"])).transpose(3, 0, 1, 2)


def drift_now(data, setting, step, rectified=False):
    """The largest drift of any token in the cache after a step, or after the rectification behind it."""
    interval = setting["interval"] or 10**9
    exact = (step if rectified else step - 1) // interval * interval if step else 0
    open_window = [max(layers) * data["drift_unit"] for layers in setting["drift"][exact:step]]
    return max([0.0, *open_window, *setting["rectified"][: exact // interval]])


# ---- The data --------------------------------------------------------------------------------------------------------


def test_the_data_belong_to_the_shipped_checkpoint(data):
    assert data["checkpoint_sha256"] == hashlib.sha256(shipped_checkpoint().read_bytes()).hexdigest()
    config = load_model().config
    assert (data["layers"], data["kv_heads"]) == (config.n_layer, config.n_kv_head)
    assert is_held_out(data["module"])


def test_the_page_is_light_enough_and_whole():
    assert (PLAY / "data.js").stat().st_size <= 400_000
    page = (PLAY / "index.html").read_text()
    for name in re.findall(r'(?:src|href)="([^"#]+)"', page):
        assert name.startswith("data:") or (PLAY / name).exists(), name
    for path in PLAY.iterdir():  # nothing to be fetched from anywhere
        assert not re.search(r"\bhttps?://(?!www\.apple\.com/DTDs)|\bfetch\(|@import|\burl\(", path.read_text()), path


def test_every_setting_is_there_and_rectification_alone_wipes_its_drift(data):
    wanted = [(interval, ratio) for ratio in RATIOS for interval in INTERVALS]
    assert [(each["interval"], each["ratio"]) for each in data["settings"]] == wanted
    assert len(data["prompt"]) == 1024
    assert len(data["dense"]) == 128
    for each in data["settings"]:
        assert len(each["tokens"]) == 128
        assert np.shape(each["drift"]) == (127, data["layers"])
        assert np.shape(each["divergence"]) == (127,)
        assert len(each["rectified"]) == (127 // each["interval"] if each["interval"] else 0)
        assert np.max(each["drift"], axis=1).min() * data["drift_unit"] > 1000 * ROUNDING
        assert max(each["rectified"], default=0) < ROUNDING
        assert not np.any([layers[0] for layers in each["drift"]])  # layer 0 sees the token alone


def test_as_many_blocks_are_selected_as_the_rule_says(data):
    lengths = 1024 + torch.arange(1, 128)
    used = {name: getattr(record_play.CONFIG, name) for name in data["config"]}
    assert used == data["config"]
    for each in data["settings"]:
        config = replace(record_play.CONFIG, interval=each["interval"], active_ratio=each["ratio"])
        mask = selected(data, each)
        assert (mask.sum(axis=-1) == active_blocks(lengths, config).numpy()[:, None, None]).all()
        newest = (lengths.numpy() - 1) // 16
        assert mask[np.arange(127), :, :, newest].all()  # local
        assert not any(mask[step, :, :, newest[step] + 1 :].any() for step in range(127))
        assert each["read_share"] == pytest.approx(read_ratio(config), abs=1e-6)


def test_a_sample_recorded_again_is_what_stands_there(data):
    """18 steps of one setting, two rectifications among them.

    On another machine rounding differs. Then float64 must show a near tie where the tokens part or, if they do not,
    where a selection does. Behind it lies another generation.
    """
    interval, ratio, steps = 8, 0.1, 18
    model, tokenizer = load_model(), load_tokenizer()
    config = replace(record_play.CONFIG, interval=interval, active_ratio=ratio)
    prompt, setting = [tokenizer.encode_single_token(piece) for piece in data["prompt"]], find(data, interval, ratio)
    found = record_play.record(model, prompt, steps + 1, config)

    expected = [tokenizer.encode_single_token(piece) for piece in setting["tokens"][: steps + 1]]
    token = parting(found.tokens, expected)
    theirs = torch.from_numpy(selected(data, setting)[:steps, ..., : found.selected.shape[-1]].copy())
    differs = (found.selected != theirs).flatten(1).any(dim=1)
    step = int(differs.nonzero()[0]) if differs.any() else steps
    same = min(step, steps if token is None else token)  # steps that fed the same tokens and read the same blocks
    if same < steps:
        if token is None:
            tie = near_tie(model, prompt, expected[: step + 1], config)
        else:
            tie = near_tie(model, prompt, expected[:token], config, (found.tokens[token], expected[token]))
        assert tie <= 1

    drift = torch.tensor(setting["drift"][:same]) * data["drift_unit"]
    torch.testing.assert_close(found.drift[:same], drift, atol=data["drift_unit"], rtol=1e-3)
    divergence = torch.tensor(setting["divergence"][:same]) * data["divergence_unit"]
    torch.testing.assert_close(found.divergence[:same], divergence, atol=data["divergence_unit"], rtol=1e-3)
    assert found.rectified.shape == (2, data["layers"])
    assert float(found.rectified.max()) < ROUNDING


def test_the_recorder_decodes_as_generate_does():
    model, tokenizer = load_model(), load_tokenizer()
    prompt = tokenizer.encode_ordinary("import os\n\n\ndef read(path):\n    with open(")
    for interval in (3, None):
        config = ReSAConfig(min_blocks=1, active_ratio=0.4, interval=interval, schedule="paper")
        expected = record_play.generate(model, [prompt], 8, config)[0].tokens
        assert record_play.record(model, prompt, 8, config).tokens == expected


# ---- The page --------------------------------------------------------------------------------------------------------

PAGE = (PLAY / "index.html").as_uri()
WIDTHS = {"desktop": (1280, 800), "phone": (390, 844)}


def shown(page, name):
    """Read one of the numbers."""
    return page.locator(f"#n-{name}").inner_text()


def written(value):
    """Write a drift as the page does."""
    if value == 0 or value >= 1e-3:
        return f"{value:.3f}" if value else "0"
    mantissa, exponent = f"{value:.1e}".split("e-")
    return f"{mantissa}·10⁻{exponent.lstrip('0').translate(str.maketrans('0123456789', '⁰¹²³⁴⁵⁶⁷⁸⁹'))}"


def slide(page, name, index):
    """Move a slider to a stop with the keys."""
    page.locator(f"#{name}").press("Home")
    for _ in range(index):
        page.locator(f"#{name}").press("ArrowRight")


@pytest.mark.site
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", WIDTHS)
def test_it_opens_from_a_disk_without_running_over(visit, size, scheme):
    page = visit(f"{PAGE}#step=40", size=WIDTHS[size], color_scheme=scheme)
    assert shown(page, "step") == "40"
    assert page.evaluate("document.documentElement.scrollWidth") <= WIDTHS[size][0]
    for name in ("blocks", "drift", "divergence"):  # something is drawn, in more than one colour
        script = """canvas => {
            const image = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
            return new Set(new Uint32Array(image.data.buffer)).size; }"""
        assert page.locator(f"#{name}").evaluate(script) > 3, name


@pytest.mark.site
@pytest.mark.parametrize("size", WIDTHS)
def test_it_plays_and_pauses(visit, size):
    page = visit(PAGE, size=WIDTHS[size])
    page.locator("#speed").select_option("25")
    page.locator("#play").click()
    page.wait_for_function("Number(document.getElementById('n-step').textContent) >= 5")
    assert page.locator("#play").get_attribute("aria-label") == "Pause"
    assert page.locator("#state").get_attribute("aria-live") == "off"
    page.locator("#play").click()
    step = shown(page, "step")
    page.wait_for_timeout(200)
    assert shown(page, "step") == step
    assert page.locator("#state").get_attribute("aria-live") == "polite"


@pytest.mark.site
def test_the_sliders_change_the_numbers_to_what_the_data_say(visit, data):
    page = visit(f"{PAGE}#step=70")
    for i, interval in enumerate(INTERVALS):
        slide(page, "interval", i)
        for j, ratio in enumerate(RATIOS):
            slide(page, "ratio", j)
            setting = find(data, interval, ratio)
            largest = list(accumulate((max(layers) * data["drift_unit"] for layers in setting["drift"]), max))
            expected = {
                "step": "70",
                "window": str(70 if interval is None else 69 % interval + 1),
                "length": "1,094",
                "blocks": "69",
                "attended": str(selected(data, setting)[69, 0, 0].sum()),
                "drift": written(drift_now(data, setting, 70)),
                "largest": written(largest[69]),
            }
            assert {name: shown(page, name) for name in expected} == expected
            share = float(shown(page, "share").removesuffix(" %"))
            assert share == pytest.approx(100 * setting["read_share"], abs=0.0501)  # rounded, halves either way
            assert page.locator("#ratio-value").inner_text() == str(ratio)
            name = "never" if interval is None else f"every {interval} tokens"
            assert page.locator("#interval-value").inner_text() == name
            assert page.locator("#interval").get_attribute("aria-valuetext") == name
            text = page.locator("#text .token:not([hidden])").all_text_contents()
            assert text == setting["tokens"][:71]


@pytest.mark.site
@pytest.mark.parametrize("reduced_motion", ["reduce", "no-preference"])
def test_rectification_drops_the_drift(visit, data, reduced_motion):
    page = visit(f"{PAGE}#interval=16&ratio=0.1&step=16", reduced_motion=reduced_motion)
    setting = find(data, 16, 0.1)
    assert (shown(page, "window"), shown(page, "drift")) == ("16", written(drift_now(data, setting, 16)))
    assert page.locator(".token.drifted").count() == 16
    page.locator("#forward").click()
    assert (shown(page, "step"), shown(page, "window"), shown(page, "blocks")) == ("16", "0", "65")
    assert shown(page, "attended") == "65"  # the dense pass reads the whole cache
    assert shown(page, "drift") == written(drift_now(data, setting, 16, rectified=True))
    assert "·10⁻" in shown(page, "drift")
    assert page.locator(".token.drifted").count() == 0
    assert page.locator("#state").inner_text().startswith("Rectification")
    page.locator("#forward").click()
    assert (shown(page, "step"), shown(page, "window")) == ("17", "1")
    assert shown(page, "drift") == written(drift_now(data, setting, 17))


@pytest.mark.site
def test_the_keyboard_does_all(visit):
    page = visit(f"{PAGE}#interval=8")
    press = page.keyboard.press
    for key, step in (("ArrowRight", "1"), ("ArrowRight", "2"), ("ArrowLeft", "1"), ("End", "127"), ("Home", "0")):
        press(key)
        assert shown(page, "step") == step, key
    for key in ("End", "ArrowLeft", "Space"):
        press(key)
    page.wait_for_selector("#play[aria-label=Play]")
    assert shown(page, "step") == "127"
    press("Space")  # from the end it begins again
    page.wait_for_function("['0', '1', '2'].includes(document.getElementById('n-step').textContent)")
    press("Space")
    assert page.locator("#play").get_attribute("aria-label") == "Play"
    reached = []
    press("Home")
    for _ in range(10):
        press("Tab")
        reached.append(page.evaluate("document.activeElement.id"))
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert reached[-1] == "" or outline != "none", reached[-1]
    assert reached[:8] == ["play", "forward", "scrub", "speed", "interval", "ratio", "blocks", "text"]
    page.locator("#interval").focus()
    press("ArrowRight")  # the slider's own
    assert (page.locator("#interval-value").inner_text(), shown(page, "step")) == ("every 16 tokens", "0")
    page.locator("#scrub").focus()
    press("ArrowRight")
    assert shown(page, "step") == "1"


@pytest.mark.site
def test_a_block_can_be_looked_at(visit, data):
    page = visit(f"{PAGE}#step=30&interval=32&ratio=0.1")
    readers = selected(data, find(data, 32, 0.1))[29, :, :, 65].sum()
    blocks = page.locator("#blocks")
    blocks.focus()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Home")
    page.keyboard.press("End")
    caption = page.locator("#inspected")
    assert caption.inner_text().startswith(f"Block 65, tokens 1,040–1,053, read by {readers} of 24: ")
    assert blocks.get_attribute("aria-valuenow") == blocks.get_attribute("aria-valuemax") == "65"
    assert shown(page, "step") == "30"
    blocks.blur()
    blocks.hover(position={"x": 60, "y": 20})
    assert caption.inner_text().startswith("Block 2, tokens 32–47, read by ")
    assert page.locator(".block.looked-at").count() == 1


@pytest.mark.site
def test_every_control_has_a_name(visit):
    page = visit(PAGE)
    for control in page.locator("button, input, select, [tabindex], canvas").all():
        name = control.evaluate("e => e.ariaLabel || e.labels?.[0]?.textContent || e.getAttribute('aria-labelledby')")
        assert name, control.evaluate("e => e.outerHTML")
