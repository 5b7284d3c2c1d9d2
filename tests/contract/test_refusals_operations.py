"""Arguments that break the contract are refused before work starts, with a `ValueError` that names one of them.

The shapes are written down here a second time, so that a message is known letter for letter. Both backends refuse the
contract's cases alike; the Triton path also refuses what its kernels are not written for.
"""

import os
import subprocess
import sys
from importlib import import_module
from math import prod
from pathlib import Path

import pytest
import torch

from backends import OPERATIONS
from resa import reference
from resa.reference import ReSAConfig
from strategies import BLOCK_SIZES, DEVICE, HEAD_DIMS

# One valid call: two sequences, two KV heads of three query heads, 16 channels, 20 slots in blocks of eight.
SIZES = {"B": 2, "Hq": 6, "Hkv": 2, "D": 16, "T_max": 20, "M": 3, "Q": 5, "N": 1}
CACHED, BLOCK = "B Hkv T_max D", 8
LETTERS = {
    "block_bounds": {"keys": CACHED, "lengths": "B"},
    "score_blocks": {"query": "B Hq D", "bounds": "B Hkv 2 D M", "lengths": "B"},
    "select_blocks": {"scores": "B Hkv M", "lengths": "B"},
    "sparse_attention": {
        "query": "B Hq D", "keys": CACHED, "values": CACHED, "indices": "B Hkv N", "lengths": "B"
    },
    "dense_attention": {"query": "B Hq Q D", "keys": CACHED, "values": CACHED, "lengths": "B", "query_lengths": "B"},
}  # fmt: skip
FLOATS = ("query", "keys", "values", "bounds")
INTEGERS = {"indices": (0, 0), "lengths": (20, 0), "query_lengths": (5, 0)}


def operation_of(backend, name):
    return getattr(import_module(backend.package), name)


def shape_of(letters, sizes):
    return [int(letter) if letter.isdigit() else sizes[letter] for letter in letters.split()]


def arguments(operation, *, device, block_size=BLOCK, dtype=torch.float32, **sizes):
    """A valid call of `operation`, by argument name."""
    sizes = SIZES | {"M": -(-SIZES["T_max"] // block_size)} | sizes
    call = {}
    for name, letters in LETTERS[operation].items():
        kind = torch.int32 if name in INTEGERS else torch.float32 if name == "scores" else dtype
        call[name] = torch.zeros(shape_of(letters, sizes), dtype=kind, device=device)
        if letters == "B":
            call[name] = torch.tensor(INTEGERS[name], dtype=kind, device=device)
    if operation == "select_blocks":
        return call | {"config": ReSAConfig(block_size=block_size)}
    return call if operation == "dense_attention" else call | {"block_size": block_size}


def refusal(backend, operation, call):
    """The message with which an operation refuses a call."""
    with pytest.raises(ValueError) as refused:  # noqa: PT011 - the caller compares the whole message
        operation_of(backend, operation)(**call)
    return str(refused.value)


def mismatch(operation, call):
    """The message about the first tensor, in the order of arguments, whose shape does not fit those before it."""
    sizes = {}
    for name, letters in LETTERS[operation].items():
        shape = list(call[name].shape)
        for letter, size in zip(letters.split(), shape, strict=True):
            expected = int(letter) if letter.isdigit() else sizes.setdefault(letter, size)
            if size != expected:
                return f"{name}: got shape {shape}; allowed: [{letters}] with {letter} = {expected}"
    if sizes.get("Hq", 6) % sizes["Hkv"]:
        return f"query: got {sizes['Hq']} heads; allowed: a positive multiple of the {sizes['Hkv']} KV heads"
    return None


def test_shapes(backend, operation):
    """Another rank, and each dimension in turn one longer, unless nothing else has that dimension."""
    call = arguments(operation, device=backend.device)
    for argument, letters in LETTERS[operation].items():
        shape, rank = list(call[argument].shape), len(letters.split())
        for other in (shape[1:], [1, *shape]):
            found = refusal(backend, operation, call | {argument: call[argument].new_zeros(other)})
            assert found == f"{argument}: got shape {other}; allowed: {rank} dimensions [{letters}]"
        for axis in range(rank):
            longer = [size + (place == axis) for place, size in enumerate(shape)]
            changed = call | {argument: call[argument].new_zeros(longer)}
            expected = mismatch(operation, changed)
            if expected is not None:
                assert refusal(backend, operation, changed) == expected


def test_query_heads_that_the_kv_heads_do_not_divide(backend):
    for operation in ("score_blocks", "sparse_attention", "dense_attention"):
        for heads in (0, 1, 5):
            found = refusal(backend, operation, arguments(operation, device=backend.device, Hq=heads))
            assert found == f"query: got {heads} heads; allowed: a positive multiple of the 2 KV heads"


def test_values_that_are_no_tensors(backend, operation):
    call = arguments(operation, device=backend.device)
    for argument, letters in LETTERS[operation].items():
        for value in ([[[[0.0]]]], 5) if argument == "query_lengths" else ([[[[0.0]]]], 5, None):
            found = refusal(backend, operation, call | {argument: value})
            assert found == f"{argument}: got {type(value).__name__}; allowed: a tensor [{letters}]"


def test_dtypes(backend, operation):
    """Which of two dtypes sums should be taken in is the caller's decision, so they must not be mixed."""
    call = arguments(operation, device=backend.device)
    floats = [name for name in call if name in FLOATS]
    for argument in LETTERS[operation]:
        allowed, wrong = "float16, bfloat16, float32", (torch.int32, torch.bool, torch.complex64)
        if argument in INTEGERS:
            allowed, wrong = "int32, int64", (torch.float32, torch.float64, torch.bool, torch.int16)
        elif argument == "scores":
            allowed, wrong = "float32", (torch.float16, torch.bfloat16, torch.int64)
        for dtype in wrong:
            found = refusal(backend, operation, call | {argument: call[argument].to(dtype)})
            # The kernels' own message leaves float64 out.
            assert found.removesuffix(", float64") == f"{argument}: got {dtype}; allowed: {allowed}"
        if argument in floats[1:]:
            found = refusal(backend, operation, call | {argument: call[argument].half()})
            assert found == f"{argument}: got torch.float16; allowed: torch.float32, as the arguments before it"
    if len(floats) > 1:
        found = refusal(backend, operation, call | {floats[0]: call[floats[0]].half()})
        assert found == f"{floats[1]}: got torch.float32; allowed: torch.float16, as the arguments before it"


def test_devices(backend, operation):
    """Each argument in turn lives elsewhere."""
    call, names = arguments(operation, device=backend.device), list(LETTERS[operation])
    for argument in names:
        here = str(call[argument].device)
        found = refusal(backend, operation, call | {argument: call[argument].to("meta")})
        named, given, others = (names[1], here, "meta") if argument == names[0] else (argument, "meta", here)
        assert found == f"{named}: got device {given}; allowed: {others}, as the arguments before it"


def test_numbers_of_tokens(backend):
    """At most those that fit the cache, the blocks or the window."""
    pairs = [(operation, name) for operation in OPERATIONS for name in LETTERS[operation] if "lengths" in name]
    for operation, argument in pairs:
        most = 5 if argument == "query_lengths" else 24 if operation in ("score_blocks", "select_blocks") else 20
        call = arguments(operation, device=backend.device)
        for low, high in ((0, most + 1), (-1, 3), (-3, -1), (0, 2**32)):
            given = torch.tensor([high, low], dtype=torch.int64, device=backend.device)
            found = refusal(backend, operation, call | {argument: given})
            assert found == f"{argument}: got {low} … {high}; allowed: 0 … {most}"
        for dtype in (torch.int32, torch.int64):  # the specification says int32; PyTorch makes int64 of plain numbers
            given = torch.tensor([most, 0], dtype=dtype, device=backend.device)
            operation_of(backend, operation)(**call | {argument: given})


@pytest.mark.parametrize("block_size", [0, -8, 8.0, True, None])
def test_block_sizes(backend, operation, block_size):
    call = arguments(operation, device=backend.device)
    if "block_size" in call:
        found = refusal(backend, operation, call | {"block_size": block_size})
        assert found == f"block_size: got {block_size}; allowed: an integer ≥ 1"


# Sketches.

SKETCH = {
    "query": (torch.float32, [2, 6, 16]), "codes": (torch.uint8, [2, 2, 20, 4]), "scales": (torch.float32, [2, 2, 20]),
    "lengths": (torch.int32, [2]),
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codes": torch.zeros(2, 2, 20, 4)}, "codes: got torch.float32; allowed: uint8"),
        ({"codes": torch.zeros(2, 2, 20, 3, dtype=torch.uint8)},
         "codes: got 3 bytes a key; allowed: 1 or 2 bits per channel"),
        ({"scales": torch.zeros(2, 2, 19)},
         "scales: got shape [2, 2, 19]; allowed: [B Hkv T_max] with T_max = 20"),
        ({"scales": torch.zeros(2, 2, 20).double()},
         "scales: got torch.float64; allowed: torch.float32, as the arguments before it"),
        ({"query": torch.zeros(2, 5, 16)}, "query: got 5 heads; allowed: a positive multiple of the 2 KV heads"),
        ({"lengths": torch.tensor([21, 0])}, "lengths: got 0 … 21; allowed: 0 … 20"),
        ({"block_size": 0}, "block_size: got 0; allowed: an integer ≥ 1"),
    ],
)  # fmt: skip
def test_a_sketch_that_cannot_be_scored(changes, message):
    call = {name: torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in SKETCH.items()} | {"block_size": BLOCK}
    reference.score_sketch(**call)
    with pytest.raises(ValueError) as refused:  # noqa: PT011 - the whole message is compared
        reference.score_sketch(**call | changes)
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("head_dim", "bits", "message"),
    [
        *((8, bits, f"bits: got {bits!r}; allowed: 1 or 2") for bits in (0, 3, 4, True, None, 2.0)),
        (4, 1, "head_dim: got 4; allowed: a multiple of 8: codes of 1 bits per channel fill whole bytes"),
        (6, 2, "head_dim: got 6; allowed: a multiple of 4: codes of 2 bits per channel fill whole bytes"),
    ],
)
def test_keys_that_cannot_be_sketched(head_dim, bits, message):
    with pytest.raises(ValueError) as refused:  # noqa: PT011 - the whole message is compared
        reference.sketch_keys(torch.zeros(1, 1, 3, head_dim), bits)
    assert str(refused.value) == message


# Limits of the kernels.

DIMS, BLOCKS = ", ".join(map(str, HEAD_DIMS)), ", ".join(map(str, BLOCK_SIZES))


@pytest.mark.parametrize(
    ("letter", "size", "message"),
    [
        *(("D", size, f"head dimension D: got {size}; allowed: {DIMS}") for size in (0, 1, 8, 24, 48, 96, 512)),
        *(("b", size, f"block_size: got {size}; allowed: {BLOCKS}") for size in (1, 4, 7, 12, 24, 256)),
        *(("Hq", 2 * size, f"query heads per KV head: got {size}; allowed: 1 … 16") for size in (17, 32)),
    ],
)
def test_sizes_without_a_kernel(kernels, letter, size, message):
    for operation, letters in LETTERS.items():
        if letter in " ".join(letters.values()).split() or (letter == "b" and operation != "dense_attention"):
            changed = {"block_size": size} if letter == "b" else {letter: size}
            assert refusal(kernels, operation, arguments(operation, device=DEVICE, **changed)) == message


@pytest.mark.parametrize("operation", [operation for operation in LETTERS if operation != "select_blocks"])
def test_more_kv_heads_than_a_grid_has_places(kernels, operation):
    """32,768 sequences of two KV heads are one too many; nothing so large is made for it."""
    call = {
        name: value[:1].expand(2**15, *value.shape[1:]) if isinstance(value, torch.Tensor) else value
        for name, value in arguments(operation, device=DEVICE).items()
    }
    assert refusal(kernels, operation, call) == "batch × KV heads: got 65536; allowed: at most 65535"


@pytest.mark.parametrize("operation", LETTERS)
def test_dtypes_without_a_kernel(kernels, operation):
    """Float64; and bfloat16 where it is interpreted, as if its bits were whole numbers."""
    call = arguments(operation, device=DEVICE, dtype=torch.float64)
    if operation == "select_blocks":
        found = refusal(kernels, operation, call | {"scores": call["scores"].double()})
        assert found == "scores: got torch.float64; allowed: float32"
        return
    first = next(name for name in LETTERS[operation] if name in FLOATS)
    assert refusal(kernels, operation, call) == f"{first}: got torch.float64; allowed: float16, bfloat16, float32"
    call = arguments(operation, device=DEVICE, dtype=torch.bfloat16)
    if DEVICE == "cuda":
        operation_of(kernels, operation)(**call)
    else:
        allowed = "float16 or float32 while TRITON_INTERPRET=1"
        assert refusal(kernels, operation, call) == f"{first}: got torch.bfloat16; allowed: {allowed}"


def spread(tensor):
    """Equal shape, with room between its numbers."""
    return tensor.new_zeros(*tensor.shape, 2)[..., 0]


def swapped(tensor):
    """Equal shape, the first two dimensions swapped in memory: a cache [Hkv, B, ...]."""
    first, second, *rest = tensor.shape
    return tensor.new_zeros(second, first, *rest).transpose(0, 1)


def cut(tensor):
    """Equal shape, as a part of longer rows: the used part of a larger cache."""
    *shape, length = tensor.shape
    return tensor.new_zeros(*shape, length + 16)[..., :length]


STORED = [(each, name) for each in LETTERS for name in LETTERS[each] if name in ("keys", "values", "bounds", "scores")]


@pytest.mark.parametrize("layout", [spread, swapped, cut])
@pytest.mark.parametrize(("operation", "argument"), STORED)
def test_tensors_that_are_not_contiguous(kernels, operation, argument, layout):
    """A cache is never copied behind the caller's back, and kernels take no strides."""
    call = arguments(operation, device=DEVICE)
    moved = layout(call[argument])
    assert not moved.is_contiguous()
    found = refusal(kernels, operation, call | {argument: moved})
    assert found == f"{argument}: got strides {tuple(moved.stride())}; allowed: a contiguous tensor"


@pytest.mark.parametrize("operation", ["sparse_attention", "dense_attention"])
@pytest.mark.parametrize("argument", ["keys", "values"])
def test_a_cache_at_an_odd_address_is_refused_or_read_right(kernels, operation, argument):
    """The bulk copy engine reads from multiples of 16 bytes."""
    call = arguments(operation, device=DEVICE)
    call |= {name: torch.ones_like(call[name]) for name in ("query", "keys", "values")}
    buffer = torch.ones(prod(call[argument].shape) + 1, device=DEVICE)
    odd = call | {argument: buffer[1:].view(call[argument].shape)}
    if operation == "dense_attention":
        found = refusal(kernels, operation, odd)
        assert found == f"{argument}: got address {buffer.data_ptr() + 4:#x}; allowed: one divisible by 16"
    else:
        run = operation_of(kernels, operation)
        assert torch.equal(run(**odd), run(**call))


@pytest.mark.parametrize("operation", LETTERS)
@pytest.mark.parametrize("device", ["meta"] if DEVICE == "cpu" else ["meta", "cpu"])
def test_tensors_where_no_kernel_runs(kernels, operation, device):
    where = "cpu, while TRITON_INTERPRET=1" if DEVICE == "cpu" else "cuda (the Triton path never falls back to the CPU)"
    first = next(iter(LETTERS[operation]))
    found = refusal(kernels, operation, arguments(operation, device=device))
    assert found == f"{first}: got device {device}; allowed: {where}"


COMPILED = """
import sys
sys.path[:0] = sys.argv[1:]
from backends import TRITON
from test_refusals_operations import LETTERS, arguments, refusal
for operation in LETTERS:
    print(refusal(TRITON, operation, arguments(operation, device="cpu")))
"""


def test_the_cpu_is_refused_where_kernels_are_compiled(kernels):
    """Never a silent fallback, on a machine without a GPU either."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    here = Path(__file__).parent
    command = [sys.executable, "-c", COMPILED, str(here), str(here.parent)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    allowed = "cuda (the Triton path never falls back to the CPU)"
    expected = [f"{next(iter(letters))}: got device cpu; allowed: {allowed}" for letters in LETTERS.values()]
    assert done.stdout.splitlines() == expected
