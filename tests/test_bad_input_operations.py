"""What does not fit is refused before work starts, with a `ValueError` that names the argument.

The message also has to show what was given: each case lists a piece of it.
"""

import re

import pytest
import torch

from resa.reference.config import GPTConfig, ReSAConfig

# One valid call: two sequences, two KV heads of three query heads, four channels, ten slots in blocks of four.
B, HQ, HKV, D, T_MAX, BLOCK, M, Q = 2, 6, 2, 4, 10, 4, 3, 5


def arguments(operation):
    """A valid call of `operation`, by argument name."""
    every = {
        "keys": torch.zeros(B, HKV, T_MAX, D),
        "values": torch.zeros(B, HKV, T_MAX, D),
        "query": torch.zeros(B, HQ, Q, D) if operation == "dense_attention" else torch.zeros(B, HQ, D),
        "bounds": torch.zeros(B, HKV, 2, D, M),
        "scores": torch.zeros(B, HKV, M),
        "indices": torch.zeros(B, HKV, 1, dtype=torch.int32),
        "lengths": torch.tensor([10, 0], dtype=torch.int32),
        "query_lengths": torch.tensor([5, 0], dtype=torch.int32),
        "block_size": BLOCK,
        "config": ReSAConfig(block_size=BLOCK),
    }
    names = {
        "block_bounds": ("keys", "lengths", "block_size"),
        "score_blocks": ("query", "bounds", "lengths", "block_size"),
        "select_blocks": ("scores", "lengths", "config"),
        "sparse_attention": ("query", "keys", "values", "indices", "lengths", "block_size"),
        "dense_attention": ("query", "keys", "values", "lengths", "query_lengths"),
    }[operation]
    return {name: every[name] for name in names}


def like(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


def lengths(*numbers, dtype=torch.int32):
    return torch.tensor(numbers, dtype=dtype)


# operation, what to replace, which arguments the message may name, what it must show of what was given
REFUSED = [
    # Rank and shape. Of two arguments that disagree either may be the one that is named.
    ("block_bounds", {"keys": like(B, T_MAX, D)}, "keys", "2, 10, 4"),
    ("block_bounds", {"keys": like(1, B, HKV, T_MAX, D)}, "keys", "1, 2, 2, 10, 4"),
    ("block_bounds", {"lengths": lengths(10, 0, 0)}, "lengths|keys", "3"),
    ("block_bounds", {"lengths": torch.tensor(10, dtype=torch.int32)}, "lengths", r"\[\]|0|scalar"),
    ("block_bounds", {"lengths": like(B, 1, dtype=torch.int32)}, "lengths", "2, 1"),
    ("score_blocks", {"query": like(B, HQ, 1, D)}, "query", "2, 6, 1, 4"),
    ("score_blocks", {"query": like(B, HQ, D + 1)}, "query|bounds", "5"),
    ("score_blocks", {"query": like(B + 1, HQ, D)}, "query|bounds", "3"),
    ("score_blocks", {"query": like(B, 5, D)}, "query", "5"),
    ("score_blocks", {"query": like(B, 1, D)}, "query", "1"),
    ("score_blocks", {"bounds": like(B, HKV, D, M)}, "bounds", "2, 2, 4, 3"),
    ("score_blocks", {"bounds": like(B, HKV, 3, D, M)}, "bounds", "2, 2, 3, 4, 3"),
    ("score_blocks", {"bounds": like(B, HKV, M, 2, D)}, "bounds", "2, 2, 3, 2, 4"),
    ("score_blocks", {"lengths": lengths(1)}, "lengths", "1"),
    ("select_blocks", {"scores": like(B, M)}, "scores", "2, 3"),
    ("select_blocks", {"scores": like(B, HKV, 1, M)}, "scores", "2, 2, 1, 3"),
    ("select_blocks", {"lengths": lengths(1)}, "lengths", "1"),
    ("sparse_attention", {"query": like(B, HQ, 1, D)}, "query", "2, 6, 1, 4"),
    ("sparse_attention", {"query": like(B, 5, D)}, "query", "5"),
    ("sparse_attention", {"query": like(B, HQ, D + 1)}, "query|keys", "5"),
    ("sparse_attention", {"keys": like(B, HKV, T_MAX, D + 1)}, "query|keys", "5"),
    ("sparse_attention", {"keys": like(B + 1, HKV, T_MAX, D)}, "query|keys", "3"),
    ("sparse_attention", {"keys": like(B, 3, T_MAX, D)}, "keys|values|indices", "3"),
    ("sparse_attention", {"values": like(B, HKV, T_MAX + 1, D)}, "keys|values", "11"),
    ("sparse_attention", {"values": like(B, HKV, T_MAX, D + 1)}, "values", "5"),
    ("sparse_attention", {"values": like(B, HKV + 1, T_MAX, D)}, "values", "3"),
    ("sparse_attention", {"values": like(B, T_MAX, D)}, "values", "2, 10, 4"),
    ("sparse_attention", {"indices": like(B, 1, dtype=torch.int32)}, "indices", "2, 1"),
    ("sparse_attention", {"indices": like(B, HQ, 1, dtype=torch.int32)}, "indices", "6"),
    ("sparse_attention", {"indices": like(B + 1, HKV, 1, dtype=torch.int32)}, "indices", "3"),
    ("sparse_attention", {"lengths": lengths(1, 1, 1)}, "lengths", "3"),
    ("dense_attention", {"query": like(B, HQ, D)}, "query", "2, 6, 4"),
    ("dense_attention", {"query": like(B, 5, Q, D)}, "query", "5"),
    ("dense_attention", {"query": like(B, HQ, Q, D + 1)}, "query|keys", "5"),
    ("dense_attention", {"keys": like(B, HKV, T_MAX - 1, D)}, "keys|values", "9|10"),
    ("dense_attention", {"values": like(B, HKV, T_MAX, D + 1)}, "values", "5"),
    ("dense_attention", {"values": like(B + 1, HKV, T_MAX, D)}, "values", "3"),
    ("dense_attention", {"lengths": lengths(1)}, "lengths", "1"),
    ("dense_attention", {"query_lengths": lengths(1)}, "query_lengths", "1"),
    ("dense_attention", {"query_lengths": like(B, 1, dtype=torch.int32)}, "query_lengths", "2, 1"),
    # Dtypes.
    ("block_bounds", {"keys": like(B, HKV, T_MAX, D, dtype=torch.int32)}, "keys", "int32"),
    ("block_bounds", {"keys": like(B, HKV, T_MAX, D, dtype=torch.complex64)}, "keys", "complex64"),
    ("block_bounds", {"lengths": lengths(10.0, 0.0, dtype=torch.float32)}, "lengths", "float32"),
    ("score_blocks", {"query": like(B, HQ, D, dtype=torch.int64)}, "query", "int64"),
    ("score_blocks", {"bounds": like(B, HKV, 2, D, M, dtype=torch.int8)}, "bounds", "int8"),
    ("score_blocks", {"lengths": lengths(10.0, 0.0, dtype=torch.float64)}, "lengths", "float64"),
    ("select_blocks", {"scores": like(B, HKV, M, dtype=torch.int64)}, "scores", "int64"),
    ("select_blocks", {"lengths": lengths(10.0, 0.0, dtype=torch.float32)}, "lengths", "float32"),
    ("sparse_attention", {"query": like(B, HQ, D, dtype=torch.int32)}, "query", "int32"),
    ("sparse_attention", {"keys": like(B, HKV, T_MAX, D, dtype=torch.int64)}, "keys", "int64"),
    ("sparse_attention", {"values": like(B, HKV, T_MAX, D, dtype=torch.bool)}, "values", "bool"),
    ("sparse_attention", {"indices": like(B, HKV, 1)}, "indices", "float32"),
    ("sparse_attention", {"indices": like(B, HKV, 1, dtype=torch.bool)}, "indices", "bool"),
    ("sparse_attention", {"lengths": lengths(1.0, 1.0, dtype=torch.float32)}, "lengths", "float32"),
    ("dense_attention", {"keys": like(B, HKV, T_MAX, D, dtype=torch.int16)}, "keys", "int16"),
    ("dense_attention", {"lengths": lengths(1.0, 1.0, dtype=torch.float32)}, "lengths", "float32"),
    ("dense_attention", {"query_lengths": lengths(1.0, 1.0, dtype=torch.float16)}, "query_lengths", "float16"),
    # Mixed dtypes: which of them the sums should be taken in is the caller's decision.
    ("sparse_attention", {"keys": like(B, HKV, T_MAX, D, dtype=torch.float64)}, "keys|query", "float64"),
    ("sparse_attention", {"values": like(B, HKV, T_MAX, D, dtype=torch.float16)}, "values", "float16"),
    ("dense_attention", {"query": like(B, HQ, Q, D, dtype=torch.bfloat16)}, "keys|query", "bfloat16"),
    ("dense_attention", {"values": like(B, HKV, T_MAX, D, dtype=torch.float64)}, "values", "float64"),
    # Devices: each argument in turn lives elsewhere.
    ("block_bounds", {"lengths": like(B, dtype=torch.int32, device="meta")}, "lengths|keys", "meta"),
    ("score_blocks", {"bounds": like(B, HKV, 2, D, M, device="meta")}, "bounds|query", "meta"),
    ("select_blocks", {"lengths": like(B, dtype=torch.int32, device="meta")}, "lengths|scores", "meta"),
    ("sparse_attention", {"keys": like(B, HKV, T_MAX, D, device="meta")}, "keys|query", "meta"),
    ("sparse_attention", {"values": like(B, HKV, T_MAX, D, device="meta")}, "values", "meta"),
    ("sparse_attention", {"indices": like(B, HKV, 1, dtype=torch.int32, device="meta")}, "indices", "meta"),
    ("sparse_attention", {"lengths": like(B, dtype=torch.int32, device="meta")}, "lengths", "meta"),
    ("dense_attention", {"values": like(B, HKV, T_MAX, D, device="meta")}, "values", "meta"),
    ("dense_attention", {"query_lengths": like(B, dtype=torch.int32, device="meta")}, "query_lengths", "meta"),
    # Numbers of tokens.
    ("block_bounds", {"lengths": lengths(11, 0)}, "lengths", "11"),
    ("block_bounds", {"lengths": lengths(3, -1)}, "lengths", "-1"),
    ("score_blocks", {"lengths": lengths(0, M * BLOCK + 1)}, "lengths", "13"),
    ("score_blocks", {"lengths": lengths(-2, 3)}, "lengths", "-2"),
    ("select_blocks", {"lengths": lengths(0, M * BLOCK + 1)}, "lengths", "13"),
    ("select_blocks", {"lengths": lengths(-2, 3)}, "lengths", "-2"),
    ("sparse_attention", {"lengths": lengths(11, 0)}, "lengths", "11"),
    ("sparse_attention", {"lengths": lengths(-1, 0)}, "lengths", "-1"),
    ("dense_attention", {"lengths": lengths(0, 11)}, "lengths", "11"),
    ("dense_attention", {"lengths": lengths(0, -1)}, "lengths", "-1"),
    ("dense_attention", {"query_lengths": lengths(6, 0)}, "query_lengths", "6"),
    ("dense_attention", {"query_lengths": lengths(5, -3)}, "query_lengths", "-3"),
    # Block sizes.
    ("block_bounds", {"block_size": 0}, "block_size", "0"),
    ("block_bounds", {"block_size": -4}, "block_size", "-4"),
    ("block_bounds", {"block_size": 4.0}, "block_size", "4.0"),
    ("score_blocks", {"block_size": 0}, "block_size", "0"),
    ("score_blocks", {"block_size": True}, "block_size", "True"),
    ("sparse_attention", {"block_size": 0}, "block_size", "0"),
    ("sparse_attention", {"block_size": -1}, "block_size", "-1"),
    # Not tensors at all.
    ("block_bounds", {"keys": [[[[0.0]]]]}, "keys", "list"),
    ("block_bounds", {"lengths": [10, 0]}, "lengths", "list"),
    ("score_blocks", {"query": None}, "query", "None"),
    ("select_blocks", {"lengths": [10, 0]}, "lengths", "list"),
    ("sparse_attention", {"indices": [[[0]]]}, "indices", "list"),
    ("sparse_attention", {"lengths": [10, 0]}, "lengths", "list"),
    ("dense_attention", {"query": None, "query_lengths": None}, "query", "None"),
    ("dense_attention", {"lengths": [10, 0], "query_lengths": None}, "lengths", "list"),
]


def describe(change):
    """What the test is called: small tensors by their numbers, larger ones by dtype, shape and device."""

    def show(value):
        if not isinstance(value, torch.Tensor):
            return value
        if value.device.type == "cpu" and value.numel() <= 3 and value.dtype == torch.int32:
            return value.tolist()
        return f"{value.dtype} {list(value.shape)} {value.device}"

    return " ".join(f"{name}={show(value)}" for name, value in change.items())


@pytest.mark.parametrize(
    ("operation", "change", "names", "shown"), REFUSED, ids=[f"{case[0]}-{describe(case[1])}" for case in REFUSED]
)
def test_bad_input_is_refused_by_name(ops, operation, change, names, shown):
    call = arguments(operation)
    getattr(ops, operation)(**call)  # so it is the change that is refused
    with pytest.raises(ValueError, match=rf"^({names})\b") as refusal:
        getattr(ops, operation)(**call | change)
    assert re.search(shown, str(refusal.value)), f"{refusal.value!s} does not show {shown}"


@pytest.mark.parametrize("operation", ["block_bounds", "score_blocks", "select_blocks", "sparse_attention"])
def test_both_integer_widths_will_do_for_lengths(ops, operation):
    """The specification says int32; int64 is what PyTorch makes of plain numbers."""
    call = arguments(operation)
    narrow = getattr(ops, operation)(**call)
    wide = getattr(ops, operation)(**call | {"lengths": call["lengths"].long()})
    assert torch.equal(narrow, wide)
    assert narrow.dtype == wide.dtype


# --------------------------------------------------------------------------------------------------------------
# Configurations
# --------------------------------------------------------------------------------------------------------------

GPT = {
    "vocab_size": 11,
    "n_layer": 2,
    "n_head": 6,
    "n_kv_head": 2,
    "head_dim": 4,
    "hidden_size": 24,
    "intermediate_size": 32,
}
SIZES = (*GPT, "context")


def test_decoding_defaults_are_the_specifications():
    config = ReSAConfig()
    assert (config.block_size, config.active_ratio, config.min_blocks, config.local_blocks) == (16, 0.1, 16, 1)
    assert (config.interval, config.dense_below) == (32, 0)
    assert config.schedule in ("paper", "fused")


@pytest.mark.parametrize(
    "fields",
    [
        {"active_ratio": 1},
        {"active_ratio": 1.0},
        {"active_ratio": 1e-9},
        {"min_blocks": 1},
        {"min_blocks": 3, "local_blocks": 3},
        {"interval": None},
        {"interval": 1},
        {"schedule": "paper"},
        {"schedule": "fused"},
        {"block_size": 1},
        {"dense_below": 10**9},
    ],
    ids=str,
)
def test_good_decoding_fields_are_taken(fields):
    config = ReSAConfig(**fields)
    assert {name: getattr(config, name) for name in fields} == fields


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        *[({"block_size": value}, "block_size") for value in (0, -1, 16.0, True, None, "16")],
        *[
            ({"active_ratio": value}, "active_ratio")
            for value in (0, 0.0, -0.1, 1.0000001, 2, float("nan"), float("inf"), True, None, "0.1")
        ],
        *[({"local_blocks": value}, "local_blocks") for value in (0, -1, 1.0, True, None)],
        *[({"min_blocks": value}, "min_blocks") for value in (0, -1, 16.0, True, None)],
        ({"min_blocks": 2, "local_blocks": 3}, "min_blocks|local_blocks"),
        ({"local_blocks": 17}, "min_blocks|local_blocks"),
        *[({"interval": value}, "interval") for value in (0, -1, True, False, 32.0, float("inf"), "32", "none")],
        *[({"schedule": value}, "schedule") for value in ("Fused", "", "papers", None, 1)],
        *[({"dense_below": value}, "dense_below") for value in (-1, 0.5, True, None)],
    ],
    ids=str,
)
def test_bad_decoding_fields_are_refused_by_name(fields, name):
    with pytest.raises(ValueError, match=rf"^({name})\b") as refusal:
        ReSAConfig(**fields)
    assert str(next(iter(fields.values()))) in str(refusal.value)


def test_good_model_fields_are_taken():
    config = GPTConfig(**GPT, context=64, rope_theta=1e6, norm_eps=1e-5, qkv_bias=True, qk_norm=True)
    assert (config.n_head, config.n_kv_head, config.context, config.rope_theta) == (6, 2, 64, 1e6)
    assert (config.norm_eps, config.qkv_bias, config.qk_norm) == (1e-5, True, True)
    GPTConfig(**GPT | {"n_kv_head": 6})
    GPTConfig(**GPT | {"n_kv_head": 1})
    GPTConfig(**GPT | {"hidden_size": 7})  # heads need not fill the hidden size
    for name in SIZES:
        if name not in ("n_head", "n_kv_head", "head_dim"):
            assert getattr(GPTConfig(**GPT | {name: 1}), name) == 1


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        *[({size: value}, size) for size in SIZES for value in (0, -1, 2.0, True, None)],
        ({"n_head": 5}, "n_head|n_kv_head"),
        ({"n_kv_head": 4}, "n_head|n_kv_head"),
        ({"n_kv_head": 12}, "n_head|n_kv_head"),
        *[({"head_dim": value}, "head_dim") for value in (1, 3, 5)],
        *[({"rope_theta": value}, "rope_theta") for value in (0, -1.0, float("nan"), float("inf"), None, "1e4")],
        *[({"norm_eps": value}, "norm_eps") for value in (0.0, -1e-6, float("nan"), float("inf"), None)],
        *[({flag: value}, flag) for flag in ("qkv_bias", "qk_norm", "tied_embeddings") for value in (1, 0, None)],
    ],
    ids=str,
)
def test_bad_model_fields_are_refused_by_name(fields, name):
    with pytest.raises(ValueError, match=rf"^({name})\b") as refusal:
        GPTConfig(**GPT | fields)
    assert str(next(iter(fields.values()))) in str(refusal.value)


@pytest.mark.parametrize("config", [ReSAConfig(), GPTConfig(**GPT)], ids=lambda config: type(config).__name__)
def test_configurations_cannot_be_changed_and_compare_by_value(config):
    """A field set later would escape the checks."""
    name = next(iter(vars(config)))
    with pytest.raises(AttributeError):
        setattr(config, name, 1)
    assert config == type(config)(**vars(config))
    assert hash(config) == hash(type(config)(**vars(config)))
