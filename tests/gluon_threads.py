"""An interpreter for the kernel for Hopper: NumPy for its numbers, a Python thread for each of its groups of warps.

Triton interprets no Gluon, and the kernel's mistakes are of a kind that needs running: a barrier that nobody arrives
at, a slot that is loaded while somebody reads it. So a copy takes a thread of its own and any time, a product is taken
twice, when it is issued and when it is waited for, and threads sleep now and then. A wait of seconds is a deadlock.
"""

import random
import threading
import time
from types import FunctionType, SimpleNamespace

import numpy as np
import torch
from triton.experimental.gluon import language as gl

PATIENCE = 5.0  # seconds at a barrier
NUMPY = {torch.float16: np.float16, torch.float32: np.float32, torch.int32: np.int32}


class Array(np.ndarray):
    """A tensor in registers."""

    type = SimpleNamespace(layout=None)

    def to(self, dtype):
        with np.errstate(over="ignore"):
            return array(self.astype(dtype))


def array(value):
    return np.asarray(value).view(Array)


class Integer(int):
    """A constant, in a kernel and outside of one."""

    value = property(int)


class Pointer:
    """Elements of a tensor in global memory."""

    def __init__(self, flat, offsets=0):
        self.flat, self.offsets = flat, array(offsets)
        self.dtype = SimpleNamespace(element_ty=flat.dtype)

    def __add__(self, offsets):
        return Pointer(self.flat, self.offsets + offsets)

    def masked(self, mask):
        """The offsets that may be touched, as (where, offsets); outside of the tensor there must be none."""
        offsets, where = np.broadcast_arrays(self.offsets, True if mask is None else mask)
        offsets = offsets[where]
        assert ((offsets >= 0) & (offsets < len(self.flat))).all(), "out of bounds"
        return where, offsets


def load(pointer, mask=None, other=0.0):
    where, offsets = pointer.masked(mask)
    found = np.full(where.shape, other, pointer.flat.dtype)
    found[where] = pointer.flat[offsets]
    return array(found)


def store(pointer, value, mask=None):
    where, offsets = pointer.masked(mask)
    pointer.flat[offsets] = np.broadcast_to(value, where.shape)[where]


class Shared:
    """Tiles in shared memory, NaN at first."""

    def __init__(self, dtype, shape):
        self.tile = np.full(shape, np.nan, dtype)

    def _reinterpret(self, dtype, shape, layout):
        """Tiles [n, TOKENS, D] in the memory of pieces [n · D/W · TOKENS/P, P, W].

        The memory holds W channels of all of a tile's tokens before the next W.
        """
        (n, tokens, head_dim), (_, piece, width) = shape, self.tile.shape
        panels = self.tile.reshape(n, head_dim // width, tokens // piece, piece, width)
        view = np.moveaxis(panels, 1, 3)  # [n, TOKENS/P, P, D/W, W]
        return Panels(view, (tokens, head_dim))

    def index(self, i):
        return self.of(self.tile[int(i)])

    def permute(self, order):
        return self.of(self.tile.transpose(order))

    @classmethod
    def of(cls, tile):
        view = cls.__new__(cls)
        view.tile = tile
        return view

    def load(self, layout):
        return array(self.tile.copy())

    def store(self, value):
        self.tile[...] = value


class Panels(Shared):
    """Tiles over pieces of shared memory: a view [TOKENS/P, P, D/W, W], which NumPy cannot reshape without a copy."""

    def __init__(self, view, shape):
        self.view, self.shape = view, shape

    def index(self, i):
        return Panels(self.view[int(i)], self.shape)

    def permute(self, order):
        return Transposed(self)

    @property
    def tile(self):
        return self.view.reshape(self.shape)  # a copy

    def load(self, layout):
        return array(self.tile.copy())

    def store(self, value):
        self.view[...] = np.asarray(value).reshape(self.view.shape)


class Transposed(Shared):
    """A tile read in the other order."""

    def __init__(self, panels):
        self.panels = panels

    @property
    def tile(self):
        return self.panels.tile.T


class Barrier:
    """A phase ends when `count` arrivals have come and all bytes expected."""

    def __init__(self):
        self.changed, self.phase, self.missing_bytes = threading.Condition(), 0, 0

    def init(self, count):
        self.count = self.missing = count

    def take(self, arrivals, n_bytes):
        pause()
        with self.changed:
            self.missing -= arrivals
            self.missing_bytes += n_bytes
            assert self.missing >= 0, "more arrivals than the barrier counts"
            if self.missing == 0 and self.missing_bytes == 0:
                self.phase, self.missing = self.phase + 1, self.count
                self.changed.notify_all()

    def wait(self, bit):
        pause()
        with self.changed:
            passed = self.changed.wait_for(lambda: self.phase & 1 != int(bit), PATIENCE)
        assert passed, "deadlock"


def allocate(dtype, shape, layout):
    barriers = [Barrier() for _ in range(shape[0])]
    return SimpleNamespace(index=lambda i: barriers[int(i)]) if dtype is np.int64 else Shared(dtype, shape)


MBARRIER = SimpleNamespace(
    MBarrierLayout=lambda: None,
    init=lambda barrier, count: barrier.init(count),
    arrive=lambda barrier, count: barrier.take(count, 0),
    expect=lambda barrier, n_bytes: barrier.take(1, n_bytes),
    wait=lambda barrier, bit: barrier.wait(bit),
)


def pause(longest=2e-4):
    if random.random() < 0.2:
        time.sleep(random.random() * longest)


def copy_tile(rows, place, barrier, target):
    """Pieces may reach past the end of the table, which gives zeros, but not in front of it."""
    (first, channel), (tokens, width) = map(int, place), target.tile.shape
    assert 0 <= first < len(rows.table)

    def copy():
        found = rows.table[first : first + tokens, channel : channel + width]
        target.tile[...] = 0
        time.sleep(random.choice((0, 0, 0, 1e-2)))  # later copies overtake some
        target.tile[: len(found)] = found
        barrier.take(0, -rows.block_type.nbytes)

    threading.Thread(target=copy, daemon=True).start()


def multiply(left, right, acc, use_acc=True, is_async=False):
    def product():
        sides = (side.tile if isinstance(side, Shared) else side for side in (left, right))
        first, second = (np.asarray(side, np.float32) for side in sides)
        return array(first @ second + (acc if use_acc else np.float32(0)))

    if not is_async:
        return product()
    issued = product()

    def waited_for():
        assert np.array_equal(issued, product(), equal_nan=True), "a tile changed while it was read"
        return issued

    return waited_for


def wait_for_products(outstanding, deps):
    pause(2e-3)
    done = tuple(dep() if callable(dep) else dep for dep in deps)
    return done if len(done) > 1 else done[0]


class Kernel:
    """`kernel[grid](…)`: one program after another."""

    def __init__(self, space, function):
        self.space, self.function = space, function

    def __getitem__(self, grid):
        def run(*arguments, num_warps, maxnreg):
            tensors = [
                Pointer(each.numpy().reshape(-1)) if isinstance(each, torch.Tensor) else each for each in arguments
            ]
            fake = self.space["gl"]
            fake.num_programs = lambda axis: grid[axis]
            for place in np.ndindex(*grid):
                fake.program_id = lambda axis, place=place: array(np.int32(place[axis]))
                with np.errstate(all="ignore"):
                    self.function(*tensors)

        return run


def run_partitions(partitions, warps, registers):
    errors = []

    def run(function, arguments):
        try:
            with np.errstate(all="ignore"):
                function(*arguments)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=partition, daemon=True) for partition in partitions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def interpreted(module):
    """The namespace of a module of Gluon kernels, with kernels that run here."""
    nothing = dict.fromkeys(("SliceLayout", "NVMMADistributedLayout", "DotOperandLayout", "BlockedLayout"))
    fake = SimpleNamespace(
        **{name: lambda *_: None for name in nothing},
        constexpr=lambda value: value, float32=np.float32, int32=np.int32, int64=np.int64,
        static_range=range, cdiv=lambda a, b: array(-(-a // b)),
        arange=lambda first, last, layout: array(np.arange(first, last)),
        full=lambda shape, value, dtype, layout: array(np.full(shape, value, dtype)),
        zeros=lambda shape, dtype, layout: array(np.zeros(shape, dtype)),
        where=lambda condition, a, b: array(np.where(condition, a, b)),
        maximum=np.fmax, minimum=np.minimum, max=lambda x, axis: array(np.fmax.reduce(x, axis)),
        sum=lambda x, axis: array(x.sum(axis)), exp2=np.exp2, log=np.log,
        convert_layout=lambda value, layout: value, load=load, store=store, warp_specialize=run_partitions,
        allocate_shared_memory=allocate,
    )  # fmt: skip
    space = {
        **vars(module), "gl": fake, "mbarrier": MBARRIER, "fence_async_shared": lambda: None, "copy_tile": copy_tile,
        "warpgroup_mma": multiply, "warpgroup_mma_wait": wait_for_products,
    }  # fmt: skip
    for name, value in vars(module).items():
        if isinstance(value, gl.constexpr):
            is_integer = isinstance(value.value, int)
            space[name] = Integer(value.value) if is_integer else value.value
        elif hasattr(value, "fn") and hasattr(value, "arg_names"):  # a Gluon function
            plain = FunctionType(value.fn.__code__, space, name)
            space[name] = Kernel(space, plain) if name.endswith("_kernel") else plain
        elif isinstance(value, FunctionType) and value.__module__ == module.__name__:
            space[name] = FunctionType(value.__code__, space, name)

    def pieces_of(cache, n_rows):
        rows = cache.numpy().reshape(-1, cache.shape[3])
        width = rows.shape[1] if n_rows == space["TOKENS"] else int(space["WIDTH"])
        block = SimpleNamespace(nbytes=n_rows * width * rows.itemsize, shape=(n_rows, width))
        return SimpleNamespace(table=rows, block_type=block)

    space["pieces_of"] = pieces_of
    return SimpleNamespace(**space)
