"""Record the data of docs/play in docs/play/data.js: python docs/record_play.py.

Two models are led along given text: a real one along English, and the shipped one that carries values along programs.
Every way of decoding reads the same tokens, so all of them can be compared token by token, with dense decoding as the
measure. The page shows one text of each kind, the one whose loss is made up most nearly as on average. This takes about
a quarter of an hour on one CPU core.
"""

import base64
import json
import platform
import sys
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from resa.reference import GPT, ReSAConfig
from resa.reference.lab import parallel
from resa.reference.lab.carried import SEED
from resa.reference.lab.corpus import read_documents
from resa.reference.lab.fidelity import Reading, decoding_variants, divergence, largest_error, read, read_ratio
from resa.reference.lab.programs import UNSEEN, Program, alias_program
from resa.reference.weights.checkpoint import file_digest
from resa.reference.weights.files import source_digest, write_atomically
from resa.reference.weights.models import TextModel, Tokenizer, find_model, open_model

DATA = Path(__file__).parent / "play" / "data.js"
NAME = "RESA_PLAY"  # the one global variable that data.js sets

INTERVALS, RATIOS = (8, 16, 32), (0.05, 0.1, 0.2)
# A step reads at least 4 blocks. With the default of 16, most ratios would read the same of so short a cache.
CONFIG = ReSAConfig(min_blocks=4, schedule="paper")
WAYS = tuple(decoding_variants(CONFIG, INTERVALS))  # sparse, the intervals, decode-only
RATIO, RESA = 0.1, "ReSA f=32"  # the text is chosen, and the page opens, with these
LOSS_UNIT, DRIFT_UNIT = 1e-3, 1e-2  # both are stored as whole numbers of these


@dataclass(frozen=True)
class Scene:
    """A model and what it reads."""

    model: str
    prompt_tokens: int  # prefilled
    steps: int  # decoded, a token each
    texts: int  # one of them is shown


SCENES = (Scene("smollm2", 2048, 256, 8), Scene("carrying", 512, 768, 16))


@dataclass(frozen=True)
class Decoded:
    """One way along one text, for each of S steps."""

    loss: Tensor  # [S] see `loss_of`
    likeliest: Tensor  # [S] the token that comes next
    drift: Tensor  # [S] drift of the new token, before a rectification repairs it
    selected: Tensor  # [rows, M, S] bool, blocks read by the heads of `shown_layers`


def given_texts(scene: Scene, tokenizer: Tokenizer) -> list[Program]:
    """Texts of one token more than is fed; English asserts nothing."""
    length = scene.prompt_tokens + scene.steps + 1
    if scene.model == "carrying":
        seeds = [(SEED, length, index, UNSEEN) for index in range(scene.texts)]
        return [alias_program(tokenizer, np.random.default_rng(seed), length) for seed in seeds]
    return [Program(tokens, []) for tokens in read_documents("english", tokenizer, scene.texts, length)]


def shown_layers(n_layers: int) -> list[int]:
    """The last layer of either half; all of them would be too much to store."""
    return [n_layers // 2 - 1, n_layers - 1]


def check_steps(text: Program, prompt_tokens: int) -> list[int]:
    """The steps, counted from 0, whose next token is an asserted value."""
    return [check.at - 1 - prompt_tokens for check in text.checks if check.at > prompt_tokens]


@torch.no_grad()
def follow(model: GPT, text: Program, reading: Reading, config: ReSAConfig) -> Decoded:
    """Decode along the text, all steps at once, and watch what every layer selects."""
    watched, select = [], parallel.selected_tokens

    def selected_tokens(*arguments: object) -> Tensor:
        watched.append(select(*arguments))  # [1, Hkv, S, T]
        return watched[-1]

    n_prompt, exact = reading.prompt_tokens, reading.exact
    with patch.object(parallel, "selected_tokens", selected_tokens):
        decoded = parallel.decode_at_once(model, exact, config, n_prompt)
    log_probs = model.output(decoded.hidden[0, n_prompt:]).log_softmax(dim=-1)
    pairs = (decoded.keys, exact.keys), (decoded.values, exact.values)
    drift = largest_error((torch.cat(own), torch.cat(dense)[:, :, n_prompt:]) for own, dense in pairs)
    layers = [watched[layer][0] for layer in shown_layers(model.config.n_layer)]
    selected = torch.cat(layers)[..., :: config.block_size].transpose(1, 2)
    return Decoded(loss_of(text, reading, log_probs), log_probs.argmax(dim=-1), drift, selected)


def loss_of(text: Program, reading: Reading, log_probs: Tensor) -> Tensor:
    """Loss of every step, [S]: KL from dense in nats; in programs, 1 for an asserted value that is wrong."""
    if not text.checks:
        return divergence(reading.log_probs, log_probs)
    n_prompt = reading.prompt_tokens
    at, following = check_steps(text, n_prompt), torch.tensor(text.tokens[n_prompt + 1 :])
    loss = torch.zeros(len(following))
    loss[at] = (log_probs.argmax(dim=-1) != following)[at].float()
    return loss


def chosen_text(losses: dict[str, Sequence[float]]) -> int:
    """The text whose parts of the loss are nearest to their means over all: losses of `RATIO`, by way and text.

    The parts are step error, the drift that `RESA` leaves and the drift that it repairs. Their sum is what sparse
    decoding loses.
    """
    sparse, resa, exact = (np.array(losses[way]) for way in ("sparse", RESA, "decode-only"))
    parts = (exact, resa - exact, sparse - resa)
    return int(np.argmin(sum(np.abs(part - part.mean()) for part in parts)))


def packed(selected: Sequence[Tensor]) -> str:
    """Pack the blocks that several ways select, [rows, M, S] each: a byte per place, a bit per way, deflated.

    Ways mostly agree, so each one more costs little.
    """
    together = sum(mask.to(torch.uint8) << bit for bit, mask in enumerate(selected))
    return base64.b64encode(zlib.compress(together.numpy().tobytes(), 9)).decode()


def whole(numbers: Tensor, unit: float) -> list[int]:
    """Round numbers to whole units."""
    return (numbers.double() / unit).round().long().tolist()


def pieces(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[str]:
    """Decode every token by itself. A token that is part of a character becomes a replacement character."""
    return [tokenizer.decode([token]) for token in tokens]


def way_entry(tokenizer: Tokenizer, decoded: Decoded, dense: Tensor, config: ReSAConfig, unit: float) -> dict:
    """Put one way along one text into the form that the page reads."""
    differs = (decoded.likeliest != dense).nonzero()[:, 0].tolist()
    return {
        "read_share": round(read_ratio(config), 4),
        "loss": whole(decoded.loss, unit),
        "drift": whole(decoded.drift, DRIFT_UNIT),
        "differs": dict(zip(differs, pieces(tokenizer, decoded.likeliest[differs].tolist()), strict=True)),
    }


def all_ways(ratio: float) -> dict[str, ReSAConfig]:
    """The configurations of `WAYS`."""
    return decoding_variants(replace(CONFIG, active_ratio=ratio), INTERVALS)


def measure(scene: Scene, opened: TextModel) -> dict[str, object]:
    """Decode along all texts of a scene in every way, and keep one text."""
    # Decode along all of them.
    model, tokenizer = opened.model, opened.tokenizer
    texts, ways = given_texts(scene, tokenizer), {ratio: all_ways(ratio) for ratio in RATIOS}
    readings, found = [], []  # of every text
    for index, text in enumerate(texts):
        print(f"{scene.model}: text {index + 1} of {len(texts)}", file=sys.stderr)
        readings.append(read(model, text.tokens[:-1], scene.prompt_tokens))
        found.append({(p, way): follow(model, text, readings[-1], ways[p][way]) for p in RATIOS for way in WAYS})

    # Choose one, and write down what it and the others lost.
    losses = {key: [float(each[key].loss.sum()) for each in found] for key in found[0]}
    dense = [loss_of(*each, each[1].log_probs) for each in zip(texts, readings, strict=True)]
    chosen = chosen_text({way: losses[RATIO, way] for way in WAYS})
    text, likeliest = texts[chosen], readings[chosen].log_probs.argmax(dim=-1)
    unit = 1 if text.checks else LOSS_UNIT
    settings = []
    for p in RATIOS:
        entries = {}
        for way, config in ways[p].items():
            entries[way] = way_entry(tokenizer, found[chosen][p, way], likeliest, config, unit)
            entries[way]["losses"] = [round(value, 3) for value in losses[p, way]]
        selected = packed([found[chosen][p, way].selected for way in WAYS[:-1]])
        settings.append({"ratio": p, "ways": entries, "selected": selected})
    return {
        **asdict(scene),
        "sha256": file_digest(find_model(scene.model)),
        "layers": shown_layers(model.config.n_layer),
        "n_layers": model.config.n_layer,
        "kv_heads": model.config.n_kv_head,
        "loss_unit": unit,
        "chosen": chosen,
        "checks": check_steps(text, scene.prompt_tokens),
        "checks_each": [len(check_steps(each, scene.prompt_tokens)) for each in texts],
        "prompt": pieces(tokenizer, text.tokens[: scene.prompt_tokens]),
        "text": pieces(tokenizer, text.tokens[scene.prompt_tokens :]),
        "likeliest": pieces(tokenizer, likeliest.tolist()),
        "dense": {"loss": whole(dense[chosen], unit), "losses": [float(each.sum()) for each in dense]},
        "settings": settings,
    }


def measure_all() -> dict[str, object]:
    """Record every scene."""
    return {
        "command": "python docs/record_play.py",
        "source_sha256": source_digest(),
        "device": f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "config": {name: value for name, value in asdict(CONFIG).items() if name not in ("interval", "active_ratio")},
        "ways": WAYS,
        "drift_unit": DRIFT_UNIT,
        "scenes": [measure(scene, open_model(scene.model)) for scene in SCENES],
    }


def as_script(result: dict[str, object]) -> str:
    """Write the result as a script. A page that is opened from a disk may not fetch."""
    text = json.dumps(result, separators=(",", ":"))
    return f"// Written by `{result['command']}`; not to be edited.\nglobalThis.{NAME} = {text};\n"


def read_script(path: Path = DATA) -> dict[str, object]:
    """Read a file of `as_script`."""
    text = path.read_text(encoding="utf-8")
    return json.loads(text[text.index("{") :].rstrip(";\n"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    script = as_script(measure_all())
    write_atomically(DATA, script.encode())
