"""Only Triton: the kernel for Hopper without a Hopper GPU. It must compile, and compute the same in threads."""

import os
import subprocess
import sys
from importlib import import_module

import pytest
import torch

from gluon_threads import interpreted
from judging import check_dense
from pools import Pool, in_pages
from strategies import DEVICE, Case
from tolerances import assert_same_bits

# The kernel for both head dimensions, as its launch compiles it → its instructions.
COMPILE = """
import subprocess, sys, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from resa.fast.gpu import hopper

for head_dim, page in ((64, 0), (128, 0), (128, 64)):
    piece = page or hopper.TOKENS.value
    tiles = f"tensordesc<fp16[{piece}, {64 if page else head_dim}],{hopper.TILE.value!r}>"
    types = {"query_ptr": "*fp16", "keys": tiles, "values": tiles, "table_ptr": "*i32", "lengths_ptr": "*i32",
             "query_lengths_ptr": "*i32", "out_ptr": "*fp16", "lse_ptr": "*fp32", "partial_ptr": "*fp32"}
    constants = {"G": 7, "D": head_dim, "PAGE": page, "PIECE": piece} | ({} if page else {"table_ptr": None})
    kernel = hopper._attend_kernel
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    divisible = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types.get(name, "")[:1] == "*"
                 and name not in constants}
    source = GluonASTSource(kernel, signature, {(names.index(n),): value for n, value in constants.items()}, divisible)
    options = {"num_warps": 4, "maxnreg": hopper.MEAN_REGISTERS}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        code = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout
    print(head_dim, code.count("HGMMA"), code.count("WARPGROUP.DEPBAR"), code.count("LDL"))
"""


def test_it_compiles_for_hopper():
    """Gluon is young and renames things. And where registers run out, products wait for one another, which is slow."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    # Six waits in each of two groups, however many instructions a product takes; no number in local memory.
    assert done.stdout.splitlines() == ["64 72 12 0", "128 96 12 0", "128 96 12 0"]


@pytest.fixture
def hopper(monkeypatch):
    """The kernel, interpreted by threads, in the place where a Hopper GPU would run it."""
    if DEVICE != "cpu":
        pytest.skip("the kernel itself runs in test_gpu.py")
    module = import_module("resa.fast.gpu.hopper")
    monkeypatch.setattr(module, "suits", lambda *_: True)
    monkeypatch.setattr(module, "attend", interpreted(module).attend)


@pytest.mark.parametrize(("splits", "lengths"), [(1, (900, 61)), (3, (128, 385)), (19, (3, 1024))])
@pytest.mark.parametrize(("group", "width", "used"), [(1, 50, (50, 7)), (7, 32, (32, 32)), (3, 90, (1, 0))])
def test_windows_in_threads(kernels, hopper, monkeypatch, group, width, used, splits, lengths):
    """Shares of no tile, of one, and of more than there are slots; rows past the window, and a window with none."""
    monkeypatch.setattr("resa.fast.attention.count_wave_splits", lambda *_: splits)
    if splits > 3 or group > 3:
        monkeypatch.setattr("resa.fast.attention.MERGED_ROWS", 32)  # fewer programs to interpret
    case = Case(group, 2, group, 16, 8, lengths=lengths, capacity=max(lengths) + 1)
    x = case.build(torch.float16, n_queries=width)
    check_dense(kernels, case, x, tuple(map(min, used, lengths)))


@pytest.mark.parametrize(("head_dim", "page_size"), [(128, 16), (64, 24), (128, 128)])
def test_windows_in_pages_in_threads(kernels, hopper, head_dim, page_size):
    """Bit for bit as in one cache; tiles in pieces of pages, some of them past the length, which no table names."""
    case, _ = in_pages(Case(5, 2, 3, head_dim, 8, lengths=(390, 61), capacity=391), page_size // 8)
    x, pool = case.build(torch.float16, n_queries=20), Pool(case, page_size)
    attend = import_module("resa.fast.attention").dense_attention
    expected = attend(*x.attention, x.lengths)
    keys, values = pool.filled(x.keys, x.values)
    assert_same_bits(attend(x.query, keys, values, x.lengths, table=pool.table), expected, f"{case} {page_size}")
