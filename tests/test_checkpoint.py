"""Checkpoints: what is saved comes back, what is damaged is refused by name, and no crash leaves a mixture."""

import json
import os
import resource
import signal
import time
from dataclasses import asdict, replace

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import Shape, shapes

from resa.reference import REFERENCE_OPS, RopeScaling
from resa.reference.checkpoint import file_digest, load_model, read_header, read_tensors, save_model, save_tensors
from resa.reference.files import write_atomically

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@given(shape=shapes(), stored=st.sampled_from(DTYPES), loaded=st.sampled_from(DTYPES))
@settings(max_examples=20)
def test_a_model_comes_back(tmp_path_factory, shape, stored, loaded):
    path = tmp_path_factory.mktemp("saved") / "model.safetensors"
    model = shape.model(torch.float64)
    save_model(path, model, dtype=stored, metadata={"note": "kept"})
    again = load_model(path, dtype=loaded)
    assert again.config == model.config
    assert not again.training
    assert (again.output.weight is again.embed.weight) == shape.tied
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight.to(stored).to(loaded)), name
    assert read_header(path, "resa model")["note"] == "kept"


def test_a_tied_projection_is_stored_once(tmp_path):
    sizes = []
    for tied in (True, False):
        model = Shape(tied=tied).model()
        save_model(tmp_path / "model", model, dtype=torch.float32)
        sizes.append(int(read_header(tmp_path / "model", "resa model")["tensors"]))
        assert sizes[-1] == len(list(model.parameters()))
    assert sizes[0] == sizes[1] - 1


def test_loading_gives_the_same_logits_and_takes_operations(tmp_path):
    model = Shape().model(torch.float32)
    save_model(tmp_path / "model", model, dtype=torch.float32)
    tokens = torch.tensor([Shape().tokens(20)])
    ops = replace(REFERENCE_OPS)
    before = torch.get_rng_state()
    again = load_model(tmp_path / "model", ops=ops)
    assert torch.equal(torch.get_rng_state(), before)  # the caller's random numbers are not used up
    assert torch.equal(again(tokens), model(tokens))
    assert again.ops is ops
    assert load_model(tmp_path / "model").ops is REFERENCE_OPS


def test_a_weight_that_overflows_is_not_saved(tmp_path):
    model = Shape().model(torch.float32)
    model.embed.weight.data[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"tensor embed.weight: got NaN or infinity; allowed: finite values"):
        save_model(tmp_path / "model", model, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"dtype: got torch\.int8"):
        save_model(tmp_path / "model", model, dtype=torch.int8)
    assert list(tmp_path.iterdir()) == []


# ---- Damage --------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    """A checkpoint's path, and its tensors and header to damage."""
    path = tmp_path / "model.safetensors"
    save_model(path, Shape().model(), dtype=torch.float32)
    header = read_header(path, "resa model")
    del header["tensors"]
    return path, safetensors.torch.load_file(path), header


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "format: got 'no format', a foreign checkpoint; allowed: 'resa model'"),
        ({"format": "pt"}, "format: got 'pt', a foreign checkpoint"),
        ({"config": ""}, "config: got ''; allowed: the JSON of a GPTConfig"),
        ({"config": "[1]"}, r"config: got '\[1\]'"),
        ({"n_head": 5}, r"n_head: got 5; allowed: a multiple of n_kv_head = 2"),
        ({"n_head": "6"}, r"n_head: got 6; allowed: an integer"),
        ({"n_layer": 10**9}, "n_layer: got 1000000000; allowed: at most the file's tensors"),
        ({"n_layer": 3}, r"tensor layers\.2\.[a-z_.]+: got missing"),
        ({"depth": 2}, "config field depth: got unknown"),
        ({"vocab_size": None}, "vocab_size"),
    ],
)
def test_a_foreign_or_damaged_header_is_refused(saved, change, message):
    path, tensors, header = saved
    if change is None:
        header = {}
    elif set(change) <= {"format", "config"}:
        header = {**header, **change}
    else:
        header["config"] = json.dumps({**json.loads(header["config"]), **change})
    safetensors.torch.save_file(tensors, path, header)
    with pytest.raises(ValueError, match=message):
        load_model(path)


def test_scaled_rotations_come_back(tmp_path):
    """A nested part of the configuration; and a file from before there was one still loads."""
    model = Shape().model(torch.float32)
    model.config = replace(model.config, rope_scaling=RopeScaling("yarn", 4.0, 32, fast=8.0, amplitude=1.1))
    path = tmp_path / "model.safetensors"
    save_model(path, model, dtype=torch.float32)
    assert load_model(path).config == model.config
    header, tensors = read_header(path, "resa model"), safetensors.torch.load_file(path)
    config = json.loads(header["config"])
    for scaling, message in (({**config["rope_scaling"], "kind": "ntk"}, "kind: got 'ntk'"), ({"size": 2}, "size")):
        changed = {**header, "config": json.dumps({**config, "rope_scaling": scaling})}
        safetensors.torch.save_file(tensors, path, changed)
        with pytest.raises(ValueError, match=message):
            load_model(path)
    del config["rope_scaling"]
    safetensors.torch.save_file(tensors, path, {**header, "config": json.dumps(config)})
    assert load_model(path).config.rope_scaling is None


def test_a_configuration_without_a_field_is_refused(saved):
    path, tensors, header = saved
    config = json.loads(header["config"])
    del config["qk_norm"]
    safetensors.torch.save_file(tensors, path, {**header, "config": json.dumps(config)})
    with pytest.raises(ValueError, match="config field qk_norm: got missing"):
        load_model(path)


def test_a_file_cut_anywhere_is_refused(saved):
    path, _, _ = saved
    content = path.read_bytes()
    for length in [0, 4, 8, 100, len(content) // 2, len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"model.safetensors: got a damaged file .* a complete safetensors file"):
            load_model(path)
    path.write_bytes(content + b"x")
    with pytest.raises(ValueError, match="got a damaged file"):
        load_model(path)
    path.write_bytes(b"\x80\x04K\x01.")  # a pickle: not even looked at
    with pytest.raises(ValueError, match="got a damaged file"):
        load_model(path)


def test_a_file_that_is_not_there(tmp_path):
    for path in (tmp_path / "nowhere.safetensors", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"checkpoint {path}: no such file"):
            load_model(path)


def test_a_folder_is_told_where_it_is_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file, but a folder: `resa generate`"):
        load_model(tmp_path)


# ---- Crashes -------------------------------------------------------------------------------------------------------


def in_child(work):
    """Runs `work` in a forked process and returns its id."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return child


def test_a_kill_while_saving_leaves_the_old_or_the_new_file(tmp_path):
    path = tmp_path / "state.safetensors"
    shapes = {f"part.{index}": (256, 1024) for index in range(4)}  # 4 MiB: long enough to be hit while writing

    def save(version):
        tensors = {name: torch.full(shape, float(version)) for name, shape in shapes.items()}
        save_tensors(path, tensors, {"format": "test", "version": str(version)})

    def keep_saving(start):
        os.write(told[1], b"!")
        for version in range(start + 1, start + 10_000):
            save(version)
            os.write(told[1], b"!")

    version = cut_short = 0
    save(version)
    fractions = torch.rand(200, generator=torch.Generator().manual_seed(0)).tolist()
    for index, fraction in enumerate(fractions):
        if index >= 24 and cut_short >= 5:  # on a busy machine few are hit while writing
            break
        told = os.pipe()  # its own, so that nothing that the last child said is left in it
        child = in_child(lambda start=version: keep_saving(start))
        os.close(told[1])  # the child's end is then the only one: were it to die early, reading would not wait for ever
        os.read(told[0], 1)
        for _ in range(1 + index % 2):  # the length of a save is told by the last one, whatever the machine is doing
            began = time.monotonic()
            os.read(told[0], 1)
        time.sleep(fraction * (time.monotonic() - began))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        os.close(told[0])
        found = int(read_header(path, "test")["version"])
        assert found > version  # at least one save was told to have ended
        version = found
        for name, tensor in read_tensors(path, shapes).items():
            assert (tensor == version).all(), f"{name} is not of version {version}"
        for left in tmp_path.glob(".*.tmp"):
            cut_short += 1
            left.unlink()
    assert cut_short >= 3  # and was hit while doing so


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "model.safetensors"
    save_model(path, Shape().model(), metadata={"version": "old"})
    content = path.read_bytes()

    def save_on_a_full_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(content) // 2, len(content) // 2))
        with pytest.raises(OSError, match="File too large"):
            save_model(path, Shape(seed=1).model(), metadata={"version": "new"})
        assert [found.name for found in tmp_path.iterdir()] == [path.name]

    assert os.waitstatus_to_exitcode(os.waitpid(in_child(save_on_a_full_disk), 0)[1]) == 0
    assert path.read_bytes() == content


@pytest.mark.parametrize("call", ["fsync", "replace", "chmod"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_any_failure_removes_the_temporary_file(monkeypatch, tmp_path, call, error):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(*arguments):
        raise error("no")

    monkeypatch.setattr(f"resa.reference.files.os.{call}", fail)
    with pytest.raises(error):
        write_atomically(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert [found.name for found in tmp_path.iterdir()] == ["file"]


def test_the_content_is_on_disk_before_the_name(monkeypatch, tmp_path):
    done = []
    for call in ("fsync", "replace"):
        real = getattr(os, call)
        monkeypatch.setattr(f"resa.reference.files.os.{call}", lambda *a, c=call, r=real: (done.append(c), r(*a)))
    write_atomically(tmp_path / "file", b"content")
    assert done == ["fsync", "replace", "fsync"]  # the file, its name, its folder
    assert (tmp_path / "file").stat().st_mode & 0o444 == 0o444  # others may read it


def test_eight_bits_round_every_row_to_the_nearest_of_its_steps(tmp_path):
    model = Shape().model(torch.float32)
    save_model(tmp_path / "m.safetensors", model, dtype=torch.float32, eight_bits=True)
    loaded = load_model(tmp_path / "m.safetensors")
    changed = False
    for (name, before), after in zip(model.named_parameters(), loaded.parameters(), strict=True):
        if before.dim() == 2:
            step = before.abs().amax(dim=1, keepdim=True) / 127
            assert ((after - before).abs() <= 0.5001 * step).all(), name
            torch.testing.assert_close(after / step, (after / step).round(), rtol=0, atol=1e-3)
            changed |= not torch.equal(before, after)
        else:
            assert torch.equal(before, after)
    assert changed
    save_model(tmp_path / "wide.safetensors", model, dtype=torch.float32)
    sizes = [(tmp_path / name).stat().st_size for name in ("m.safetensors", "wide.safetensors")]
    assert sizes[0] < 0.5 * sizes[1]


def test_a_row_of_zeros_survives_eight_bits(tmp_path):
    model = Shape().model(torch.float32)
    model.embed.weight.data[3] = 0
    save_model(tmp_path / "m.safetensors", model, eight_bits=True)
    assert load_model(tmp_path / "m.safetensors").embed.weight[3].abs().max() == 0


def test_whole_numbers_are_refused_where_floats_belong(tmp_path):
    model = Shape().model(torch.float32)
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    tensors["embed.weight"] = tensors["embed.weight"].to(torch.int8)
    save_tensors(
        tmp_path / "m.safetensors", tensors, {"format": "resa model", "config": json.dumps(asdict(model.config))}
    )
    with pytest.raises(ValueError, match=r"embed\.weight: got I8"):
        load_model(tmp_path / "m.safetensors")


# ---- A part of a model ---------------------------------------------------------------------------------------------


@pytest.fixture
def parted(tmp_path):
    """A model's file, and beside it another's attention; that other model, and both paths."""
    whole, other = (Shape(seed=seed, qk_norm=True).model(torch.float32) for seed in (1, 2))
    base, path = tmp_path / "base.safetensors", tmp_path / "part.safetensors"
    save_model(base, whole, eight_bits=True)
    save_model(path, other, dtype=torch.float32, part="attention", base=base)
    return other, base, path


def test_a_part_is_taken_from_its_own_file_and_the_rest_from_the_base(parted):
    other, base, path = parted
    stored, own, loaded = (dict(m.named_parameters()) for m in (load_model(base), other, load_model(path)))
    names = set(safetensors.torch.load_file(path))
    assert names == {name for name in own if ".attn." in name}
    assert {name.split(".")[3] for name in names} == {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"}
    for name, weight in loaded.items():
        assert torch.equal(weight, own[name] if name in names else stored[name]), name
    assert path.stat().st_size < base.stat().st_size * 2
    save_model(path, other, eight_bits=True, part="attention", base=base)
    rounded = dict(load_model(path).named_parameters())
    assert (rounded["layers.0.attn.q_proj.weight"] - own["layers.0.attn.q_proj.weight"]).abs().max() > 0
    assert torch.equal(rounded["embed.weight"], stored["embed.weight"])


def test_a_base_that_is_another_or_missing_is_refused(parted):
    other, base, path = parted
    digest = file_digest(base)
    save_model(base, other)
    with pytest.raises(ValueError, match=rf"part\.safetensors: base: got .*base\.safetensors.*; allowed: .*{digest}"):
        load_model(path)
    base.unlink()
    with pytest.raises(FileNotFoundError, match=r"base\.safetensors: no such file"):
        load_model(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"part": "mlp"}, "part: got 'mlp'; allowed: all, attention"),
        ({"base": "../base"}, "base: got '../base'"),
        ({"base": ".."}, "base: got '..'"),
    ],
)
def test_a_header_that_leads_elsewhere_is_refused(parted, change, message):
    *_, path = parted
    header = read_header(path, "resa model")
    del header["tensors"]
    safetensors.torch.save_file(safetensors.torch.load_file(path), path, {**header, **change})
    with pytest.raises(ValueError, match=message):
        load_model(path)


def test_a_part_needs_a_base_beside_it(parted, tmp_path):
    other, base, path = parted
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "link.safetensors").symlink_to(base)
    save_model(tmp_path / "wide.safetensors", Shape(context=64, group=3).model())
    for options, named in (
        ({"part": "attention"}, "base: got None"),
        ({"base": base}, "base: got"),
        ({"part": "mlp", "base": base}, "part: got 'mlp'; allowed: all, attention"),
        (
            {"part": "attention", "base": tmp_path / "elsewhere" / "m.safetensors"},
            "base: got .*; allowed: another file beside",
        ),
        ({"part": "attention", "base": tmp_path / "far" / "link.safetensors"}, "allowed: another file beside"),
        ({"part": "attention", "base": path}, "allowed: another file beside"),
        ({"part": "attention", "base": tmp_path / "none.safetensors"}, "no such file"),
        ({"part": "attention", "base": tmp_path / "wide.safetensors"}, "allowed: a model of the same shape"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=named):
            save_model(path, other, **options)
    near = tmp_path / "near.safetensors"
    near.symlink_to(tmp_path / "far" / "link.safetensors")
    save_model(path, other, part="attention", base=near)
    assert torch.equal(load_model(path).embed.weight, load_model(base).embed.weight)
