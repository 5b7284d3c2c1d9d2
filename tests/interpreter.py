"""Triton's interpreter as the tests want it: as strict as a GPU, and three to four times as fast.

`harden` and `quicken` change Triton's own classes. `quicken` knows those of 3.7, the version that constraints.txt pins.
Run as a program, this file prints `digest()` without it.
"""

import hashlib
import os

import numpy as np
import torch

IS_QUICK = False  # whether `quicken` has done its work


def harden():
    """Forgive as little as a GPU.

    The interpreter would give zeros for masked loads without `other`; here they give garbage. And its `minimum` and
    `maximum` would propagate NaN unasked, where a GPU's drop it.
    """
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, _get_np_dtype

    plain = InterpreterBuilder.create_masked_load

    def create_masked_load(self, pointers, mask, other, *rest, **options):
        if other is None:
            dtype = pointers.get_element_ty()
            kind = _get_np_dtype(dtype)
            garbage = np.full_like(pointers.data, np.nan if kind.kind == "f" else True, dtype=kind)
            if kind.kind in "iu":  # now a number that no index is, now one that any could be
                garbage.flat[::2] = np.iinfo(kind).max // 3
                garbage.flat[1::2] = 0
            other = TensorHandle(garbage, dtype)
        return plain(self, pointers, mask, other, *rest, **options)

    InterpreterBuilder.create_masked_load = create_masked_load
    InterpreterBuilder.create_minnumf = lambda self, left, right: self.binary_op(left, right, np.fmin)
    InterpreterBuilder.create_maxnumf = lambda self, left, right: self.binary_op(left, right, np.fmax)


def quicken():
    """Spare the interpreter what it computes anew for every operation, and what it throws away.

    No bit changes. One check is left out, that no result is wider than its type; the nightly profile keeps it.
    """
    from triton import __version__
    from triton import language as tl
    from triton.language import core, semantic
    from triton.runtime import interpreter

    if not __version__.startswith("3.7."):
        return

    # It patches its language at every call of a device function, and searches the modules each time. Patch once per
    # launch and module, and remember what the search found.
    launch, patch, patched, patches = interpreter.GridExecutor.__call__, interpreter._patch_lang, set(), {}

    def launch_anew(self, *arguments, **options):
        patched.clear()
        try:
            launch(self, *arguments, **options)
        finally:
            patched.clear()

    def patch_once(function):
        languages = frozenset(id(each) for each in function.__globals__.values() if each is tl or each is core)
        if languages in patched:
            return None
        key = languages, frozenset(patched)  # what is patched already, the search does not find
        patched.add(languages)
        if key not in patches:
            scope = patch(function)
            patches[key] = [(place, name, getattr(place, name)) for place, name, _ in scope._changes]
            return scope
        scope = interpreter._LangPatchScope()
        for place, name, value in patches[key]:
            scope.set_attr(place, name, value)
        return scope

    interpreter.GridExecutor.__call__, interpreter._patch_lang = launch_anew, patch_once

    # Checks for overflow of integers, which it computes and asserts in its debug mode alone.
    assert not interpreter.interpreter_builder.options.debug
    semantic.TritonSemantic.binary_op_sanitize_overflow_impl = lambda *_: None

    # NumPy's types, by name.
    find_type, types = interpreter._get_np_dtype, {}

    def remembered_type(dtype):
        name = dtype.scalar.name
        if name not in types:
            types[name] = find_type(dtype)
        return types[name]

    interpreter._get_np_dtype = remembered_type

    # Types of tiles, by element and shape. Equal ones share their shape, so that tensors find theirs by its identity.
    make_type, make_tensor, equal = core.block_type.__init__, core.tensor.__init__, core.tuple.__eq__
    blocks, shapes, scalar, yes = {}, {}, core.tuple([]), core.constexpr(True)

    def init_type(self, element, shape):
        key = element.name, *(shape.values if isinstance(shape, core.tuple) else shape)
        if key not in blocks:
            make_type(self, element, shape)
            plain = element.name, *self.shape.values
            blocks[key] = blocks.setdefault(plain, (self.shape, self.numel, self.name))
        self.element_ty, (self.shape, self.numel, self.name) = element, blocks[key]

    def init_tensor(self, handle, type):
        shape = type.shape if type.is_block() else scalar
        if id(shape) not in shapes:
            make_tensor(self, handle, type)
            shapes[id(shape)] = shape, self.shape, self.numel  # the first keeps its identity from another
        self.handle, self.type, self.dtype = handle, type, type.scalar
        _, self.shape, self.numel = shapes[id(shape)]

    core.block_type.__init__, core.tensor.__init__ = init_type, init_tensor
    core.tuple.__eq__ = lambda self, other: yes if self is other else equal(self, other)

    # The common shape of two tiles.
    broadcast, common = semantic.TritonSemantic.broadcast_impl_value, {}

    def splat(self, number, tile):
        data = np.full(tile.handle.data.shape, number.handle.data, remembered_type(number.handle.dtype))
        handle = interpreter.TensorHandle(data, number.handle.dtype.scalar)
        return self.tensor(handle, core.block_type(number.type.scalar, tile.type.shape))

    def broadcast_known(self, left, right):
        one, other = left.type, right.type
        if not one.is_block():
            return (splat(self, left, right), right) if other.is_block() else (left, right)
        if not other.is_block():
            return left, splat(self, right, left)
        if one.shape is other.shape:
            return left, right
        key = id(one.shape), id(other.shape)
        if key not in common:
            left, right = broadcast(self, left, right)
            if len(one.shape) == len(other.shape):
                common[key] = left.type.shape
            return left, right
        shape = common[key]

        def widened(tile):
            if tile.type.shape is shape:
                return tile
            handle = self.builder.create_broadcast(tile.handle, shape.values)
            return self.tensor(handle, core.block_type(tile.type.scalar, shape))

        return widened(left), widened(right)

    semantic.TritonSemantic.broadcast_impl_value = broadcast_known

    # A call of the language passes two wrappers. Call the function itself.
    checked = core.add.__code__

    def patch_member(place, name, member, builder, scope):
        function = member.__wrapped__ if getattr(member, "__code__", None) is checked else member

        def call(*arguments, **options):
            options["_semantic"] = interpreter.interpreter_semantic
            return function(*arguments, **options)

        scope.set_attr(place, name, call)

    interpreter._patch_attr = patch_member

    # Constants. Values of these types are none.
    unwrap, plain = core._unwrap_if_constexpr, (core.tensor, int, float, bool, type(None), str)

    def unwrap_soon(value):
        kind = type(value)
        return value.value if kind is core.constexpr else value if kind in plain else unwrap(value)

    core._unwrap_if_constexpr = unwrap_soon

    interpreter.TensorHandle.__post_init__ = lambda self: None

    global IS_QUICK
    IS_QUICK = True


def digest():
    """Hash of the tokens, keys and values that the decode loop leaves, by both selections."""
    from resa.fast.generate import generate
    from resa.reference import ReSAConfig
    from small_models import Shape

    shape, found = Shape(seed=36, kv_heads=1, head_dim=16, hidden=32, tied=False), hashlib.sha256()
    for dtype, selection in ((torch.float32, "sketch"), (torch.float16, "bounds")):
        config = ReSAConfig(8, min_blocks=2, interval=3, selection=selection)
        for done in generate(shape.model(dtype), shape.prompts((25, 6)), 5, config):
            found.update(repr(done.tokens).encode())
            for kept in (done.cache.keys, done.cache.values):
                found.update(kept[..., : done.cache.length, :].float().numpy().tobytes())
    return found.hexdigest()


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    harden()
    print(digest())
