"""Arguments that break the contract are refused before work starts, with a `ValueError` that names one of them.

The shapes are written down here a second time, so that a message is known letter for letter. Both backends refuse the
contract's cases alike; the Triton path also refuses what its kernels are not written for.
"""

import os
import re
import subprocess
import sys
from importlib import import_module
from math import prod
from pathlib import Path

import pytest
import torch

from backends import OPERATIONS
from resa.reference import GPTConfig, ReSAConfig
from strategies import BLOCK_SIZES, DEVICE, HEAD_DIMS

# One valid call: two sequences, two KV heads of three query heads, 16 channels, 20 slots in blocks of eight.
SIZES = {"B": 2, "Hq": 6, "Hkv": 2, "D": 16, "T_max": 20, "M": 3, "Q": 5, "N": 1}
CACHED, NEW, BLOCK = "B Hkv T_max D", "B Hkv Q D", 8
LETTERS = {
    "block_bounds": {"keys": CACHED, "lengths": "B"},
    "score_blocks": {"query": "B Hq D", "bounds": "B Hkv 2 D M", "lengths": "B"},
    "select_blocks": {"scores": "B Hkv M", "lengths": "B"},
    "sparse_attention": {
        "query": "B Hq D", "keys": CACHED, "values": CACHED, "indices": "B Hkv N", "lengths": "B"
    },
    "dense_attention": {"query": "B Hq Q D", "keys": CACHED, "values": CACHED, "lengths": "B", "query_lengths": "B"},
    "write_window": {
        "keys": CACHED, "values": CACHED, "bounds": "B Hkv 2 D M", "new_keys": NEW, "new_values": NEW,
        "start": "B", "end": "B",
    },
}  # fmt: skip
FLOATS = ("query", "keys", "values", "bounds", "new_keys", "new_values")
INTEGERS = {"indices": (0, 0), "lengths": (20, 0), "query_lengths": (5, 0), "start": (3, 20), "end": (8, 20)}


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


def test_the_call_that_is_changed_is_valid(backend, operation):
    """So it is the change that is refused, in all tests below."""
    operation_of(backend, operation)(**arguments(operation, device=backend.device))


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


def test_a_refused_call_changes_nothing(backend, operation):
    """The last check fails, and no argument was written to."""
    call = arguments(operation, device=backend.device)
    before = {name: value.clone() for name, value in call.items() if isinstance(value, torch.Tensor)}
    last = list(before)[-1]
    assert refusal(backend, operation, call | {last: call[last] + 100}).startswith(f"{last}: got ")
    assert all(torch.equal(call[name], value) for name, value in before.items())


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"start": (-1, 20)}, "start: got -1 … 20; allowed: 0 … 20"),
        ({"end": (3, 21)}, "end: got 3 … 21; allowed: 0 … 20"),
        ({"start": (2, 20), "end": (8, 20)}, "end − start: got 0 … 6; allowed: 0 … 5"),
        ({"start": (4, 20), "end": (3, 20)}, "end − start: got -1 … 0; allowed: 0 … 5"),
        ({"bounds": 4}, "bounds: got 4 blocks; allowed: 3 for 20 tokens"),
        ({"bounds": 2}, "bounds: got 2 blocks; allowed: 3 for 20 tokens"),
    ],
    ids=str,
)
def test_windows_outside_of_the_cache(kernels, changes, expected):
    call = arguments("write_window", device=DEVICE)
    for name, given in changes.items():
        if name == "bounds":
            call[name] = torch.zeros(2, 2, 2, 16, given, device=DEVICE)
        else:
            call[name] = torch.tensor(given, dtype=torch.int32, device=DEVICE)
    assert refusal(kernels, "write_window", call) == expected


# --- Limits of the kernels ---

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


# --- Configurations ---

NAN, INF = float("nan"), float("inf")
GPT_SIZES = {
    "vocab_size": 11, "n_layer": 2, "n_head": 6, "n_kv_head": 2, "head_dim": 4, "hidden_size": 24,
    "intermediate_size": 32,
}  # fmt: skip


def refused_fields(make, field, values, allowed):
    """Each value of a field is refused with the message that shows it."""
    for value in values:
        shown = repr(value) if field == "schedule" else value
        with pytest.raises(ValueError, match=re.escape(f"{field}: got {shown}; allowed: {allowed}")):
            make(**{field: value})


def test_decoding_defaults_are_the_specifications():
    config = ReSAConfig()
    assert (config.block_size, config.active_ratio, config.min_blocks, config.local_blocks) == (16, 0.1, 16, 1)
    assert (config.interval, config.dense_layers, config.eight_bit_bounds) == (32, 0, False)
    assert config.schedule in ("paper", "fused")


DECODING = {  # field: values taken, values refused, allowed
    "block_size": ([1, 16], [0, -1, 16.0, True, None, "16"], "an integer ≥ 1"),
    "active_ratio": ([1, 1e-9], [0, 0.0, -0.1, 1.0000001, 2, NAN, INF, True, None, "0.1"], "0 < active_ratio ≤ 1"),
    "local_blocks": ([1, 3, 16], [0, -1, 1.0, True, None], "an integer ≥ 1"),
    "min_blocks": ([1, 30], [0, -1, 16.0, True, None], "an integer ≥ local_blocks = 1"),
    "interval": ([None, 1, 2], [0, -1, True, False, 32.0, INF, "32", "none"], "an integer ≥ 1, or None for never"),
    "schedule": (["paper", "fused"], ["Fused", "", "papers", None, 1], "'fused' or 'paper'"),
    "dense_layers": ([0, 3], [-1, 0.5, True, None], "an integer ≥ 0"),
    "eight_bit_bounds": ([True, False], [0, 1, None], "True or False"),
}
MODEL = {
    **{size: ([], [0, -1, 2.0, True, None], "an integer ≥ 1") for size in (*GPT_SIZES, "context")},
    "rope_theta": ([1, 1e6], [0, -1.0, NAN, INF, None, "1e4"], "a finite number > 0"),
    "norm_eps": ([1e-5], [0.0, -1e-6, NAN, INF, None], "a finite number > 0"),
    **{flag: ([True, False], [1, 0, None], "True or False") for flag in ("qkv_bias", "qk_norm", "tied_embeddings")},
    "rope_scaling": ([None], ["yarn", 2.0], "a RopeScaling or None"),
}


@pytest.mark.parametrize("field", DECODING)
def test_decoding_fields(field):
    taken, refused, allowed = DECODING[field]
    assert [getattr(ReSAConfig(**{field: value}), field) for value in taken] == taken
    refused_fields(ReSAConfig, field, refused, allowed)


@pytest.mark.parametrize("field", MODEL)
def test_model_fields(field):
    taken, refused, allowed = MODEL[field]
    assert [getattr(GPTConfig(**GPT_SIZES | {field: value}), field) for value in taken] == taken
    refused_fields(lambda **fields: GPTConfig(**GPT_SIZES | fields), field, refused, allowed)


def test_fields_that_depend_on_each_other():
    for fields in ({"min_blocks": 2, "local_blocks": 3}, {"local_blocks": 17}):
        most, least = fields.get("min_blocks", 16), fields["local_blocks"]
        message = f"min_blocks: got {most}; allowed: an integer ≥ local_blocks = {least}"
        with pytest.raises(ValueError, match=re.escape(message)):
            ReSAConfig(**fields)

    def make(**fields):
        return GPTConfig(**GPT_SIZES | fields)

    for fields in ({"n_kv_head": 6}, {"n_kv_head": 1}, {"n_head": 2}, {"hidden_size": 7}, {"head_dim": 128}):
        make(**fields)  # heads need not fill the hidden size
    refused_fields(make, "n_head", [5], "a multiple of n_kv_head = 2")
    refused_fields(make, "head_dim", [1, 3, 5], "an even number, because RoPE ")
    for n_kv_head in (4, 12):
        with pytest.raises(ValueError, match=f"n_head: got 6; allowed: a multiple of n_kv_head = {n_kv_head}"):
            make(n_kv_head=n_kv_head)


@pytest.mark.parametrize("config", [ReSAConfig(), GPTConfig(**GPT_SIZES)], ids=lambda config: type(config).__name__)
def test_configurations_cannot_be_changed_and_compare_by_value(config):
    """A field set later would escape the checks."""
    with pytest.raises(AttributeError):
        setattr(config, next(iter(vars(config))), 1)
    assert config == type(config)(**vars(config))
    assert hash(config) == hash(type(config)(**vars(config)))
