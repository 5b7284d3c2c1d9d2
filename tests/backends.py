"""The renderings of the operations that one suite runs over, and what each brings.

A test asks for the fixture `backend` and calls its public operations. `drawn` makes it a property test: a strategy may
be a function of the backend, which says what shapes it takes and how many examples it can afford. Triton runs
interpreted on a CPU, where a call costs about 0.2 s, or compiled with RESA_TEST_DEVICE=cuda.
"""

from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from importlib import import_module
from inspect import signature

import pytest
import torch
from hypothesis import example, given
from torch.utils._device import _device_constructors

from strategies import DEVICE, FAST_BLOCK_SIZES, FAST_DTYPES, FAST_HEAD_DIMS, IS_INTERPRETED, NAN, cases, examples

OPERATIONS = ("block_bounds", "score_blocks", "select_blocks", "sparse_attention", "dense_attention")
ALLOCATORS = ((torch, ("empty", "empty_like", "empty_strided")), (torch.Tensor, ("new_empty", "new_empty_strided")))


@dataclass(frozen=True)
class Backend:
    """One rendering: its operations, for tensors built on the CPU, and the inputs it is tried on."""

    name: str
    package: str
    device: str
    dtypes: tuple[torch.dtype, ...]
    law_dtype: torch.dtype  # in which laws are tested
    shapes: dict  # limits of `cases`
    law_shapes: dict  # fewer, because a law is about the mathematics and compiling a shape takes a second
    effort: float  # drawn examples for each that an interpreted kernel gets
    operations = OPERATIONS

    @property
    def wide(self):
        """Dtypes that scores may have."""
        return tuple(dtype for dtype in self.dtypes if dtype.itemsize > 2)

    @property
    def is_reference(self):
        return self.name == "reference"

    def __getattr__(self, name):
        """A public function of the package, for arguments and results on the CPU, in poisoned memory."""
        if name not in (*OPERATIONS, "compress_bounds"):
            raise AttributeError(name)

        def call(*arguments, **options):
            function = getattr(import_module(self.package), name)
            options = {key: moved(option, self.device) for key, option in options.items()}
            with poisoned_memory():
                result = function(*(moved(argument, self.device) for argument in arguments), **options)
            results = result if isinstance(result, tuple) else (result,)
            assert all(getattr(each, "codes", each).device.type == self.device for each in results)
            results = tuple(moved(each, "cpu") for each in results)
            return results if isinstance(result, tuple) else results[0]

        return call

    def write_window(self, keys, values, bounds, *rest):
        """Copies of keys, values and bounds after `write_window`, which works in place; only Triton has it."""
        stored = [moved(each, self.device, copy=True) for each in (keys, values, bounds)]
        import_module(f"{self.package}.cache").write_window(*stored, *(moved(each, self.device) for each in rest))
        return tuple(moved(each, "cpu") for each in stored)


def moved(value, device, **options):
    """A tensor, or the tensors of bounds in 8 bits, on another device; anything else as it is."""
    if hasattr(value, "codes"):
        return type(value)(value.codes.to(device, **options), value.scale.to(device, **options))
    return value.to(device, **options) if isinstance(value, torch.Tensor) else value


@contextmanager
def poisoned_memory():
    """While this context is open, memory that is handed out unwritten holds NaN, or a number that no index is."""

    def poisoned(allocate):
        def call(*arguments, **options):
            tensor = allocate(*arguments, **options)
            return tensor.fill_(NAN if tensor.is_floating_point() else 77 if tensor.element_size() == 1 else 0x5A5A5A5A)

        return call

    # `torch.device` as a context remembers, for good, which functions allocate: it must not remember these.
    _device_constructors()
    with pytest.MonkeyPatch.context() as patch:
        for owner, names in ALLOCATORS:
            for name in names:
                patch.setattr(owner, name, poisoned(getattr(owner, name)))
        yield


REFERENCE = Backend(
    name="reference",
    package="resa.reference",
    device="cpu",
    dtypes=(torch.float64, torch.float32, torch.bfloat16, torch.float16),
    law_dtype=torch.float64,
    shapes={"head_dims": (4, 2, 8, 16), "block_sizes": (4, 1, 2, 8, 16), "groups": (3, 1, 2, 4, 5, 8)},
    law_shapes={"head_dims": (4, 2, 8, 16), "block_sizes": (4, 1, 2, 8, 16), "groups": (3, 1, 2, 4, 5, 8)},
    effort=8,
)
TRITON = Backend(
    name="interpreted" if IS_INTERPRETED else "compiled",
    package="resa.fast",
    device=DEVICE,
    dtypes=FAST_DTYPES,
    law_dtype=torch.float32,
    shapes={"head_dims": FAST_HEAD_DIMS, "block_sizes": FAST_BLOCK_SIZES, "groups": (3, 1, 2, 5, 7, 8, 16)},
    law_shapes={"head_dims": (16,), "block_sizes": (8, 16), "groups": (3, 1, 5), "max_blocks": 5},
    effort=1 if IS_INTERPRETED else 2,
)
BACKENDS = (REFERENCE, TRITON)


def a_case(**limits):
    """Cases of all shapes that the backend takes."""
    return lambda backend: cases(**(backend.shapes | limits))


def a_law_case(**limits):
    """Cases of the few shapes on which the backend shows a law."""
    return lambda backend: cases(**(backend.law_shapes | limits))


def drawn(n_examples, *always, **strategies):
    """Make a test a property of drawn arguments: `n_examples` of them interpreted, `Backend.effort` times as many.

    `always` are dictionaries of arguments that are tried in any case.
    """

    def decorate(test):
        parameters = [each for name, each in signature(test).parameters.items() if name not in strategies]

        @wraps(test)
        def run(**fixtures):
            backend = next(each for each in fixtures.values() if isinstance(each, Backend))

            def holds(**arguments):
                test(**fixtures, **arguments)

            holds.__name__ = f"{test.__name__}_{backend.name}"
            drawn_from = {name: each(backend) if callable(each) else each for name, each in strategies.items()}
            prove = given(**drawn_from)(holds)
            for arguments in always:
                prove = example(**arguments)(prove)
            examples(n_examples, backend.effort)(prove)()

        run.__signature__ = signature(test).replace(parameters=parameters)
        return run

    return decorate
