"""The interactive page: its data are the models', and a browser shows what they say.

Tests of the page drive the system's Chromium over it as it lies on the disk.
"""

import base64
import re
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
import torch

from resa.reference import ReSAConfig, active_blocks, prefill, rectify, sparse_step
from resa.reference.lab.fidelity import kv_drift, read, read_ratio
from resa.reference.lab.programs import Check, Program
from resa.reference.weights.checkpoint import file_digest
from resa.reference.weights.models import find_model, open_model
from small_models import EXACT, VISIBLE, Shape

PLAY = Path(__file__).parents[2] / "docs" / "play"
sys.path.insert(0, str(PLAY.parent))
import record_play  # noqa: E402  a script of the documentation, in no package

INTERVALS, RATIOS = [8, 16, 32], [0.05, 0.1, 0.2]
WAYS = ["sparse", "ReSA f=32", "ReSA f=16", "ReSA f=8", "decode-only"]
MODELS = {"smollm2": (2048, 256, 8), "carrying": (512, 768, 16)}  # tokens prefilled and decoded, texts


@pytest.fixture(scope="module")
def data():
    return record_play.read_script()


@pytest.fixture(scope="module", params=list(MODELS))
def scene(data, request):
    return next(each for each in data["scenes"] if each["model"] == request.param)


def opened(scene):
    """The scene's model, where it is installed."""
    try:
        path = find_model(scene["model"])
    except FileNotFoundError as error:
        pytest.skip(str(error))
    assert scene["sha256"] == file_digest(path)
    return open_model(scene["model"])


def find(scene, ratio, way):
    """One way of decoding."""
    return next(each for each in scene["settings"] if each["ratio"] == ratio)["ways"][way]


def selected(scene, ratio, way):
    """Blocks attended: [rows, blocks, steps] bool."""
    [packed] = [each["selected"] for each in scene["settings"] if each["ratio"] == ratio]
    together = np.frombuffer(zlib.decompress(base64.b64decode(packed)), dtype=np.uint8)
    rows, steps = len(scene["layers"]) * scene["kv_heads"], scene["steps"]
    return together.reshape(rows, -1, steps) >> WAYS.index(way) & 1 == 1


def drift_now(data, scene, ratio, way, step, rectified=False):
    """The largest drift of any token in a way's cache after a step, or after the rectification behind it."""
    interval = int(way[7:]) if way.startswith("ReSA") else step + 1
    exact = (step if rectified else step - 1) // interval * interval
    return max([0, *find(scene, ratio, way)["drift"][exact:step]]) * data["drift_unit"]


# ---- The data --------------------------------------------------------------------------------------------------------


def test_the_page_is_light_enough_and_whole():
    assert (PLAY / "data.js").stat().st_size <= 400_000
    page = (PLAY / "index.html").read_text()
    for name in re.findall(r'(?:src|href)="([^"#]+)"', page):
        assert name.startswith("data:") or (PLAY / name).exists(), name
    for path in PLAY.iterdir():  # nothing to be fetched from anywhere
        assert not re.search(r"\bhttps?://|\bfetch\(|@import|\burl\(", path.read_text()), path


def test_every_way_is_there(data, scene):
    prompt, steps, texts = MODELS[scene["model"]]
    assert (len(scene["prompt"]), len(scene["text"]), len(scene["likeliest"])) == (prompt, steps + 1, steps)
    assert [each["ratio"] for each in scene["settings"]] == RATIOS
    assert data["ways"] == WAYS
    for ratio in RATIOS:
        for way in WAYS:
            entry = find(scene, ratio, way)
            assert len(entry["loss"]) == len(entry["drift"]) == steps
            assert len(entry["losses"]) == texts
            total = sum(entry["loss"]) * scene["loss_unit"]
            assert total == pytest.approx(entry["losses"][scene["chosen"]], abs=steps * scene["loss_unit"] / 2)
            assert min(entry["drift"]) > 0  # of the new token, before it is repaired
            for step, piece in entry["differs"].items():
                assert piece != scene["likeliest"][int(step)]


def test_the_text_shown_is_the_one_nearest_to_the_average(scene):
    """Step error, drift that is left and drift that is repaired: each near its mean."""
    losses = (find(scene, 0.1, way)["losses"] for way in ("sparse", "ReSA f=32", "decode-only"))
    parts = [(exact, resa - exact, sparse - resa) for sparse, resa, exact in zip(*losses, strict=True)]
    means = [mean(part) for part in zip(*parts, strict=True)]
    distances = [sum(abs(own - of_all) for own, of_all in zip(each, means, strict=True)) for each in parts]
    assert distances[scene["chosen"]] == pytest.approx(min(distances), abs=1e-3)


def test_the_page_opens_on_what_the_averages_say(scene):
    """Rectification saves a part of what drift costs, in the text shown and on average."""
    sparse, resa, exact = (find(scene, 0.1, way)["losses"] for way in ("sparse", "ReSA f=32", "decode-only"))
    for of in (mean, lambda losses: losses[scene["chosen"]]):
        assert 0 < of(exact) < of(resa) < of(sparse)


def test_as_many_blocks_are_selected_as_the_rule_says(data, scene):
    lengths = scene["prompt_tokens"] + torch.arange(1, scene["steps"] + 1)
    used = {name: getattr(record_play.CONFIG, name) for name in data["config"]}
    assert used == data["config"]
    for ratio in RATIOS:
        for way, config in record_play.all_ways(ratio).items():
            if way == "decode-only":  # its blocks are not shown
                continue
            mask = selected(scene, ratio, way)
            assert (mask.sum(axis=1) == active_blocks(lengths, config).numpy()).all()
            newest = (lengths.numpy() - 1) // 16
            assert mask[:, newest, range(scene["steps"])].all()  # local
            assert not any(mask[:, last + 1 :, step].any() for step, last in enumerate(newest))
            assert find(scene, ratio, way)["read_share"] == pytest.approx(read_ratio(config), abs=1e-4)


@pytest.mark.site
def test_a_sample_recorded_again_is_what_stands_there(data, scene):
    """One way, every step. On another machine a rounding tie may fall otherwise, which its window shows."""
    text_model, way, ratio = opened(scene), "ReSA f=8", 0.1
    places = {name: scene[name] for name in ("model", "prompt_tokens", "steps", "texts")}
    text = record_play.given_texts(record_play.Scene(**places), text_model.tokenizer)[scene["chosen"]]
    assert record_play.pieces(text_model.tokenizer, text.tokens) == scene["prompt"] + scene["text"]
    assert record_play.check_steps(text, scene["prompt_tokens"]) == scene["checks"]

    reading = read(text_model.model, text.tokens[:-1], scene["prompt_tokens"])
    found = record_play.follow(text_model.model, text, reading, record_play.all_ways(ratio)[way])
    entry, likeliest = find(scene, ratio, way), list(scene["likeliest"])
    for step, piece in entry["differs"].items():
        likeliest[int(step)] = piece
    same = {
        "loss": (found.loss / scene["loss_unit"] - torch.tensor(entry["loss"])).abs() < 0.6,
        "drift": (found.drift / data["drift_unit"] - torch.tensor(entry["drift"])).abs() < 0.6,
        "likeliest": torch.tensor(
            np.equal(record_play.pieces(text_model.tokenizer, found.likeliest.tolist()), likeliest)
        ),
        "selected": (found.selected.numpy() == selected(scene, ratio, way)).all(axis=(0, 1)),
    }
    for name, steps in same.items():
        assert np.mean(np.asarray(steps)) >= 0.95, name


@pytest.mark.parametrize("interval", [None, 3, 1])
@torch.no_grad()
def test_the_recorder_sees_what_step_by_step_decoding_does(interval):
    model, n_prompt, n_steps = Shape(layers=4, kv_heads=2, context=256).model(), 40, 21
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(model.config.vocab_size, (n_prompt + n_steps + 1,), generator=generator)
    text = Program(tokens.tolist(), [Check(at, 0, 0) for at in (n_prompt, n_prompt + 1, n_prompt + n_steps)])
    config = ReSAConfig(block_size=4, min_blocks=2, active_ratio=0.3, interval=interval, schedule="paper")
    reading = read(model, text.tokens[:-1], n_prompt)
    found = record_play.follow(model, text, reading, config)

    taken = []
    ops = replace(model.ops, select_blocks=lambda *each: taken.append(model.ops.select_blocks(*each)) or taken[-1])
    watched, exact, cache = model.with_ops(ops), *(model.new_cache(n_prompt + n_steps, 4) for _ in range(2))
    prefill(model, text.tokens[:-1], exact)
    prefill(model, text.tokens[:n_prompt], cache)
    n_drifted = 0
    for step in range(n_steps):
        logits = sparse_step(watched, text.tokens[n_prompt + step], cache, config)
        n_drifted += 1
        assert int(found.likeliest[step]) == int(logits.argmax())
        drift = kv_drift(cache, exact, torch.tensor([cache.length - 1]))
        torch.testing.assert_close(found.drift[step : step + 1], drift, rtol=1000 * EXACT, atol=EXACT)
        rows = torch.cat([indices[0] for indices in taken[-4:][1::2]])  # the layers shown
        for row, indices in enumerate(rows.tolist()):
            chosen = found.selected[row, :, step].nonzero()[:, 0].tolist()
            assert chosen == sorted(index for index in indices if index >= 0)
        if config.is_pass_due(n_drifted):
            rectify(model, text.tokens[: n_prompt + step + 1][-n_drifted:], cache, n_drifted)
            n_drifted = 0
    assert float(found.drift.min()) > VISIBLE

    # Values are checked where the token before is decoded; English is compared with dense decoding.
    wrong = [int(found.likeliest[step]) != text.tokens[n_prompt + 1 + step] for step in (0, n_steps - 1)]
    assert found.loss.tolist() == [wrong[0], *[0] * (n_steps - 2), wrong[1]]
    english = record_play.follow(model, Program(text.tokens, []), reading, config)
    assert float(english.loss.min()) > 0


# ---- The page --------------------------------------------------------------------------------------------------------

PAGE = (PLAY / "index.html").as_uri()
WIDTHS = {"desktop": (1280, 800), "phone": (390, 844)}


@pytest.fixture
def play(visit):
    """Opens the page at a place, and waits until its data are unpacked."""

    def open_page(place="", **options):
        page = visit(PAGE + place, **options)
        page.wait_for_selector("body[data-ready]")
        return page

    return open_page


def step_shown(page):
    """The step, from the line of state."""
    found = re.match(r"Step (\d+) of", page.locator("#state").inner_text())
    return int(found[1]) if found else None


def row(page, place):
    """The cells of a way: dense, sparse, ReSA, decode-only."""
    return page.locator(f"#ways tr:nth-child({place + 1}) :is(th, td)").all_inner_texts()


def slide(page, name, index):
    """Move a slider to a stop with the keys."""
    page.locator(f"#{name}").press("Home")
    for _ in range(index):
        page.locator(f"#{name}").press("ArrowRight")


@pytest.mark.site
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", WIDTHS)
def test_it_opens_from_a_disk_without_running_over(play, size, scheme, model):
    page = play(f"#step=140&model={model}", size=WIDTHS[size], color_scheme=scheme)
    assert step_shown(page) == 140
    assert page.evaluate("document.documentElement.scrollWidth") <= WIDTHS[size][0]
    for name in ("loss", "drift", "blocks"):  # something is drawn, in more than one colour
        script = """canvas => {
            const image = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
            return new Set(new Uint32Array(image.data.buffer)).size; }"""
        assert page.locator(f"#{name}").evaluate(script) > 3, name


@pytest.mark.site
@pytest.mark.parametrize("size", WIDTHS)
def test_it_plays_and_pauses(play, size):
    page = play("#model=smollm2", size=WIDTHS[size])
    page.locator("#speed").select_option("25")
    page.locator("#play").click()  # from the end it begins again
    page.wait_for_function("/^Step [5-9] /.test(document.getElementById('state').textContent)")
    assert page.locator("#play").get_attribute("aria-label") == "Pause"
    assert page.locator("#state").get_attribute("aria-live") == "off"
    page.locator("#play").click()
    step = step_shown(page)
    page.wait_for_timeout(200)
    assert step_shown(page) == step
    assert page.locator("#state").get_attribute("aria-live") == "polite"


@pytest.mark.site
@pytest.mark.parametrize("size", WIDTHS)
def test_it_opens_on_the_first_of_three_stops(play, data, size):
    """There sparse decoding is wrong and ReSA right; then a window is full, and then it is rectified."""
    page, scene = play(size=WIDTHS[size]), data["scenes"][0]
    assert (scene["model"], step_shown(page)) == ("smollm2", 221)
    assert [row(page, place)[-1][-1] for place in range(4)] == ["✓", "✗", "✓", "✓"]
    page.get_by_label("carried values").check()
    page.locator("#interval").press("Home")
    sentences = []
    for number, (name, drifted) in enumerate({"a sparse step": 29, "drift": 32, "rectification": 0}.items(), start=1):
        stop = page.get_by_role("button", name=f"{number} {name}")
        stop.click()
        assert stop.get_attribute("aria-pressed") == "true"
        assert (row(page, 2)[0], row(page, 2)[4]) == ("ReSA f=32", str(drifted))
        sentences.append(page.locator("#tour").inner_text())
        assert page.locator(".pointed-at").count() == 1
        in_view = "e => e.getBoundingClientRect().top >= 0 && e.getBoundingClientRect().bottom <= innerHeight"
        page.wait_for_timeout(100)
        assert page.locator(".pointed-at").evaluate(in_view)
        assert page.locator("#tour").evaluate(in_view) or size == "desktop"
    assert "reads only 15 of 142 blocks" in sentences[0]
    assert len({*sentences}) == 3
    page.locator("#forward").click()
    assert page.locator("[aria-pressed=true]").count() == page.locator(".pointed-at").count() == 0


@pytest.mark.site
def test_the_end_of_the_real_text_has_the_losses_of_the_whole(play, data):
    page, scene = play("#model=smollm2"), data["scenes"][0]
    assert step_shown(page) == 256
    for place, way in ((1, "sparse"), (2, "ReSA f=32"), (3, "decode-only")):
        entry = find(scene, 0.1, way)
        total = sum(entry["loss"]) * scene["loss_unit"]
        assert row(page, place)[0] == way
        assert row(page, place)[1:3] == [f"{total:.1f}", f"{mean(entry['losses']):.1f}"]


@pytest.mark.site
@pytest.mark.parametrize("step", [70, 200])
def test_the_controls_change_the_numbers_to_what_the_data_say(play, data, scene, step):
    page = play(f"#step={step}&model={scene['model']}")
    n_checked = sum(check < step for check in scene["checks"])
    for i, interval in enumerate(INTERVALS):
        slide(page, "interval", i)
        for j, ratio in enumerate(RATIOS):
            slide(page, "ratio", j)
            assert page.locator("#ratio-value").inner_text() == str(ratio)
            assert page.locator("#interval-value").inner_text() == f"every {interval} tokens"
            assert page.locator("#interval").get_attribute("aria-valuetext") == f"every {interval} tokens"
            drifted = {"sparse": step, f"ReSA f={interval}": (step - 1) % interval + 1, "decode-only": 0}
            for place, (way, count) in enumerate(drifted.items(), start=1):
                entry = find(scene, ratio, way)
                name, score, _, drift, n_drifted, share, likeliest = row(page, place)
                assert (name, n_drifted) == (way, str(count))
                # Rounded, halves either way.
                assert float(share.removesuffix(" %")) == pytest.approx(100 * entry["read_share"], abs=0.0501)
                expected = drift_now(data, scene, ratio, way, step) if count else 0
                assert float(drift) == pytest.approx(expected, abs=1e-6)
                piece = entry["differs"].get(str(step - 1), scene["likeliest"][step - 1])
                assert likeliest.endswith("✓" if piece == scene["text"][step] else "✗")
                lost = sum(entry["loss"][:step]) * scene["loss_unit"]
                if scene["checks"]:
                    assert score == f"{n_checked - lost} of {n_checked}"
                else:
                    assert float(score) == pytest.approx(lost, abs=0.0501)
            assert page.locator("#text .token:not([hidden])").all_text_contents() == scene["text"][: step + 1]


@pytest.mark.site
def test_asserted_values_have_ticks_and_crosses(play, data):
    page, scene = play("#step=3&ratio=0.05&interval=16"), data["scenes"][1]
    page.get_by_label("carried values").check()
    assert step_shown(page) == 768  # another model opens at the end of its text
    ways = [scene["dense"], *(find(scene, 0.05, way) for way in ("sparse", "ReSA f=16"))]
    marks = ["".join("✗" if way["loss"][check] else "✓" for way in ways) for check in scene["checks"]]
    assert page.locator("#text .marks").all_inner_texts() == marks
    assert len({*marks}) > 2


@pytest.mark.site
def test_rectification_drops_the_drift(play, data):
    page, scene = play("#interval=16&ratio=0.1&step=16"), data["scenes"][0]

    def drifts():
        return [float(row(page, place)[3]) for place in (1, 2)]

    now = [pytest.approx(drift_now(data, scene, 0.1, way, 16)) for way in ("sparse", "ReSA f=16")]
    assert drifts() == now
    assert page.locator(".token.drifted").count() == 16
    page.locator("#forward").click()
    assert page.locator("#state").inner_text().startswith("Rectification")
    assert drifts() == [now[0], 0]
    assert page.locator(".token.drifted").count() == 0
    page.locator("#forward").click()
    assert step_shown(page) == 17
    assert drifts()[1] == pytest.approx(drift_now(data, scene, 0.1, "ReSA f=16", 17))
    assert page.locator(".token.drifted").count() == 1


@pytest.mark.site
def test_the_keyboard_does_all(play):
    page = play("#interval=8&step=0")
    press = page.keyboard.press
    for key, step in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("End", 256), ("Home", None)):
        press(key)
        assert step_shown(page) == step, key
    for key in ("End", "ArrowLeft", "Space"):
        press(key)
    page.wait_for_selector("#play[aria-label=Play]")
    assert step_shown(page) == 256
    press("Space")  # from the end it begins again
    page.wait_for_function("/^Step [12] /.test(document.getElementById('state').textContent)")
    press("Space")
    assert page.locator("#play").get_attribute("aria-label") == "Play"
    reached = []
    press("Home")
    for _ in range(13):
        press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.name"))
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert reached[-1] == "" or outline != "none", reached[-1]
    expected = [None] * 3 + ["play", "forward", "scrub", "speed", "model", "interval", "ratio", None, "blocks", "text"]
    assert [name or None for name in reached] == expected
    page.locator("#interval").focus()
    press("ArrowRight")  # the slider's own
    assert (page.locator("#interval-value").inner_text(), step_shown(page)) == ("every 16 tokens", None)
    page.locator("#scrub").focus()
    press("ArrowRight")
    assert step_shown(page) == 1
    page.locator("[name=model]:checked").focus()
    press("ArrowRight")
    assert page.locator("[name=model]:checked").input_value() == "carrying"


@pytest.mark.site
def test_a_block_can_be_looked_at(play, data):
    page = play("#step=30&interval=32&ratio=0.1")
    readers = selected(data["scenes"][0], 0.1, "ReSA f=32")[:, 129, 29].sum()
    blocks = page.locator("#blocks")
    blocks.focus()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Home")
    page.keyboard.press("End")
    caption = page.locator("#inspected")
    assert caption.inner_text().startswith(f"Block 129, tokens 2,064–2,077, read by {readers} of 6: ")
    assert blocks.get_attribute("aria-valuenow") == blocks.get_attribute("aria-valuemax") == "129"
    assert step_shown(page) == 30
    blocks.blur()
    blocks.hover(position={"x": 60, "y": 20})
    assert re.match(r"Block \d, tokens ", caption.inner_text())
    assert page.locator(".block.looked-at").count() == 1


@pytest.mark.site
def test_every_control_has_a_name(play):
    page = play()
    for control in page.locator("button, input, select, [tabindex], canvas").all():
        own = "e.ariaLabel || (e.tagName === 'BUTTON' && e.innerText)"
        name = control.evaluate(f"e => {own} || e.labels?.[0]?.textContent || e.getAttribute('aria-labelledby')")
        assert name, control.evaluate("e => e.outerHTML")
