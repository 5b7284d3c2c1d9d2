"""Training: it learns, a run cut anywhere and resumed is the run uncut, and what does not fit is refused by name."""

import hashlib
import json
import math
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from resa.reference import ReSAConfig, load_model, load_tokenizer
from resa.reference.lab import train as lab
from resa.reference.lab.corpus import Document
from resa.reference.lab.programs import program_rows, words
from resa.reference.lab.train import (
    TrainConfig,
    TrainData,
    Trainer,
    decoded_loss_of,
    decoding_of,
    learning_rate,
    loss_of,
    make_batch,
    prepare_data,
    token_weights,
    train,
)
from resa.reference.weights.checkpoint import read_header
from small_models import Shape

MODEL = Shape(context=16).config()
CONFIG = TrainConfig(
    steps=10,
    batch_tokens=64,
    context=16,
    short_context=4,
    short_share=0.5,
    learning_rate=1e-2,
    warmup_steps=3,
    program_fraction=0.5,
)
DECODING = replace(CONFIG, steps=4, sparse_share=0.5, sparse_interval=3)


def data(seed=0, vocab=23):
    """A stream that counts upwards, so that there is something to learn; programs that count downwards."""
    up, down = (((seed + sign * np.arange(500)) % vocab).astype(np.uint16) for sign in (1, -1))
    return TrainData(up, np.stack([down[row : row + 17] for row in range(8)]), {"train_files": 1})


@pytest.fixture(autouse=True)
def log_every(monkeypatch):
    monkeypatch.setattr(lab, "LOG_EVERY", 2)


def trained(out, config=CONFIG, model=MODEL, stream=None, init=None):
    return train(Trainer(model, config, device="cpu", init=init), stream or data(), out)


def state(out):
    return safetensors.torch.load_file(out / "checkpoint.safetensors")


def log(out):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def assert_same_run(out, other):
    """The weights and the optimizer's state are equal bit for bit, and so are the logs but for the times."""
    ours, theirs = state(out), state(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
    assert log(out) == log(other)
    assert (out / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


@pytest.fixture
def uncut(tmp_path):
    """A run from beginning to end."""
    trained(tmp_path / "uncut")
    return tmp_path / "uncut"


# Learning.


def test_the_loss_goes_down(tmp_path):
    random = torch.get_rng_state()
    model = trained(tmp_path, replace(CONFIG, steps=150, program_fraction=0.2))
    losses = [line["loss"] for line in log(tmp_path)]
    assert losses[0] == pytest.approx(math.log(23), abs=0.2)
    assert np.mean(losses[-10:]) < 0.6
    assert model(torch.tensor([[3, 4, 5, 6]]))[0].argmax(-1).tolist()[1:] == [5, 6, 7]
    assert not model.training
    assert torch.equal(torch.get_rng_state(), random), "the caller's random numbers are left alone"


@pytest.mark.parametrize(
    ("step", "share"),
    [(0, 0.25), (1, 0.5), (3, 1.0), (4, 1.0), (52, 0.55), (100, 0.1), (28, 0.1 + 0.45 * (1 + 0.5**0.5))],
)
def test_the_learning_rate_warms_up_and_decays_to_a_tenth(step, share):
    config = TrainConfig(steps=101, warmup_steps=4, learning_rate=0.02)
    assert learning_rate(config, step) == pytest.approx(0.02 * share, rel=1e-12)


@pytest.mark.parametrize("clip", [1e9, 1e-3])
def test_one_step_is_the_optimizer_by_hand(monkeypatch, clip):
    monkeypatch.setattr(lab, "GRAD_CLIP", clip)
    monkeypatch.setattr(lab, "WEIGHT_DECAY", 0.3)
    config = replace(CONFIG, warmup_steps=0)
    trainer = Trainer(MODEL, config, device="cpu")
    # Freshly drawn weights hardly attend, and what does not matter has no gradient to speak of.
    trainer.model.load_state_dict(Shape(context=16).model(torch.float32).state_dict())
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    rows = torch.from_numpy(make_batch(config, data(), 0))
    logits = trainer.model(rows[:, :-1]).log_softmax(-1)
    loss = -logits.gather(-1, rows[:, 1:, None]).mean()
    gradients = dict(zip(before, torch.autograd.grad(loss, trainer.model.parameters()), strict=True))
    norm = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()
    assert norm > 0.1
    assert float(trainer.take_step(rows)) == pytest.approx(loss.item(), rel=1e-5)
    for name, weight in trainer.model.named_parameters():
        # The first step of Adam is the gradient over its own size; matrices shrink besides.
        decay = 0.3 if weight.dim() == 2 else 0.0
        moved = before[name] * (1 - config.learning_rate * decay)
        clipped = gradients[name] * min(1, clip / norm)
        expected = moved - config.learning_rate * clipped / (clipped.abs() + 1e-8)
        large = gradients[name].abs() > 1e-5  # below, rounding of the gradient decides
        moment = trainer.optimizer.state[weight]["exp_avg"] / 0.1
        torch.testing.assert_close(moment, clipped, rtol=1e-3, atol=1e-7)
        assert torch.allclose(weight[large], expected[large], atol=1e-5), name
        assert large.any()


# Data.


@given(st.integers(0, 2**32), st.integers(0, 10**6), st.sampled_from([0.0, 0.3, 1.0]))
def test_a_batch_depends_on_seed_and_step_alone(seed, step, fraction):
    config = replace(CONFIG, seed=seed, program_fraction=fraction, batch_tokens=16 * 32)
    stream = data()
    rows = make_batch(config, stream, step)
    count = 128 if step < 5 else 32  # short rows in the first half of the ten steps
    assert rows.shape == (count, 512 // count + 1)
    assert rows.dtype == np.int64
    assert (make_batch(config, stream, step) == rows).all()
    assert not np.array_equal(make_batch(config, stream, step + 1), rows)
    assert not np.array_equal(make_batch(replace(config, seed=seed + 1), stream, step), rows)
    upward, downward = (((rows[:, 1:] - rows[:, :-1]) % 23 == way).all(axis=1) for way in (1, 22))
    assert (upward ^ downward).all()  # every row is of one kind
    assert abs(downward.sum() - count * fraction) <= (0 if fraction in (0, 1) else count / 2)
    for row in rows[downward]:
        assert any((row == program[: len(row)]).all() for program in stream.programs), "a program's beginning"


def test_windows_begin_anywhere_in_the_stream():
    stream = TrainData(np.arange(20, dtype=np.uint16), data().programs)
    config = replace(CONFIG, program_fraction=0.0)
    starts = {int(row[0]) for step in range(5, 55) for row in make_batch(config, stream, step)}
    assert starts == {0, 1, 2, 3}  # the last window ends with the stream
    starts = {int(row[0]) for seed in range(30) for row in make_batch(replace(config, seed=seed), stream, 0)}
    assert starts == set(range(16))


def test_data_is_the_corpus_and_programs(monkeypatch):
    code = [Document("a", "x = 1\n"), Document("b", "y = 2\n")]
    corpus = SimpleNamespace(train=code, statistics={"train_files": 2})
    monkeypatch.setattr(lab, "local_corpus", lambda **_: corpus)
    tokenizer, config = load_tokenizer(), TrainConfig(context=256, batch_tokens=256, program_rows=3, seed=5)
    made = prepare_data(config, packages=False)
    assert tokenizer.decode(made.tokens.tolist()) == "x = 1\n<|endoftext|>y = 2\n<|endoftext|>"
    assert (made.programs == program_rows(tokenizer, 5, 3, 257)).all()
    sizes = {"train_tokens": len(made.tokens), "program_tokens": 3 * 257}
    assert made.statistics == {"train_files": 2, **sizes}
    none = prepare_data(replace(config, program_fraction=0.0), packages=False)
    assert none.programs.size == 0


# Resuming.


@pytest.mark.parametrize("config", [CONFIG, DECODING], ids=["dense", "decoding"])
def test_a_run_interrupted_and_resumed_is_the_run_uncut(monkeypatch, tmp_path, config):
    take_step, stops = Trainer.take_step, (2, 3)
    waiting = list(stops)

    def stop_at(trainer, rows):
        if waiting and trainer.step == waiting[0]:
            waiting.pop(0)
            raise KeyboardInterrupt
        return take_step(trainer, rows)

    monkeypatch.setattr(Trainer, "take_step", stop_at)
    monkeypatch.setattr(lab, "CHECKPOINT_SECONDS", 0.0)
    for stop in stops:
        with pytest.raises(KeyboardInterrupt):
            trained(tmp_path / "cut", config)
        header = read_header(tmp_path / "cut" / "checkpoint.safetensors", "resa training state")
        assert json.loads(header["progress"])["step"] == stop
        assert not (tmp_path / "cut" / "record.json").exists()
    trained(tmp_path / "cut", config)
    trained(tmp_path / "whole", config)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    trained(tmp_path / "cut", config)  # a finished run changes nothing
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": replace(CONFIG, learning_rate=0.02)}, r"train.learning_rate: got 0.02; allowed: 0.01, as in .*"),
        ({"config": replace(CONFIG, steps=11)}, "train.steps: got 11; allowed: 10, as in .* or another folder"),
        ({"model": replace(MODEL, n_head=2)}, "model.n_head: got 2; allowed: 6"),
        ({"stream": data(seed=1)}, "data: got [0-9a-f]{64}; allowed: [0-9a-f]{64}, as in"),
    ],
)
def test_another_run_is_refused_by_the_field_that_differs(tmp_path, change, message):
    trained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=message):
        trained(tmp_path, **change)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    with pytest.raises(RuntimeError, match=r"the loss is nan after step \d+; try a learning_rate below 1e\+30"):
        trained(tmp_path, replace(CONFIG, learning_rate=1e30))
    assert not (tmp_path / "model.safetensors").exists()


# Files.


def test_the_log_and_the_record_say_what_happened(uncut):
    lines = [json.loads(line) for line in (uncut / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10]
    assert [line["tokens"] for line in lines] == [128, 256, 384, 512, 640]
    assert [line["lr"] for line in lines] == [learning_rate(CONFIG, line["step"] - 1) for line in lines]
    record = json.loads((uncut / "record.json").read_text())
    assert record["model"] == asdict(MODEL)
    assert record["train"] == asdict(CONFIG)
    assert record["data"]["train_files"] == 1
    assert record["tokens_seen"] == 640
    assert record["final"] == lines[-1]
    assert record["versions"]["torch"] == torch.__version__
    assert record["seconds"] > 0


def test_a_run_may_begin_with_a_finished_model(tmp_path, uncut):
    init = uncut / "model.safetensors"
    model, stored = load_model(init), state(uncut)
    begun = dict(Trainer(MODEL, CONFIG, device="cpu", init=init).model.named_parameters())
    for name, weight in model.named_parameters():
        assert torch.equal(weight, stored["model." + name].bfloat16().float()), name
        assert torch.equal(weight, begun[name]), name
    wider = replace(MODEL, context=32)  # no weight depends on it
    trained(tmp_path / "wider", replace(CONFIG, steps=1), wider, init=init)
    digest = json.loads((tmp_path / "wider" / "record.json").read_text())["init_sha256"]
    assert digest == hashlib.sha256(init.read_bytes()).hexdigest()
    with pytest.raises(ValueError, match=r"init: got .*model\.safetensors; allowed: a model of this shape"):
        Trainer(replace(MODEL, n_layer=3), CONFIG, init=init)


# Refusals.


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("steps", 0, "an integer ≥ 1"),
        ("steps", 2.0, "an integer ≥ 1"),
        ("batch_tokens", 100, "a multiple of context = 16"),
        ("short_context", 5, "an integer that divides context = 16, or more"),
        ("learning_rate", math.nan, "a finite number ≥ 0"),
        ("warmup_steps", -1, "an integer ≥ 0"),
        ("program_fraction", 1.1, "a number in 0 … 1"),
    ],
)
def test_configurations_are_refused_by_field(field, value, allowed):
    with pytest.raises(ValueError, match=f"{field}: got .*; allowed: {allowed}"):
        replace(CONFIG, **{field: value})


def test_input_that_does_not_fit_is_refused_before_any_work(tmp_path):
    with pytest.raises(ValueError, match="context: got 32; allowed: ≤ 16, the model's"):
        Trainer(MODEL, replace(CONFIG, context=32))
    with pytest.raises(ValueError, match="device: got gpu; allowed: cpu"):
        Trainer(MODEL, CONFIG, device="gpu")
    with pytest.raises(ValueError, match=r"data\.tokens: got 16; allowed: more than context = 16"):
        trained(tmp_path / "out", stream=TrainData(np.zeros(16, np.uint16), data().programs))
    assert not (tmp_path / "out").exists()


# Steps that decode, and weights.


@pytest.mark.parametrize(("steps", "share", "decoding"), [(4, 0.5, [2, 3]), (5, 0.0, []), (3, 1.0, [0, 1, 2])])
def test_the_last_steps_decode(steps, share, decoding):
    config = TrainConfig(steps=steps, sparse_share=share)
    assert [step for step in range(steps) if config.decodes(step)] == decoding


def test_steps_that_decode_vary_and_are_a_function_of_seed_and_step():
    ways = [decoding_of(TrainConfig(sparse_interval=8), step) for step in range(60)]
    assert ways == [decoding_of(TrainConfig(sparse_interval=8), step) for step in range(60)]
    assert {way.active_ratio for way, _ in ways} == {0.05, 0.1, 0.2}
    assert {way.min_blocks for way, _ in ways} == {2, 4, 8}
    assert {(way.interval, way.schedule) for way, _ in ways} == {(8, "paper")}
    assert decoding_of(TrainConfig(sparse_interval=0), 1)[0].interval is None
    assert all(1 <= prompt <= 256 for _, prompt in ways)
    assert {decoding_of(CONFIG, step)[1] for step in range(5)} <= {1, 2, 3}, "within a short row"


def test_decoded_loss_is_the_mean_of_both_streams():
    model = Shape(context=64).model(torch.float64)
    rows = torch.arange(2 * 65).view(2, 65) * 7 % 23
    dense = ReSAConfig(active_ratio=1.0, interval=None)
    weights = torch.full((2, 64), 1 / 128)
    with torch.no_grad():
        plain = float(loss_of(model, rows, weights))
        assert float(decoded_loss_of(model, rows, weights, dense, 16)) == pytest.approx(plain, rel=1e-9)
        sparse = ReSAConfig(active_ratio=0.1, min_blocks=1, interval=None)
        assert float(decoded_loss_of(model, rows, weights, sparse, 16)) != pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_run_uses_the_weights(tmp_path, monkeypatch, share):
    """In dense steps and in those that decode: with weights of zero no loss is left."""
    monkeypatch.setattr(lab, "token_weights", lambda rows, *_: torch.zeros(rows[:, 1:].shape))
    trained(tmp_path, replace(DECODING, sparse_share=share, checked_weight=1.0))
    assert {line["loss"] for line in log(tmp_path)} == {0.0}


def test_asserted_digits_weigh_more():
    tokenizer = load_tokenizer()
    rows = torch.tensor([tokenizer.encode_ordinary("index = 5\nassert index == 5\nassert index == 5\n")])
    weights, n = token_weights(rows, words(tokenizer), 2.0), rows.shape[1] - 1
    assert weights.shape == (1, n)
    assert sorted(weights[0].tolist())[-2:] == pytest.approx([1 / n + 1, 1 / n + 1])
    assert weights.sum().item() == pytest.approx(3.0)
    alone = torch.tensor([tokenizer.encode_ordinary("index = 5\n")])
    assert token_weights(alone, words(tokenizer), 2.0).sum().item() == pytest.approx(1.0)
