"""GGUF files: what `transformers` computes is the judge, of small random models and of a real one.

A writer here lays weights out as the converters of llama.cpp do, so that reading is checked against another's layout.
"""

import functools
import importlib

import numpy as np
import pytest
import torch

import families
from resa.reference import ReSAConfig, generate
from resa.reference.weights.gguf import gguf_config, in_halves, metadata, open_gguf
from resa.reference.weights.models import find_model, open_model
from resa.reference.weights.pretrained import load_pretrained

gguf = pytest.importorskip("gguf", reason="the extra `dev` has it")
transformers = pytest.importorskip("transformers", reason="the extra `dev` has it")

# Rows of 192 and 96 numbers: quantised types take 32 at a time.
SIZES = {
    "vocab_size": 96, "hidden_size": 192, "intermediate_size": 96, "num_hidden_layers": 2, "rms_norm_eps": 1e-5,
}  # fmt: skip
# As Llama 3.1 has it, which these files do not say: frequencies of all three kinds.
LLAMA3 = {**families.LLAMA3, "rope_theta": 500_000.0, "original_max_position_embeddings": 8192}
MODELS = {  # name: family, options
    **{name: (name, {}) for name in ("llama", "llama-linear", "qwen2", "qwen2-tied-yarn", "qwen3")},
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-3.1": ("llama-3.1", {"rope_parameters": LLAMA3}),
}
LAYER = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def random_model(name):
    """A random model by `transformers`, every weight away from its neutral value."""
    family, options = MODELS[name]
    return families.random_model(family, **SIZES, **options)


def foreign_name(name):
    stem, _, kind = name.rpartition(".")
    if stem in WHOLE:
        return f"{WHOLE[stem]}.{kind}"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{LAYER[rest]}.{kind}"


def interleaved(weight, heads):
    """The converter's layout of q and k for architecture llama: the two channels of a pair side by side."""
    rows = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return rows.swapaxes(1, 2).reshape(weight.shape)


def write(path, model, *, kind="F32", fields=None, tensors=None, tokens=None, without=()):
    """Write a model as a GGUF file. `fields` and `tensors` are added or replaced, `without` left out."""
    config, family = model.config, model.config.model_type
    writer = gguf.GGUFWriter(path, family)
    rope = config.rope_parameters
    values = {
        "block_count": config.num_hidden_layers, "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size, "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads, "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps, "rope.freq_base": rope["rope_theta"],
    }  # fmt: skip
    if getattr(config, "head_dim", None):
        values["attention.key_length"] = values["attention.value_length"] = config.head_dim
    if rope["rope_type"] in ("linear", "yarn"):
        values |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": rope["factor"]}
    if rope["rope_type"] == "yarn":
        values["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    values = {f"{family}.{key}": value for key, value in values.items()} | (fields or {})
    for key, value in values.items():
        if key not in without:
            adder = {str: "add_string", bool: "add_bool", int: "add_uint32", float: "add_float32", list: "add_array"}
            getattr(writer, adder[type(value)])(key, value)

    # Letters, the space, one pair that is merged, and special tokens.
    names = tokens
    if tokens is None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_merges(["a b"])
        names = [*LETTERS, "Ġ", "ab"]
        names += [f"<{index}>" for index in range(config.vocab_size - len(names))]
    if names:
        writer.add_token_list(names)
        writer.add_token_types([3 if name.startswith("<") and len(name) > 1 else 1 for name in names])

    weights = {foreign_name(name): weight.numpy() for name, weight in model.state_dict().items()}
    if config.tie_word_embeddings:
        del weights["output.weight"]
    for name, weight in weights.items():
        if family == "llama" and (".attn_q." in name or ".attn_k." in name):
            weight = interleaved(weight, config.num_attention_heads if "attn_q" in name else config.num_key_value_heads)
        weights[name] = weight
    if rope["rope_type"] == "llama3":
        weights["rope_freqs.weight"] = llama3_factors(rope, config.hidden_size // config.num_attention_heads)
    for name, weight in {**weights, **(tensors or {})}.items():
        if name in without:
            continue
        own = getattr(gguf.GGMLQuantizationType, kind if weight.ndim == 2 else "F32")
        writer.add_tensor(name, gguf.quants.quantize(weight, own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama3_factors(rope, size):
    """Divisors of the pairs' frequencies, as converters store them for Llama 3.1."""
    waves = 2 * np.pi * rope["rope_theta"] ** (np.arange(0, size, 2) / size)
    low, high = (rope["original_max_position_embeddings"] / rope[f"{name}_freq_factor"] for name in ("low", "high"))
    smooth = (rope["original_max_position_embeddings"] / waves - 1.0) / 3.0
    ramp = 1 / ((1 - smooth) / rope["factor"] + smooth)
    return np.where(waves < high, 1.0, np.where(waves > low, rope["factor"], ramp)).astype(np.float32)


@pytest.mark.parametrize("family", MODELS)
def test_logits_are_those_of_transformers(family, tmp_path):
    theirs = random_model(family)
    ours = load_pretrained(write(tmp_path / "model.gguf", theirs))
    tokens = torch.arange(300).view(1, -1) * 7 % SIZES["vocab_size"]
    with torch.no_grad():
        expected, found = theirs(tokens).logits, ours(tokens)
    assert expected.std() > 0.1
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_a_default_device_changes_no_weight(tmp_path):
    path = write(tmp_path / "model.gguf", random_model("llama-3.1"))
    expected = load_pretrained(path)
    with torch.device("meta"):
        found = load_pretrained(path)
    assert found.config == expected.config
    pairs = zip(found.parameters(), expected.parameters(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_every_type_is_read_as_the_library_dequantises_it(kind, tmp_path):
    theirs, own = random_model("qwen2"), getattr(gguf.GGMLQuantizationType, kind)
    model = load_pretrained(write(tmp_path / "model.gguf", theirs, kind=kind))
    is_half = {"F16": torch.float16, "BF16": torch.bfloat16}
    assert model.embed.weight.dtype == is_half.get(kind, torch.float32)
    weight = theirs.state_dict()["model.layers.1.mlp.up_proj.weight"].numpy()
    expected = gguf.quants.dequantize(gguf.quants.quantize(weight, own), own)
    assert torch.equal(model.layers[1].mlp.up_proj.weight.float(), torch.from_numpy(expected))
    wide = load_pretrained(tmp_path / "model.gguf", dtype=torch.float64)
    assert wide.embed.weight.dtype == torch.float64


def test_pairs_go_back_to_halves():
    weight = torch.arange(2 * 8 * 3).view(16, 3)
    assert torch.equal(in_halves(torch.from_numpy(interleaved(weight.numpy(), 2)), 8), weight)


def test_tokens_template_and_ends_come_from_the_metadata(tmp_path):
    more = {
        "tokenizer.chat_template": "{{ messages }}",
        "tokenizer.ggml.eos_token_id": 94,
        "tokenizer.ggml.eot_token_id": 95,
    }
    path = write(tmp_path / "model.gguf", random_model("qwen2"), fields=more)
    found = open_model(path)
    tokens = found.tokenizer.encode_ordinary("ab a<2>b")
    assert tokens == [27, 26, 0, 30, 1]  # ab, space, a, <2>, b
    assert found.tokenizer.decode(tokens) == "ab a<2>b"
    assert (found.stop_tokens, found.chat_template) == ([94, 95], "{{ messages }}")


def test_a_first_token_is_added_where_the_file_says_so(tmp_path):
    names = ["ab", *LETTERS, *(f"<{index}>" for index in range(67)), "<s>", "</s>"]
    fields = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 94, "tokenizer.ggml.add_bos_token": True,
    }  # fmt: skip
    path = write(tmp_path / "model.gguf", random_model("qwen2"), fields=fields, tokens=names)
    assert open_model(path).tokenizer.encode_ordinary("ab") == [94, 0]


# ---- Refusals -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small():
    return random_model("llama")


REFUSED = {  # what is changed: the message
    "architecture": ({"fields": {"general.architecture": "gemma2"}}, r"general.architecture: got 'gemma2'; allowed: l"),
    "experts": ({"fields": {"llama.expert_count": 8}}, r"num_local_experts: got 8"),
    "window": ({"fields": {"llama.attention.sliding_window": 64}}, r"sliding_window: got 64"),
    "heads per layer": ({"fields": {"llama.attention.head_count_kv": [2, 4]}}, r"head_count_kv: got \[2, 4\]"),
    "part of a head": ({"fields": {"llama.rope.dimension_count": 8}}, r"rope.dimension_count: got 8; allowed: 32"),
    "long rope": ({"fields": {"llama.rope.scaling.type": "longrope"}}, r"kind: got 'longrope'"),
    "layers": ({"fields": {"llama.block_count": 10**9}}, r"block_count: got 1000000000; allowed: at most"),
    "no layers": ({"without": ("llama.block_count",)}, r"num_hidden_layers: got None"),
    "vocabulary": ({"tokens": ["a", "b"]}, r"tokenizer.ggml.tokens: got 2; allowed: 96, the embedding's rows"),
    "no vocabulary": ({"tokens": []}, r"tokenizer.ggml.tokens: got 0"),
    "missing tensor": ({"without": ("blk.1.ffn_up.weight",)}, r"tensor blk.1.ffn_up.weight: got missing"),
    "extra tensor": ({"tensors": {"blk.0.more.weight": np.ones((2, 2), "f")}}, r"blk.0.more.weight: got extra"),
    "other shape": ({"tensors": {"output_norm.weight": np.ones(32, "f")}}, r"output_norm.weight: got shape \(32,\)"),
    "not finite": ({"tensors": {"output_norm.weight": np.full(192, np.nan, "f")}}, r"output_norm.weight: got NaN or"),
    "other factors": ({"tensors": {"rope_freqs.weight": np.arange(1, 17, dtype="f")}}, r"rope_freqs.weight: got other"),
    "a scale": (
        {"fields": {"llama.attention.scale": 0.5}},
        r"llama.attention.scale: got 0.5; allowed: None or no",
    ),
    "soft caps": ({"fields": {"llama.final_logit_softcapping": 30.0}}, r"final_logit_softcapping: got 30.0"),
    "both ways": ({"fields": {"llama.attention.causal": False}}, r"attention.causal: got False; allowed: True"),
    "old scaling": ({"fields": {"llama.rope.scale_linear": 4.0}}, r"rope.scale_linear: got 4.0"),
    "amplitude": (
        {
            "fields": {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 4.0,
                "llama.rope.scaling.attn_factor": 2.0,
            }
        },
        r"rope field attn_factor: got 2.0",
    ),
    "no epsilon": (
        {"without": ("llama.attention.layer_norm_rms_epsilon",)},
        r"rms_epsilon: got None; allowed: a",
    ),
    "no base": ({"fields": {"llama.rope.freq_base": 0.0}}, r"rope.freq_base: got 0.0; allowed: a number > 0"),
    "base of text": ({"fields": {"llama.rope.freq_base": "x"}}, r"rope.freq_base: got x; allowed: a number > 0"),
    "a part": ({"fields": {"split.count": 3}}, r"got one of 3 parts; allowed: one file"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_that_would_compute_something_else_is_refused(case, small, tmp_path):
    changes, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        load_pretrained(write(tmp_path / "model.gguf", small, **changes))


def test_keys_that_are_unknown_are_named_in_one_warning(small, tmp_path):
    fields = {"llama.new_key": 1, "llama.attention.newer": 2.0, "llama.vocab_size": 96}
    with pytest.warns(UserWarning, match=r"keys unknown here, taken to change nothing: attention.newer, new_key$"):
        load_pretrained(write(tmp_path / "model.gguf", small, fields=fields))


def test_a_factor_without_a_type_is_linear(small, tmp_path):
    path = write(tmp_path / "model.gguf", small, fields={"llama.rope.scaling.factor": 4.0})
    scaling = load_pretrained(path).config.rope_scaling
    assert (scaling.kind, scaling.factor) == ("linear", 4.0)


GPT2 = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.merges": ["a b"]}


def test_a_llama_3_file_opens_its_texts_with_the_first_token(small, tmp_path):
    """Unless it says otherwise: its converters leave the key out, and llama.cpp adds the token."""
    names = ["ab", *LETTERS, *(f"<{index}>" for index in range(67)), "<s>", "</s>"]
    fields = {**GPT2, "tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.bos_token_id": 94}
    for more, expected in (({}, [94, 0]), ({"tokenizer.ggml.add_bos_token": False}, [0])):
        path = write(tmp_path / "model.gguf", small, fields={**fields, **more}, tokens=names)
        assert open_model(path).tokenizer.encode_ordinary("ab") == expected


def test_a_tokenizer_of_another_kind_is_refused_before_any_weight(small, tmp_path):
    names = [f"<{index}>" for index in range(96)]
    known = ["ab", *LETTERS, *(f"<{index}>" for index in range(69))]
    for fields, message in (
        ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.merges": ["a b"]}, "tokenizer.ggml.pre: got None"),
        ({**GPT2, "tokenizer.ggml.add_eos_token": True}, "add_eos_token: got True; allowed: false"),
        ({**GPT2, "tokenizer.ggml.eos_token_id": 96}, "eos_token_id: got 96; allowed: 0 … 95"),
        ({**GPT2, "tokenizer.ggml.bos_token_id": "x"}, "bos_token_id: got 'x'; allowed: 0 … 95"),
        ({**GPT2, "tokenizer.ggml.merges": ["b a"]}, "tokenizer.ggml.merges: got .*; allowed: pairs of tokens"),
        ({**GPT2, "tokenizer.ggml.merges": ["ab"]}, "tokenizer.ggml.merges: got .*; allowed: pairs of tokens"),
    ):
        path = write(tmp_path / "model.gguf", small, fields=fields, tokens=known)
        with pytest.raises(ValueError, match=message):
            open_model(path)
    path = write(tmp_path / "model.gguf", small, fields=GPT2, tokens=[*known[:-1], "ab"])
    with pytest.raises(ValueError, match=r"tokenizer.ggml.tokens: got 95 different ones; allowed: 96"):
        open_model(path)
    for fields, message in (
        ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.model: got 'llama'; allowed: 'gpt2'"),
        ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "tekken"}, "tokenizer.ggml.pre: got 'tekken'"),
        ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2"}, "tokenizer.ggml.merges: got missing"),
    ):
        path = write(tmp_path / "model.gguf", small, fields=fields, tokens=names)
        with pytest.raises(ValueError, match=message):
            open_model(path)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.6, 0.97])
def test_a_truncated_file_is_refused(share, small, tmp_path):
    content = write(tmp_path / "whole.gguf", small).read_bytes()
    path = tmp_path / "model.gguf"
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match=r"model.gguf: got a damaged or foreign file"):
        load_pretrained(path)


def test_a_foreign_file_a_missing_one_and_a_missing_package_are_named(tmp_path, monkeypatch):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(ValueError, match="got a damaged or foreign file"):
        load_pretrained(path)
    with pytest.raises(FileNotFoundError, match=r"none.gguf: no such file"):
        load_pretrained(tmp_path / "none.gguf")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ImportError, match="takes the package `gguf`: pip install gguf"):
        load_pretrained(path)


# ---- A real model -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real():
    try:
        return find_model("smollm2")
    except FileNotFoundError as error:
        pytest.skip(str(error))


def test_a_real_model_is_that_of_transformers(real, monkeypatch):
    """Logits, 48 greedy tokens, tokenizer and template, both reading the same file in float32."""
    importlib.import_module("accelerate")  # that library needs it to read such files
    with monkeypatch.context() as patch:  # it reads the file several times, and makes a map of names for every tensor
        for name in ("GGUFReader", "get_tensor_name_map"):
            patch.setattr(gguf, name, functools.cache(getattr(gguf, name)))
        options = {"gguf_file": real.name, "dtype": torch.float32}
        theirs = transformers.AutoModelForCausalLM.from_pretrained(real.parent, **options)
        their_tokenizer = transformers.AutoTokenizer.from_pretrained(real.parent, gguf_file=real.name)
    ours = open_model("smollm2")
    text = "Once 12345 Ünïcödé 日本語\r\n\t  <|im_start|>user\nhi<|im_end|> def f(x):\n        return x**2  # done"
    written = ours.tokenizer.encode_ordinary(text)
    assert written == their_tokenizer(text)["input_ids"]
    assert ours.tokenizer.decode(written) == text
    assert ours.chat_template == their_tokenizer.chat_template
    assert ours.stop_tokens == [their_tokenizer.eos_token_id]

    # Theirs is led along our tokens: it chooses the same ones if the likeliest is ours everywhere.
    question = "<|im_start|>user\nTell me a story about a lighthouse keeper.<|im_end|>\n<|im_start|>assistant\n"
    prompt = ours.tokenizer.encode_ordinary(question)
    tokens = generate(ours.model, [prompt], 48, ReSAConfig(interval=1))[0].tokens
    fed = torch.tensor([prompt + tokens])
    with torch.no_grad():
        expected, found = theirs.eval()(fed).logits, ours.model(fed)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert expected[0, len(prompt) - 1 : -1].argmax(dim=-1).tolist() == tokens
    assert len(set(tokens)) > 20, "a loop of a few tokens would prove little"


def test_the_real_models_configuration_is_what_its_metadata_says(real):
    reader = open_gguf(real)
    config, values = gguf_config(str(real), reader), metadata(reader)
    assert (config.n_layer, config.n_head, config.n_kv_head, config.head_dim) == (30, 9, 3, 64)
    assert (config.context, config.rope_theta, config.tied_embeddings) == (8192, 100_000.0, True)
    assert values["general.architecture"] == "llama"
