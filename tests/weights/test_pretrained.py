"""Checkpoint folders of the Qwen2, Qwen3 and Llama 3 families: what `transformers` writes and computes is the judge.

The models are small and random; every weight is away from its neutral value, so that one in the wrong place shows.
"""

import importlib
import json
import math
import re
import shutil
import sys

import pytest
import safetensors.torch
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from families import PLAIN, SIZES, YARN, texts, tokens_of
from resa.reference import ReSAConfig, generate
from resa.reference.cli.main import main
from resa.reference.rope import rotary_frequencies
from resa.reference.weights.pretrained import load_pretrained, read_config, read_tokenizer, stop_tokens
from strategies import DEVICE, HEAD_DIMS

transformers = pytest.importorskip("transformers", reason="the extra `dev` has it")


def test_logits_are_those_of_transformers(family):
    theirs, folder = family
    assert len(list(folder.glob("*.safetensors"))) > 1
    ours = load_pretrained(folder)
    tokens = torch.tensor(texts(400, 400))
    with torch.no_grad():
        expected, found = theirs(tokens).logits, ours(tokens)
    assert expected.std() > 0.1
    assert (found - expected).abs().max() <= 1e-4


def test_greedy_continuations_are_those_of_transformers(family):
    """96 tokens, decoded densely through the cache."""
    theirs, folder = family
    (prompt,) = texts(120)
    found = generate(load_pretrained(folder), [prompt], 96, ReSAConfig(interval=1))[0].tokens
    # Its own guess at the mask would leave out tokens equal to a padding token.
    fed = torch.tensor([prompt])
    expected = theirs.generate(fed, attention_mask=torch.ones_like(fed), max_new_tokens=96, do_sample=False)
    assert found == expected[0, 120:].tolist()
    assert len(set(found)) > 5, "a loop of a few tokens would prove little"


@pytest.mark.fast
def test_the_kernels_decode_them_as_well(family):
    """The tokens of the reference, where the head dimension is one that the kernels have."""
    fast = pytest.importorskip("resa.fast.generate", reason="triton comes for Linux only")
    model = load_pretrained(family[1], device=DEVICE)
    prompts, config = texts(33, 9), ReSAConfig(block_size=8, min_blocks=2, interval=3)
    if model.config.head_dim not in HEAD_DIMS:
        with pytest.raises(ValueError, match="head dimension D: got 8"):
            fast.generate(model, prompts, 5, config)
        return
    assert tokens_of(fast.generate(model, prompts, 5, config)) == tokens_of(generate(model, prompts, 5, config))


# Text

END = "<|end|>"
PROSE = "Ein Käfer läuft über das Blatt, 甲虫, and a beetle walks across the leaf; the leaf is green.\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small Qwen2 model with a tokenizer whose vocabulary it has."""
    folder = tmp_path_factory.mktemp("qwen2-text")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=[END], show_progress=False)
    tokenizer.train_from_iterator([PROSE] * 3, trainer=trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    end, size = tokenizer.token_to_id(END), tokenizer.get_vocab_size()
    config = transformers.Qwen2Config(**{**SIZES, "vocab_size": size + 8, "eos_token_id": end}, rope_parameters=PLAIN)
    torch.manual_seed(3)
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


def test_a_text_comes_back(folder):
    tokenizer = read_tokenizer(folder)
    tokens = tokenizer.encode_ordinary(PROSE + END)
    assert tokens[-1:] == [tokenizer.tokenizer.token_to_id(END)]
    assert len(tokens) < len(PROSE.encode()), "no merges were learnt"
    padding = tokenizer.tokenizer.get_vocab_size()  # the vocabulary is padded: no token has this id
    assert tokenizer.decode([*tokens, padding]) == PROSE + END


def test_generate_reads_a_folder(folder, capsys):
    """It writes the tokens that the library does, in the dtype asked for."""
    options = ["generate", PROSE, "--model", str(folder), "--tokens", "9", "--interval", "4", "--min-blocks", "2"]
    assert main([*options, "--device", "cpu", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    tokenizer = read_tokenizer(folder)
    prompt = tokenizer.encode_ordinary(PROSE)
    config = ReSAConfig(interval=4, min_blocks=2, selection="sketch")
    expected = generate(load_pretrained(folder), [prompt], 9, config, stop_tokens=stop_tokens(folder))[0].tokens
    assert (result["tokens"], result["text"]) == (expected, tokenizer.decode(expected))
    assert main([*options, "--device", "cpu", "--dtype", "bfloat16"]) == 0
    assert capsys.readouterr().out.startswith(PROSE)


def test_without_the_package_tokenizers_it_says_what_to_install(folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert main(["generate", PROSE, "--model", str(folder), "--device", "cpu"]) == 2
    path = re.escape(str(folder / "tokenizer.json"))
    message = f"resa generate: {path}: reading it takes the package `tokenizers`: pip install tokenizers\n"
    assert re.fullmatch(message, capsys.readouterr().err)


def test_weights_keep_their_dtype_unless_told(folder, tmp_path):
    assert load_pretrained(folder).embed.weight.dtype == torch.float32
    assert load_pretrained(folder, dtype=torch.float16).output.weight.dtype == torch.float16
    half = transformers.Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path)
    assert load_pretrained(tmp_path).embed.weight.dtype == torch.bfloat16


def changed(folder, tmp_path, **changes):
    """A copy of the folder, fields of its config.json replaced, or left out where they are None."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    values = json.loads((copy / "config.json").read_text()) | changes
    kept = {name: value for name, value in values.items() if value is not None}
    (copy / "config.json").write_text(json.dumps(kept))
    return copy


REFUSED = [
    ({"model_type": "mamba"}, "model_type: got 'mamba'"),
    ({"use_sliding_window": True}, "use_sliding_window: got True"),
    ({"layer_types": ["full_attention"] * 2 + ["sliding_attention"]}, "layer_types: got .*'sliding_attention'"),
    ({"hidden_act": "gelu"}, "hidden_act: got 'gelu'"),
    ({"attention_bias": True}, "attention_bias: got True"),
    ({"quantization_config": {"bits": 4}}, "quantization_config: got {'bits': 4}"),
    ({"quantization_config": "4 bits"}, "quantization_config: got '4 bits'"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: got 0.5"),
    ({"num_experts": 8}, "num_experts: got 8; allowed: 0"),
    ({"rope_interleaved": True}, "rope_interleaved: got True; allowed: False"),
    ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping: got 50.0; allowed: None"),
    ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope kind: got 'dynamic'"),
    ({"rope_parameters": {"rope_type": "yarn"}}, "rope factor|factor"),
    ({"rope_parameters": {**YARN, "mscale": 2.0}}, "rope field mscale: got 2.0"),
    ({"rope_parameters": {"factor": 2.0}}, r"rope: got \['factor'\] without a rope_type"),
    ({"hidden_size": None}, "hidden_size: got None"),
    ({"num_key_value_heads": 4}, "n_head: got 6; allowed: a multiple of n_kv_head = 4"),
    ({"hidden_size": "wide"}, "hidden_size: got 'wide'"),
    ({"layer_types": 3}, "layer_types: got 3"),
    ({"layer_types": ["full_attention"] * 2}, "layer_types: got .* allowed: 3 times 'full_attention'"),
    ({"rope_parameters": [1]}, r"rope_parameters: got \[1\]"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor: got 0.5"),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling: got .* beside rope_parameters"),
    ({"use_mrope": True}, "use_mrope: got True"),
]


def test_fields_that_change_nothing_are_no_reason_to_refuse(folder, tmp_path, recwarn):
    """Notes of those who made a checkpoint: known ones are passed over, one warning names the others."""
    known = changed(folder, tmp_path, is_llama_config=True, rope_interleaved=False, unsloth_fixed=True)
    assert read_config(known) == read_config(folder)
    assert not recwarn.list
    shutil.rmtree(known)
    unknown = changed(folder, tmp_path, made_by="somebody", a_mark=[1])
    with pytest.warns(UserWarning, match="fields unknown here, taken to change nothing: a_mark, made_by"):
        assert read_config(unknown) == read_config(folder)


@pytest.mark.parametrize("left_out", ["head_dim", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_a_field_left_out_has_its_familys_default(tmp_path, kind, left_out):
    """Defaults are those of `transformers`. Qwen3-0.6B's head_dim is 128, not hidden_size / heads = 64."""
    values = {
        "model_type": kind, "vocab_size": 97, "hidden_size": 1024, "intermediate_size": 80, "num_hidden_layers": 2,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    }  # fmt: skip
    del values[left_out]
    (tmp_path / "config.json").write_text(json.dumps(values))
    theirs, ours = transformers.AutoConfig.from_pretrained(tmp_path), read_config(tmp_path)
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    found = (ours.head_dim, ours.n_kv_head, ours.norm_eps, ours.tied_embeddings)
    assert found == (head_dim, theirs.num_key_value_heads, theirs.rms_norm_eps, theirs.tie_word_embeddings)


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=str)
def test_what_a_config_may_not_say(folder, tmp_path, changes, message):
    copy = changed(folder, tmp_path, **changes)
    with pytest.raises(ValueError, match=message) as refusal:
        load_pretrained(copy)
    assert str(copy / "config.json") in str(refusal.value)
    assert "; allowed: " in str(refusal.value)


# Fields of config.json as the families' own repositories state them.
COMMON = {
    "attention_dropout": 0.0, "hidden_act": "silu", "initializer_range": 0.02, "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.43.1", "use_cache": True,
}  # fmt: skip
QWEN25_7B = {
    **COMMON, "architectures": ["Qwen2ForCausalLM"], "bos_token_id": 151643, "eos_token_id": 151645,
    "hidden_size": 3584, "intermediate_size": 18944, "max_position_embeddings": 32768, "max_window_layers": 28,
    "model_type": "qwen2", "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4,
    "rope_theta": 1000000.0, "sliding_window": 131072, "use_mrope": False, "use_sliding_window": False,
    "vocab_size": 152064,
}  # fmt: skip
QWEN3_8B = {
    **COMMON, "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "bos_token_id": 151643,
    "eos_token_id": 151645, "head_dim": 128, "hidden_size": 4096, "intermediate_size": 12288,
    "max_position_embeddings": 40960, "max_window_layers": 36, "model_type": "qwen3", "num_attention_heads": 32,
    "num_hidden_layers": 36, "num_key_value_heads": 8, "rope_scaling": None, "rope_theta": 1000000,
    "sliding_window": None, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
LLAMA31_8B = {
    **COMMON, "architectures": ["LlamaForCausalLM"], "attention_bias": False, "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009], "hidden_size": 4096, "intermediate_size": 14336,
    "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama", "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0, "vocab_size": 128256,
    "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
}  # fmt: skip
STRETCHED = {"factor": 4.0, "original_max_position_embeddings": 32768}  # as the families' pages say
REPOSITORIES = {
    "Qwen2.5-7B-Instruct": (QWEN25_7B, 32_768),
    "Qwen2.5-7B-Instruct, stretched": (QWEN25_7B | {"rope_scaling": {**STRETCHED, "type": "yarn"}}, 131_072),
    "Qwen3-8B": (QWEN3_8B, 40_960),
    "Qwen3-8B, stretched": (QWEN3_8B | {"rope_scaling": {**STRETCHED, "rope_type": "yarn"}}, 131_072),
    "Llama-3.1-8B": (LLAMA31_8B, 131_072),
    "Llama-3.2-1B": (
        {**LLAMA31_8B, "head_dim": 64, "hidden_size": 2048, "num_hidden_layers": 16, "tie_word_embeddings": True},
        131_072,
    ),
    "saved by transformers 5": (
        {name: value for name, value in QWEN25_7B.items() if name != "rope_theta"}
        | {"dtype": "bfloat16", "layer_types": ["full_attention"] * 28, "pad_token_id": None, "sliding_window": None,
           "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"}},
        32_768,
    ),
    "nothing said of heads and ties": (
        {name: value for name, value in LLAMA31_8B.items() if name != "tie_word_embeddings"}
        | {"num_key_value_heads": None, "is_encoder_decoder": False},
        131_072,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REPOSITORIES)
def test_what_repositories_say_is_understood(name, tmp_path):
    """It is read as `transformers` reads it: sizes, frequencies of RoPE to the bit, angles up to position 131,071."""
    values, context = REPOSITORIES[name]
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = read_config(tmp_path)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    sizes = (theirs.vocab_size, theirs.num_hidden_layers, theirs.num_attention_heads, theirs.num_key_value_heads)
    assert (config.vocab_size, config.n_layer, config.n_head, config.n_kv_head) == sizes
    assert config.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    assert config.tied_embeddings == theirs.tie_word_embeddings
    assert config.context == context
    rotary = importlib.import_module(f"transformers.models.{theirs.model_type}.modeling_{theirs.model_type}")
    rotary = getattr(rotary, f"{theirs.model_type.capitalize()}RotaryEmbedding")(theirs)
    base, scaling = config.rope_theta, config.rope_scaling
    ours = rotary_frequencies(config.head_dim, base, scaling, torch.device("cpu"), torch.float32)
    difference = (ours - rotary.inv_freq).abs() / rotary.inv_freq
    assert difference.max() <= (0 if scaling is None else 2e-7)
    positions = torch.tensor([[0, 1, 4095, 131_071]])
    angles = positions[..., None] * ours  # [1, Q, D/2]
    amplitude = 1.0 if scaling is None else scaling.amplitude
    for found, whole in zip(
        (angles.cos() * amplitude, angles.sin() * amplitude), rotary(torch.zeros(1), positions), strict=True
    ):
        off = (found - whole[..., : config.head_dim // 2]).abs().max()
        assert off <= (1e-6 if scaling is None else 0.02)


def rewritten(folder, tmp_path, change):
    """A copy of the folder, its tensors changed by `change`."""
    copy = changed(folder, tmp_path)
    path = copy / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    return copy


NAME = "model.layers.1.mlp.up_proj.weight"
DAMAGES = {
    "missing": (lambda tensors: tensors.pop(NAME), f"tensor {NAME}: got missing"),
    "extra": (lambda tensors: tensors.update(other=torch.zeros(1)), "tensor other: got extra"),
    "shape": (lambda tensors: tensors.update({NAME: tensors[NAME].T.contiguous()}), f"tensor {NAME}: got shape"),
    "dtype": (lambda tensors: tensors.update({NAME: tensors[NAME].to(torch.int8)}), f"tensor {NAME}: got I8"),
    "nan": (lambda tensors: tensors[NAME][3].fill_(math.nan), f"tensor {NAME}: got NaN or infinity"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_weights_are_refused(folder, tmp_path, kind):
    change, message = DAMAGES[kind]
    with pytest.raises(ValueError, match=message):
        load_pretrained(rewritten(folder, tmp_path, change))


def test_values_that_a_dtype_cannot_hold_are_refused(folder, tmp_path):
    copy = rewritten(folder, tmp_path, lambda tensors: tensors[NAME][3].fill_(1e5))
    assert load_pretrained(copy).embed.weight.dtype == torch.float32
    with pytest.raises(ValueError, match=f"tensor {NAME}: got NaN .* allowed: what is finite in torch.float16"):
        load_pretrained(copy, dtype=torch.float16)


def test_weights_that_memory_cannot_hold_are_refused_before_any_is_read(folder, tmp_path, monkeypatch):
    """With what would fit: in half the bytes, they do."""
    size = sum(parameter.numel() for parameter in load_pretrained(folder).parameters())
    monkeypatch.setattr("resa.reference.weights.pretrained.free_memory", lambda device: 3 * size)
    assert load_pretrained(folder, dtype=torch.float16).embed.weight.dtype == torch.float16
    damaged = rewritten(folder, tmp_path, lambda tensors: tensors[NAME].fill_(math.nan))  # reading it would raise
    allowed = r"allowed: the [\d.]+ GB that this machine has, so at most 24\.0 bits per weight"
    with pytest.raises(torch.OutOfMemoryError, match=rf"got [\d.]+ billion weights, [\d.]+ GB in float32; {allowed}"):
        load_pretrained(damaged)


def test_truncated_and_absent_files_are_named(folder, tmp_path):
    copy = changed(folder, tmp_path)
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"model\.safetensors: got a damaged file"):
        load_pretrained(copy)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors: no such file"):
        load_pretrained(copy)
    names = {f"layers.{index}": "a.safetensors" for index in range(20)}
    for shards, message in (
        (
            {**names, "late": "../b.safetensors"},
            r"weight_map: late: got '\.\./b\.safetensors'; allowed: a file of this",
        ),
        ({**names, "late": 3}, "weight_map: late: got 3; allowed: a file of this folder"),
        ([1], r"weight_map: got \[1\]; allowed: an object"),
    ):
        (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
        with pytest.raises(ValueError, match=message):
            load_pretrained(copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: got no JSON"):
        load_pretrained(copy)
    (copy / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json: no such file"):
        load_pretrained(copy)


def test_a_tensor_twice_or_in_another_shard_is_refused(folder, tmp_path):
    """A download that was half replaced leaves such a folder."""
    transformers.Qwen2ForCausalLM.from_pretrained(folder).save_pretrained(tmp_path, max_shard_size="60KB")
    first, second = sorted(tmp_path.glob("*.safetensors"))[:2]
    load_pretrained(tmp_path)
    tensors = safetensors.torch.load_file(first)
    name = next(iter(tensors))
    moved = tensors.pop(name)
    safetensors.torch.save_file({**safetensors.torch.load_file(second), name: moved}, second)
    message = rf"tensor {name}: got in {second.name}; allowed: in {first.name}, as the index says"
    with pytest.raises(ValueError, match=message):
        load_pretrained(tmp_path)
    safetensors.torch.save_file(tensors, first)
    with pytest.raises(ValueError, match=message):
        load_pretrained(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"][name] = second.name
    index.write_text(json.dumps(values))
    load_pretrained(tmp_path)
    del values["weight_map"][name]
    index.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=rf"tensor {name}: got in {second.name}; allowed: in no file"):
        load_pretrained(tmp_path)


def test_prompts_are_neither_cut_nor_stretched(folder, tmp_path):
    """Whatever fine-tuning has left in the file."""
    plain = read_tokenizer(folder).encode_ordinary(PROSE)
    copy = changed(folder, tmp_path)
    tokenizer = Tokenizer.from_file(str(copy / "tokenizer.json"))
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=len(plain) + 20)
    tokenizer.save(str(copy / "tokenizer.json"))
    assert read_tokenizer(copy).encode_ordinary(PROSE) == plain


def test_a_token_that_begins_a_text_is_added(folder, tmp_path):
    """The files of Llama 3 ask for one, behind a pattern that cuts words as both families' patterns do."""
    copy = changed(folder, tmp_path)
    tokenizer = Tokenizer.from_file(str(copy / "tokenizer.json"))
    end = tokenizer.token_to_id(END)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, end)])
    words = Regex(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+"
    )
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(words, "isolated"), byte_level])
    tokenizer.save(str(copy / "tokenizer.json"))
    found = read_tokenizer(copy)
    library = transformers.PreTrainedTokenizerFast(tokenizer_file=str(copy / "tokenizer.json"))
    tokens = found.encode_ordinary(PROSE)
    assert tokens == library(PROSE)["input_ids"]
    assert tokens[0] == end
    assert found.decode(tokens[1:]) == PROSE


def test_tokenizers_of_other_kinds_are_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json: no such file"):
        read_tokenizer(tmp_path)
    for decoder, message in (
        ({"type": "Metaspace"}, "decoder: got 'Metaspace'"),
        (3, "decoder: got 3"),
        (None, "decoder: got None"),
        ({"type": "ByteLevel"}, "got a damaged file"),  # nothing else is in it
    ):
        path.write_text(json.dumps({"decoder": decoder}))
        with pytest.raises(ValueError, match=rf"tokenizer\.json: {message}"):
            read_tokenizer(tmp_path)
