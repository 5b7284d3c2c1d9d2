"""Checkpoints: what is saved comes back, what is damaged is refused by name, and no failure leaves a mixture."""

import json
import os
import signal
import stat
import subprocess
import sys
import time
from dataclasses import asdict, fields, replace

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resa.reference import GPTConfig, RopeScaling, load_model, save_model
from resa.reference.weights import files
from resa.reference.weights.checkpoint import deflated, read_header, read_tensors, save_tensors
from resa.reference.weights.files import write_atomically
from small_models import Shape, shapes

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@given(shape=shapes(), stored=st.sampled_from(DTYPES), loaded=st.sampled_from(DTYPES))
@settings(max_examples=20)
def test_a_model_comes_back(tmp_path_factory, shape, stored, loaded):
    path = tmp_path_factory.mktemp("saved") / "model.safetensors"
    model = shape.model(torch.float64)
    save_model(path, model, dtype=stored, metadata={"note": "kept"})
    before = torch.get_rng_state()
    again = load_model(path, dtype=loaded)
    assert torch.equal(torch.get_rng_state(), before)  # the caller's random numbers are not used up
    assert again.config == model.config
    assert not again.training
    assert (again.output.weight is again.embed.weight) == shape.tied
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight.to(stored).to(loaded)), name
    assert read_header(path, "resa model")["note"] == "kept"


def test_loading_a_model_does_not_load_torchs_compiler():
    """Drawing weights without memory did, which took seconds."""
    code = """if True:
        import sys
        from resa.reference.weights.checkpoint import load_model, shipped_checkpoint
        load_model(shipped_checkpoint())
        sys.exit("torch._dynamo" in sys.modules)
    """
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_equal_weights_give_equal_files(tmp_path):
    """The library writes the header's text in an order that differs from call to call; data stay aligned."""
    for length in range(1, 4):
        text = {name: name * length for name in ("a", "b", "c", "d", "e")}
        for index in range(4):
            save_model(tmp_path / f"{index}", Shape().model(), eight_bits=True, metadata=text)
        (content,) = {path.read_bytes() for path in tmp_path.iterdir()}
        assert int.from_bytes(content[:8], "little") % 8 == 0


def test_a_weight_that_overflows_is_not_saved(tmp_path):
    model = Shape().model(torch.float32)
    model.embed.weight.data[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"tensor embed.weight: got NaN or infinity; allowed: finite values"):
        save_model(tmp_path / "model", model, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"dtype: got torch\.int8"):
        save_model(tmp_path / "model", model, dtype=torch.int8)
    assert list(tmp_path.iterdir()) == []


def test_a_weight_that_overflows_is_not_loaded(tmp_path):
    model = Shape().model(torch.float32)
    model.embed.weight.data[0, 0] = 1e6
    save_model(tmp_path / "model", model)
    with pytest.raises(ValueError, match=r"embed.weight: got values too large; allowed: what fits torch.float16"):
        load_model(tmp_path / "model", dtype=torch.float16)


@pytest.fixture
def saved(tmp_path):
    """A checkpoint's path, and its tensors and header to damage."""
    path = tmp_path / "model.safetensors"
    save_model(path, Shape().model(), dtype=torch.float32)
    return path, safetensors.torch.load_file(path), read_header(path, "resa model")


NAME = "layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (None, f"tensor {NAME}: got missing"),
        (torch.zeros(16, 20), rf"tensor {NAME}: got shape \(16, 20\); allowed: shape \(20, 16\)"),
        (torch.zeros(320), rf"tensor {NAME}: got shape \(320,\)"),
        (torch.zeros(20, 16, dtype=torch.int32), rf"tensor {NAME}: got I32; allowed: F16, BF16, F32, F64"),
        (torch.full((20, 16), float("nan")), f"tensor {NAME}: got NaN or infinity; allowed: finite values"),
        (torch.full((20, 16), float("-inf")), f"tensor {NAME}: got NaN or infinity"),
    ],
)
def test_a_wrong_tensor_is_named(saved, tensor, message):
    path, tensors, header = saved
    tensors.pop(NAME)
    if tensor is not None:
        tensors[NAME] = tensor
    safetensors.torch.save_file(tensors, path, header)
    with pytest.raises(ValueError, match=message):
        load_model(path)


def test_an_extra_tensor_is_named(saved):
    path, tensors, header = saved
    safetensors.torch.save_file({**tensors, "output.weight": torch.zeros(23, 16)}, path, header)
    with pytest.raises(ValueError, match=r"tensor output\.weight: got extra"):
        load_model(path)


SCALING = asdict(RopeScaling("yarn", 4.0, 32, fast=8.0, amplitude=1.1))
CONFIG_FIELDS = [field.name for field in fields(GPTConfig) if field.name != "rope_scaling"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "format: got 'no format', a foreign checkpoint; allowed: 'resa model'"),
        ({"format": "pt"}, "format: got 'pt', a foreign checkpoint"),
        ({"config": ""}, "model.safetensors: config: got ''; allowed: the JSON of a GPTConfig"),
        ({"config": "[1]"}, r"model.safetensors: config: got '\[1\]'; allowed: the JSON of a GPTConfig"),
        ({"n_head": 5}, r"n_head: got 5; allowed: a multiple of n_kv_head = 2"),
        ({"n_head": "6"}, r"n_head: got '6'; allowed: an integer"),
        ({"n_layer": 3}, r"tensor layers\.2\.[a-z_.]+: got missing"),
        ({"n_layer": 20_000}, r"n_layer: got 20000; allowed: at most the file's \d+ tensors"),
        ({"n_layer": 10**9}, "n_layer: got 1000000000; allowed: at most"),
        ({"depth": 2}, "config field depth: got unknown; allowed: vocab_size, n_layer"),
        *[({name: ...}, f"config field {name}: got missing; allowed: vocab_size") for name in CONFIG_FIELDS],
        ({"rope_scaling": SCALING | {"kind": "ntk"}}, "model.safetensors: kind: got 'ntk'"),
        ({"rope_scaling": SCALING | {"size": 2}}, "rope_scaling field size: got unknown; allowed: kind, factor"),
        ({"rope_scaling": {"kind": "linear", "factor": 2.0}}, "rope_scaling field amplitude: got missing"),
        ({"rope_scaling": 2}, "rope_scaling: got 2; allowed: a RopeScaling or None"),
    ],
)
def test_a_foreign_or_damaged_header_is_refused(saved, change, message):
    path, tensors, header = saved
    if change is None:
        header = {}
    elif set(change) <= {"format", "config"}:
        header = {**header, **change}
    else:
        config = {**json.loads(header["config"]), **change}
        header["config"] = json.dumps({name: value for name, value in config.items() if value is not ...})
    safetensors.torch.save_file(tensors, path, header)
    with pytest.raises(ValueError, match=message):
        load_model(path)


def test_scaled_rotations_come_back(tmp_path):
    """And a file from before there was such a field still loads."""
    model = Shape().model(torch.float32)
    model.config = replace(model.config, rope_scaling=RopeScaling(**SCALING))
    path = tmp_path / "model.safetensors"
    save_model(path, model, dtype=torch.float32)
    assert load_model(path).config == model.config
    header = read_header(path, "resa model")
    config = {name: value for name, value in json.loads(header["config"]).items() if name != "rope_scaling"}
    safetensors.torch.save_file(safetensors.torch.load_file(path), path, {**header, "config": json.dumps(config)})
    assert load_model(path).config == replace(model.config, rope_scaling=None)


def test_a_file_cut_anywhere_is_refused(saved):
    path, _, _ = saved
    content = path.read_bytes()
    pickle = b"\x80\x04K\x01."  # not even looked at
    for damaged in (b"", content[:8], content[: len(content) // 2], content[:-1], content + b"x", pickle):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"model.safetensors: got a damaged file .* a complete safetensors file"):
            load_model(path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"checkpoint .*nowhere: no such file$"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no such file, but a folder: `resa generate`"):
        load_model(tmp_path)


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_any_failure_leaves_the_old_file_and_no_other(monkeypatch, tmp_path, call, error):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(*arguments):
        raise error("no")

    monkeypatch.setattr(f"resa.reference.weights.files.os.{call}", fail)
    with pytest.raises(error):
        write_atomically(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert [found.name for found in tmp_path.iterdir()] == ["file"]


def test_the_content_is_on_disk_before_the_name(monkeypatch, tmp_path):
    """A power cut may undo what was not synced: the content first, then the new name in its folder."""
    done, fsync, replace_file = [], os.fsync, os.replace

    def synced(descriptor):
        state = os.fstat(descriptor)
        done.append("folder" if stat.S_ISDIR(state.st_mode) else f"{state.st_size} bytes")
        fsync(descriptor)

    def replaced(*paths):
        done.append("name")
        replace_file(*paths)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    write_atomically(tmp_path / "file", b"content")
    assert done == ["7 bytes", "name", "folder"]


def keep_saving(path, version, pipe):
    """In a forked process: save one version after another, and tell after each, until the process is killed."""
    try:
        while True:
            version += 1
            save_tensors(path, {"part": torch.full((1024, 1024), float(version))}, {"format": "test"})
            os.write(pipe, b"!")
    finally:
        os._exit(1)


def test_a_kill_while_saving_leaves_the_old_or_the_new_file(tmp_path):
    """At drawn moments of a save, whose length is that of the one before."""
    path, version, cut_short = tmp_path / "state.safetensors", 0, 0
    fractions = torch.rand(60, generator=torch.Generator().manual_seed(0)).tolist()
    for index, fraction in enumerate(fractions):
        if index >= 8 and cut_short >= 2:  # on a busy machine few are hit while writing
            break
        told, tell = os.pipe()
        child = os.fork()
        if child == 0:
            keep_saving(path, version, tell)
        os.close(tell)
        os.read(told, 1)
        began = time.monotonic()
        os.read(told, 1)
        time.sleep(fraction * (time.monotonic() - began))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        os.close(told)

        tensor = read_tensors(path, {"part": (1024, 1024)})["part"]
        assert tensor.min() == tensor.max() >= version + 2, "a mixture, or older than what was told to be saved"
        version = int(tensor.max())
        for left in tmp_path.glob(".*.tmp"):
            cut_short += 1
            left.unlink()
    assert cut_short > 0, "no save was cut short"


@pytest.mark.parametrize("options", [{}, {"dtype": torch.float32}], ids=["default", "float32"])
def test_eight_bits_round_every_row_to_the_nearest_of_its_steps(tmp_path, options):
    """Nearest to the weights as they are: the dtype of the others must not round them first."""
    model = Shape().model(torch.float32)
    save_model(tmp_path / "small", model, eight_bits=True, **options)
    save_model(tmp_path / "wide", model, dtype=torch.float32)
    assert (tmp_path / "small").stat().st_size < 0.5 * (tmp_path / "wide").stat().st_size
    loaded, moved = load_model(tmp_path / "small"), 0.0
    for (name, before), after in zip(model.named_parameters(), loaded.parameters(), strict=True):
        if before.dim() == 2:
            step = before.abs().amax(dim=1, keepdim=True) / 127
            distance = (after - before).abs() / step
            assert distance.max() <= 0.5001, name
            torch.testing.assert_close(after / step, (after / step).round(), rtol=0, atol=1e-3)
            moved = max(moved, distance.max().item())
        else:
            assert torch.equal(before.to(options.get("dtype", torch.bfloat16)).float(), after), name
    assert moved > 0.4, "hardly a weight was rounded"


def test_a_row_of_zeros_survives_eight_bits(tmp_path):
    model = Shape().model(torch.float32)
    model.embed.weight.data[3] = 0
    save_model(tmp_path / "model", model, eight_bits=True)
    assert load_model(tmp_path / "model").embed.weight[3].abs().max() == 0
    assert (safetensors.torch.load_file(tmp_path / "model")["embed.weight.scale"] > 0).all()  # nothing / 0


def test_whole_numbers_and_scales_belong_to_the_format_in_eight_bits(saved, tmp_path):
    path, tensors, header = saved
    safetensors.torch.save_file({**tensors, "embed.weight": tensors["embed.weight"].to(torch.int8)}, path, header)
    with pytest.raises(ValueError, match=r"embed\.weight: got I8"):
        load_model(path)
    save_model(path, Shape().model(), eight_bits=True)
    rounded = safetensors.torch.load_file(path)
    header = {**header, "format": "resa model, matrices in 8 bits, deflated"}
    safetensors.torch.save_file({**rounded, "embed.weight": tensors["embed.weight"]}, path, header)
    with pytest.raises(ValueError, match=r"embed\.weight: got F32; allowed: U8"):
        load_model(path)
    size = tensors["embed.weight"].numel()
    for wrong, message in (
        (rounded["embed.weight"].flip(0), r"got Error -3 .*; allowed: bytes that zlib wrote"),
        (rounded["embed.weight"][:-2], rf"got {size} bytes, or a stream that is cut"),  # its checksum
        (torch.cat((rounded["embed.weight"],) * 2), rf"got {size} bytes, or a stream that is cut or goes on"),
        (
            rounded["embed.weight"][:-9],
            rf"got \d+ bytes, or a stream that is cut or goes on; allowed: {size}, its shape being",
        ),
        (deflated(torch.zeros(10**6, dtype=torch.int8)), rf"got {size + 1} bytes, .*; allowed: {size}, "),
    ):
        safetensors.torch.save_file({**rounded, "embed.weight": wrong.contiguous()}, path, header)
        with pytest.raises(ValueError, match=rf"embed\.weight: {message}"):
            load_model(path)
    del rounded["embed.weight.scale"]
    safetensors.torch.save_file(rounded, path, header)
    with pytest.raises(ValueError, match=r"tensor embed\.weight\.scale: got missing"):
        load_model(path)


def test_the_source_digest_is_that_of_the_whole_package(monkeypatch, tmp_path):
    """A change in any room changes it: a result by other code must not pass for this one's."""
    monkeypatch.setattr(files, "__file__", str(tmp_path / "weights" / "files.py"))
    seen = {files.source_digest()}
    for index, name in enumerate(("generate.py", "lab/train.py", "weights/files.py", "generate.py"), start=1):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{index}")
        seen.add(files.source_digest())
    assert len(seen) == 5
