"""What the Triton operations refuse, with a `ValueError` that names the argument, before anything is launched.

All the reference refuses, and what its kernels are not written for. A message must also show what was given.
"""

import os
import re
import subprocess
import sys
from functools import partial

import pytest
import torch
from strategies import BLOCK_SIZES, DEVICE, HEAD_DIMS

from resa.reference.config import ReSAConfig

pytestmark = pytest.mark.fast
attention, blocks, cache = (
    pytest.importorskip(f"resa.fast.{name}", reason="triton comes for Linux only")
    for name in ("attention", "blocks", "cache")
)
OPERATIONS = {
    "block_bounds": blocks.block_bounds,
    "score_blocks": blocks.score_blocks,
    "select_blocks": blocks.select_blocks,
    "sparse_attention": attention.sparse_attention,
    "dense_attention": attention.dense_attention,
    "write_window": cache.write_window,
}

# One valid call: two sequences, two KV heads of three query heads, 16 channels, 20 slots in blocks of eight.
B, HQ, HKV, D, T_MAX, BLOCK, M, Q = 2, 6, 2, 16, 20, 8, 3, 5
FLOAT_ARGUMENTS = ("keys", "values", "query", "bounds", "scores", "new_keys", "new_values")


def like(*shape, dtype=torch.float32, device=DEVICE):
    return torch.zeros(shape, dtype=dtype, device=device)


def lengths(*numbers, dtype=torch.int32):
    return torch.tensor(numbers, dtype=dtype, device=DEVICE)


def arguments(operation, head_dim=D, block_size=BLOCK, group=HQ // HKV, dtype=torch.float32):
    """A valid call of `operation`, by argument name."""
    n_blocks, heads = -(-T_MAX // block_size), HKV * group
    floats = partial(like, dtype=dtype)
    every = {
        "keys": floats(B, HKV, T_MAX, head_dim),
        "values": floats(B, HKV, T_MAX, head_dim),
        "query": floats(B, heads, Q, head_dim) if operation == "dense_attention" else floats(B, heads, head_dim),
        "bounds": floats(B, HKV, 2, head_dim, n_blocks),
        "scores": like(B, HKV, n_blocks),
        "indices": like(B, HKV, 1, dtype=torch.int32),
        "lengths": lengths(T_MAX, 0),
        "query_lengths": lengths(5, 0),
        "new_keys": floats(B, HKV, Q, head_dim),
        "new_values": floats(B, HKV, Q, head_dim),
        "start": lengths(3, T_MAX),
        "end": lengths(8, T_MAX),
        "block_size": block_size,
        "config": ReSAConfig(block_size=block_size),
    }
    names = {
        "block_bounds": ("keys", "lengths", "block_size"),
        "score_blocks": ("query", "bounds", "lengths", "block_size"),
        "select_blocks": ("scores", "lengths", "config"),
        "sparse_attention": ("query", "keys", "values", "indices", "lengths", "block_size"),
        "dense_attention": ("query", "keys", "values", "lengths", "query_lengths"),
        "write_window": ("keys", "values", "bounds", "new_keys", "new_values", "start", "end", "block_size"),
    }[operation]
    return {name: every[name] for name in names}


def refused(operation, call, names, shown):
    """Whether `call` raises a ValueError that begins with one of the names and shows what was given."""
    with pytest.raises(ValueError, match=rf"^({names})\b") as refusal:
        OPERATIONS[operation](**call)
    assert re.search(shown, str(refusal.value)), f"{refusal.value!s} does not show {shown}"
    assert "; allowed: " in str(refusal.value)


# operation, what to replace, which arguments the message may name, what it must show of what was given
REFUSED = [
    # Rank and shape. Of two arguments that disagree either may be the one that is named.
    ("block_bounds", {"keys": like(B, T_MAX, D)}, "keys", "2, 20, 16"),
    ("block_bounds", {"lengths": lengths(10, 0, 0)}, "lengths|keys", "3"),
    ("block_bounds", {"lengths": like(B, 1, dtype=torch.int32)}, "lengths", "2, 1"),
    ("score_blocks", {"query": like(B, HQ, 1, D)}, "query", "2, 6, 1, 16"),
    ("score_blocks", {"query": like(B, HQ, 2 * D)}, "query|bounds", "16|32"),
    ("score_blocks", {"query": like(B + 1, HQ, D)}, "query|bounds", "3"),
    ("score_blocks", {"query": like(B, 5, D)}, "query", "5"),
    ("score_blocks", {"query": like(B, 1, D)}, "query", "1"),
    ("score_blocks", {"bounds": like(B, HKV, D, M)}, "bounds", "2, 2, 16, 3"),
    ("score_blocks", {"bounds": like(B, HKV, 3, D, M)}, "bounds", "2, 2, 3, 16, 3"),
    ("score_blocks", {"bounds": like(B, HKV, M, 2, D)}, "bounds", "2, 2, 3, 2, 16"),
    ("score_blocks", {"lengths": lengths(1)}, "lengths", "1"),
    ("select_blocks", {"scores": like(B, M)}, "scores", "2, 3"),
    ("select_blocks", {"scores": like(B, HKV, 1, M)}, "scores", "2, 2, 1, 3"),
    ("select_blocks", {"lengths": lengths(1)}, "lengths", "1"),
    ("sparse_attention", {"query": like(B, HQ, 1, D)}, "query", "2, 6, 1, 16"),
    ("sparse_attention", {"query": like(B, 5, D)}, "query", "5"),
    ("sparse_attention", {"query": like(B, HQ, 2 * D)}, "query|keys", "16|32"),
    ("sparse_attention", {"keys": like(B, HKV, T_MAX, 2 * D)}, "query|keys", "16|32"),
    ("sparse_attention", {"keys": like(B + 1, HKV, T_MAX, D)}, "query|keys", "3"),
    ("sparse_attention", {"keys": like(B, 3, T_MAX, D)}, "keys|values|indices", "3"),
    ("sparse_attention", {"values": like(B, HKV, T_MAX + 1, D)}, "keys|values", "21"),
    ("sparse_attention", {"values": like(B, HKV, T_MAX, 2 * D)}, "values", "32"),
    ("sparse_attention", {"values": like(B, T_MAX, D)}, "values", "2, 20, 16"),
    ("sparse_attention", {"indices": like(B, 1, dtype=torch.int32)}, "indices", "2, 1"),
    ("sparse_attention", {"indices": like(B, HQ, 1, dtype=torch.int32)}, "indices", "6"),
    ("sparse_attention", {"indices": like(B + 1, HKV, 1, dtype=torch.int32)}, "indices", "3"),
    ("sparse_attention", {"lengths": lengths(1, 1, 1)}, "lengths", "3"),
    ("dense_attention", {"query": like(B, HQ, D)}, "query", "2, 6, 16"),
    ("dense_attention", {"query": like(B, 5, Q, D)}, "query", "5"),
    ("dense_attention", {"query": like(B, HQ, Q, 2 * D)}, "query|keys", "16|32"),
    ("dense_attention", {"keys": like(B, HKV, T_MAX - 1, D)}, "keys|values", "19|20"),
    ("dense_attention", {"values": like(B, HKV, T_MAX, 2 * D)}, "values", "32"),
    ("dense_attention", {"values": like(B + 1, HKV, T_MAX, D)}, "values", "3"),
    ("dense_attention", {"lengths": lengths(1)}, "lengths", "1"),
    ("dense_attention", {"query_lengths": lengths(1)}, "query_lengths", "1"),
    ("dense_attention", {"query_lengths": like(B, 1, dtype=torch.int32)}, "query_lengths", "2, 1"),
    ("write_window", {"keys": like(B, T_MAX, D)}, "keys", "2, 20, 16"),
    ("write_window", {"values": like(B, HKV, T_MAX + 1, D)}, "keys|values", "21"),
    ("write_window", {"bounds": like(B, HKV, 2, D, M + 1)}, "bounds", "4"),
    ("write_window", {"bounds": like(B, HKV, 2, D, M - 1)}, "bounds", "2"),
    ("write_window", {"bounds": like(B, HKV, 2, M, D)}, "bounds", "2, 2, 2, 3, 16"),
    ("write_window", {"bounds": like(B, HKV, D, M)}, "bounds", "2, 2, 16, 3"),
    ("write_window", {"new_keys": like(B, HKV, Q + 1, D)}, "new_keys|new_values", "5|6"),
    ("write_window", {"new_values": like(B, HKV + 1, Q, D)}, "new_values", "3"),
    ("write_window", {"new_values": like(B, HKV, Q, 2 * D)}, "new_values", "32"),
    ("write_window", {"new_keys": like(B, HKV, D)}, "new_keys", "2, 2, 16"),
    ("write_window", {"start": lengths(0)}, "start", "1"),
    ("write_window", {"end": like(B, 1, dtype=torch.int32)}, "end", "2, 1"),
    # Dtypes.
    ("block_bounds", {"keys": like(B, HKV, T_MAX, D, dtype=torch.int32)}, "keys", "int32"),
    ("block_bounds", {"lengths": lengths(10.0, 0.0, dtype=torch.float32)}, "lengths", "float32"),
    ("score_blocks", {"query": like(B, HQ, D, dtype=torch.int64)}, "query", "int64"),
    ("score_blocks", {"bounds": like(B, HKV, 2, D, M, dtype=torch.int8)}, "bounds", "int8"),
    ("score_blocks", {"lengths": lengths(10.0, 0.0, dtype=torch.float64)}, "lengths", "float64"),
    ("select_blocks", {"scores": like(B, HKV, M, dtype=torch.int64)}, "scores", "int64"),
    *[
        ("select_blocks", {"scores": like(B, HKV, M, dtype=dtype)}, "scores", str(dtype))
        for dtype in (torch.float64, torch.float16, torch.bfloat16)
    ],
    ("select_blocks", {"lengths": lengths(10.0, 0.0, dtype=torch.float32)}, "lengths", "float32"),
    ("sparse_attention", {"query": like(B, HQ, D, dtype=torch.int32)}, "query", "int32"),
    ("sparse_attention", {"indices": like(B, HKV, 1)}, "indices", "float32"),
    ("sparse_attention", {"indices": like(B, HKV, 1, dtype=torch.bool)}, "indices", "bool"),
    ("sparse_attention", {"indices": like(B, HKV, 1, dtype=torch.int16)}, "indices", "int16"),
    ("sparse_attention", {"lengths": lengths(1.0, 1.0, dtype=torch.float32)}, "lengths", "float32"),
    ("dense_attention", {"lengths": lengths(1.0, 1.0, dtype=torch.float32)}, "lengths", "float32"),
    ("dense_attention", {"query_lengths": lengths(1.0, 1.0, dtype=torch.float16)}, "query_lengths", "float16"),
    ("write_window", {"start": lengths(1.0, 1.0, dtype=torch.float32)}, "start", "float32"),
    ("write_window", {"end": lengths(1.0, 1.0, dtype=torch.float32)}, "end", "float32"),
    # Mixed dtypes.
    ("score_blocks", {"bounds": like(B, HKV, 2, D, M, dtype=torch.float16)}, "query|bounds", "float16"),
    ("sparse_attention", {"keys": like(B, HKV, T_MAX, D, dtype=torch.float16)}, "keys|query", "float16"),
    ("sparse_attention", {"values": like(B, HKV, T_MAX, D, dtype=torch.float16)}, "values", "float16"),
    ("dense_attention", {"query": like(B, HQ, Q, D, dtype=torch.bfloat16)}, "keys|query", "bfloat16"),
    ("dense_attention", {"values": like(B, HKV, T_MAX, D, dtype=torch.float16)}, "values", "float16"),
    ("write_window", {"values": like(B, HKV, T_MAX, D, dtype=torch.float16)}, "values", "float16"),
    ("write_window", {"bounds": like(B, HKV, 2, D, M, dtype=torch.float16)}, "bounds", "float16"),
    ("write_window", {"new_keys": like(B, HKV, Q, D, dtype=torch.float16)}, "new_keys", "float16"),
    ("write_window", {"new_values": like(B, HKV, Q, D, dtype=torch.float16)}, "new_values", "float16"),
    # Devices: each argument in turn lives elsewhere.
    ("block_bounds", {"lengths": like(B, dtype=torch.int32, device="meta")}, "lengths|keys", "meta"),
    ("score_blocks", {"bounds": like(B, HKV, 2, D, M, device="meta")}, "bounds|query", "meta"),
    ("select_blocks", {"lengths": like(B, dtype=torch.int32, device="meta")}, "lengths|scores", "meta"),
    ("sparse_attention", {"keys": like(B, HKV, T_MAX, D, device="meta")}, "keys|query", "meta"),
    ("sparse_attention", {"indices": like(B, HKV, 1, dtype=torch.int32, device="meta")}, "indices", "meta"),
    ("sparse_attention", {"lengths": like(B, dtype=torch.int32, device="meta")}, "lengths", "meta"),
    ("dense_attention", {"values": like(B, HKV, T_MAX, D, device="meta")}, "values", "meta"),
    ("dense_attention", {"query_lengths": like(B, dtype=torch.int32, device="meta")}, "query_lengths", "meta"),
    ("write_window", {"bounds": like(B, HKV, 2, D, M, device="meta")}, "bounds", "meta"),
    ("write_window", {"end": like(B, dtype=torch.int32, device="meta")}, "end", "meta"),
    # Numbers of tokens.
    ("block_bounds", {"lengths": lengths(21, 0)}, "lengths", "21"),
    ("block_bounds", {"lengths": lengths(3, -1)}, "lengths", "-1"),
    ("score_blocks", {"lengths": lengths(0, M * BLOCK + 1)}, "lengths", "25"),
    ("score_blocks", {"lengths": lengths(-2, 3)}, "lengths", "-2"),
    ("select_blocks", {"lengths": lengths(0, M * BLOCK + 1)}, "lengths", "25"),
    ("select_blocks", {"lengths": lengths(-2, 3)}, "lengths", "-2"),
    ("sparse_attention", {"lengths": lengths(21, 0)}, "lengths", "21"),
    ("sparse_attention", {"lengths": lengths(-1, 0)}, "lengths", "-1"),
    ("sparse_attention", {"lengths": lengths(2**32, 0, dtype=torch.int64)}, "lengths", str(2**32)),
    ("dense_attention", {"lengths": lengths(0, 21)}, "lengths", "21"),
    ("dense_attention", {"lengths": lengths(0, -1)}, "lengths", "-1"),
    ("dense_attention", {"query_lengths": lengths(6, 0)}, "query_lengths", "6"),
    ("dense_attention", {"query_lengths": lengths(5, -3)}, "query_lengths", "-3"),
    ("write_window", {"start": lengths(-1, 20)}, "start", "-1"),
    ("write_window", {"end": lengths(3, 21)}, "end", "21"),
    ("write_window", {"start": lengths(2, 20), "end": lengths(8, 20)}, "start|end", "6"),  # one more than Q
    ("write_window", {"start": lengths(4, 20), "end": lengths(3, 20)}, "start|end", "-1"),
    # Block sizes.
    *[
        (operation, {"block_size": size}, "block_size", str(size))
        for operation in ("block_bounds", "score_blocks", "sparse_attention", "write_window")
        for size in (0, -8, 8.0, True)
    ],
    # Not tensors at all.
    ("block_bounds", {"keys": [[[[0.0]]]]}, "keys", "list"),
    ("block_bounds", {"lengths": [10, 0]}, "lengths", "list"),
    ("score_blocks", {"query": None}, "query", "None"),
    ("select_blocks", {"lengths": [10, 0]}, "lengths", "list"),
    ("sparse_attention", {"indices": [[[0]]]}, "indices", "list"),
    ("dense_attention", {"lengths": [10, 0], "query_lengths": None}, "lengths", "list"),
    ("write_window", {"end": 5}, "end", "int"),
]


def describe(case):
    """What the test is called."""

    def show(value):
        if not isinstance(value, torch.Tensor):
            return value
        if value.device.type != "meta" and value.numel() <= 3 and value.dtype == torch.int32:
            return value.tolist()
        return f"{value.dtype} {list(value.shape)} {value.device.type}"

    return f"{case[0]}-" + " ".join(f"{name}={show(value)}" for name, value in case[1].items())


@pytest.mark.parametrize(("operation", "change", "names", "shown"), REFUSED, ids=map(describe, REFUSED))
def test_what_the_reference_refuses_is_refused_by_name(operation, change, names, shown):
    refused(operation, arguments(operation) | change, names, shown)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_call_that_is_changed_is_valid(operation):
    """So it is the change that is refused, above and below."""
    OPERATIONS[operation](**arguments(operation))


# --------------------------------------------------------------------------------------------------------------
# What the kernels are not written for
# --------------------------------------------------------------------------------------------------------------

WITH_HEAD_DIM = [operation for operation in OPERATIONS if operation != "select_blocks"]
WITH_BLOCK_SIZE = [operation for operation in OPERATIONS if operation != "dense_attention"]
WITH_QUERY = ["score_blocks", "sparse_attention", "dense_attention"]


@pytest.mark.parametrize("operation", WITH_HEAD_DIM)
@pytest.mark.parametrize("head_dim", [0, 1, 8, 24, 48, 96, 512])
def test_other_head_dims_are_refused(operation, head_dim):
    assert head_dim not in HEAD_DIMS
    refused(
        operation, arguments(operation, head_dim=head_dim), r"keys|query|bounds|head dimension D", rf"\b{head_dim}\b"
    )


@pytest.mark.parametrize("operation", WITH_BLOCK_SIZE)
@pytest.mark.parametrize("block_size", [1, 4, 7, 12, 24, 256])
def test_other_block_sizes_are_refused(operation, block_size):
    assert block_size not in BLOCK_SIZES
    refused(operation, arguments(operation, block_size=block_size), "block_size|config", rf"\b{block_size}\b")


@pytest.mark.parametrize("operation", WITH_QUERY)
@pytest.mark.parametrize("group", [17, 32])
def test_larger_groups_are_refused(operation, group):
    refused(operation, arguments(operation, group=group), "query|query heads per KV head", rf"\b{group}\b")


@pytest.mark.parametrize("operation", WITH_HEAD_DIM)
def test_more_kv_heads_than_a_grid_has_places_are_refused(operation):
    """32,768 sequences of two KV heads are one too many; nothing so large is made for it."""
    call = {
        name: value[:1].expand(2**15, *value.shape[1:]) if isinstance(value, torch.Tensor) else value
        for name, value in arguments(operation).items()
    }
    refused(operation, call, "batch × KV heads", "65536")


@pytest.mark.parametrize("operation", WITH_HEAD_DIM)
def test_float64_is_refused(operation):
    refused(operation, arguments(operation, dtype=torch.float64), "keys|query|bounds", "float64")


@pytest.mark.parametrize("operation", WITH_HEAD_DIM)
def test_bfloat16_is_refused_where_it_would_be_computed_wrongly(operation):
    """Triton's interpreter computes with its bits as if they were whole numbers; a GPU takes it."""
    call = arguments(operation, dtype=torch.bfloat16)
    if DEVICE == "cpu":
        refused(operation, call, "keys|query|bounds", "bfloat16")
    else:
        OPERATIONS[operation](**call)


def spread(tensor):
    """The same shape with room between its numbers."""
    return torch.zeros(*tensor.shape, 2, dtype=tensor.dtype, device=tensor.device)[..., 0]


def swapped(tensor):
    """The same shape with the first two dimensions swapped in memory: as a cache [Hkv, B, ...] would be."""
    first, second, *rest = tensor.shape
    return torch.zeros(second, first, *rest, dtype=tensor.dtype, device=tensor.device).transpose(0, 1)


def cut(tensor):
    """The same shape as a part of longer rows: as the used part of a larger cache would be."""
    *shape, length = tensor.shape
    return torch.zeros(*shape, length + 16, dtype=tensor.dtype, device=tensor.device)[..., :length]


@pytest.mark.parametrize("layout", [spread, swapped, cut])
@pytest.mark.parametrize(
    ("operation", "argument"),
    [
        ("block_bounds", "keys"),
        ("score_blocks", "bounds"),
        ("select_blocks", "scores"),
        ("sparse_attention", "keys"),
        ("sparse_attention", "values"),
        ("dense_attention", "keys"),
        ("dense_attention", "values"),
        ("write_window", "keys"),
        ("write_window", "values"),
        ("write_window", "bounds"),
    ],
)
def test_what_is_not_contiguous_is_refused(operation, argument, layout):
    """A cache is never copied behind the caller's back, and kernels take no strides."""
    call = arguments(operation)
    moved = layout(call[argument])
    assert not moved.is_contiguous()
    refused(operation, call | {argument: moved}, argument, str(moved.stride()[0]))


@pytest.mark.parametrize("operation", ["sparse_attention", "dense_attention"])
@pytest.mark.parametrize("argument", ["keys", "values"])
def test_a_cache_at_an_odd_address_is_refused_or_read_right(operation, argument):
    """The bulk copy engine reads from multiples of 16 bytes."""
    call = {
        name: torch.ones_like(value) if name in FLOAT_ARGUMENTS else value
        for name, value in arguments(operation).items()
    }
    buffer = torch.ones(call[argument].numel() + 1, device=DEVICE)
    odd = buffer[1:].view(call[argument].shape)
    try:
        found = OPERATIONS[operation](**call | {argument: odd})
    except ValueError as refusal:
        assert re.match(rf"{argument}\b", str(refusal))  # noqa: PT017 - both are right
    else:
        assert torch.equal(found, OPERATIONS[operation](**call))


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("device", ["meta"] if DEVICE == "cpu" else ["meta", "cpu"])
def test_tensors_where_no_kernel_runs_are_refused(operation, device):
    call = arguments(operation)
    elsewhere = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in call.items()}
    refused(operation, elsewhere, "keys|query|bounds|scores", device)


COMPILED = """
import torch
from resa.fast import attention, blocks, cache
from resa.reference.config import ReSAConfig
query, keys, bounds, scores = (torch.zeros(shape) for shape in ((1, 2, 16), (1, 1, 8, 16), (1, 1, 2, 16, 1), (1, 1, 1)))
one, index = torch.tensor([1], dtype=torch.int32), torch.zeros(1, 1, 1, dtype=torch.int32)
for operation, *arguments in (
    (blocks.block_bounds, keys, one, 8),
    (blocks.score_blocks, query, bounds, one, 8),
    (blocks.select_blocks, scores, one, ReSAConfig(block_size=8)),
    (attention.sparse_attention, query, keys, keys, index, one, 8),
    (attention.dense_attention, query[:, :, None], keys, keys, one),
    (cache.write_window, keys, keys, bounds, keys, keys, 0 * one, one, 8),
):
    try:
        operation(*arguments)
    except ValueError as refusal:
        print(refusal)
    else:
        print(operation.__name__, "took it")
"""


def test_the_cpu_is_refused_where_kernels_are_compiled():
    """Never a silent fallback, on a machine without a GPU either."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert len(said) == len(OPERATIONS)
    for line, names in zip(said, ("keys", "query|bounds", "scores", "query|keys", "query|keys", "keys"), strict=True):
        assert re.match(rf"({names})\b.*\bcpu\b.*allowed.*cuda", line), line


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_refused_call_changes_nothing(operation):
    """The last check fails, and no argument was written to."""
    call = arguments(operation)
    before = {name: value.clone() for name, value in call.items() if isinstance(value, torch.Tensor)}
    last = {"write_window": "end", "dense_attention": "query_lengths"}.get(operation, "lengths")
    refused(operation, call | {last: call[last] + 100}, last, r"\d")
    assert all(torch.equal(call[name], value) for name, value in before.items())
