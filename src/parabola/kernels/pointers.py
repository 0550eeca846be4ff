# SPDX-License-Identifier: Apache-2.0
"""Pointers for Numba: elements at an address, in memory that overlaps no other.

Compiled loops take tensors as addresses, hundreds of them in one array. ``pointer(address, first,
like, role)`` makes something of an address that can be indexed. The role, a literal string, is a
promise: memory of different roles does not overlap. Without it LLVM would check for overlap before
every loop, and not vectorize at all where a loop has more than a few arrays.

Elements of dtype uint16 are bfloat16: read as float32, and written rounded to nearest, ties to
even. Numba keeps machine code on disk until the file of the compiled function changes; after a
change of this file alone, delete what it kept.
"""

import operator
from collections.abc import Callable
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

import numba
from llvmlite import ir
from numba import types
from numba.core.imputils import lower_builtin
from numba.core.typing import templates
from numba.extending import intrinsic, models, register_model

ROLES = ("p", "g", "m", "v", "e", "u", "x", "s", "w", "y", "r", "f", "h", "F", "B", "D", "a", "b")
"""Parameter, gradient, moments, off-diagonals, direction; the others are scratch."""

Function = TypeVar("Function", bound=Callable[..., Any])

# Only multiplies and adds may be fused: infinities, NaNs and the order of operations stay. The
# stubs of Numba know neither all options nor that intrinsics lose their first parameter.
SETTINGS = {"nogil": True, "fastmath": {"contract"}, "error_model": "numpy"}
_njit: Any = numba.njit
_signature: Any = templates.signature
_lower: Callable[..., Callable[[Function], Function]] = lower_builtin


def part(function: Function) -> Function:
    """Compile for the use in compiled functions: as a piece of them.

    As a function of its own it would exist twice, optimized in different ways, in the machine code
    that was just compiled and in the code kept on disk, and results would differ in the last bits.
    """
    compiled = _njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, forceinline=True, **SETTINGS)(
        function
    )
    return cast(Function, compiled)


def kept(function: Function) -> Function:
    """Compile for Python, and keep the machine code on disk where there is a place for it."""
    try:
        return cast(Function, _njit(cache=True, **SETTINGS)(function))
    except RuntimeError:  # neither the package nor the user's cache folder is writable
        return cast(Function, _njit(**SETTINGS)(function))


class Pointer(types.Type):
    """Type of a pointer to ``dtype`` elements in memory of a role."""

    def __init__(self, dtype: Any, role: str) -> None:
        self.dtype, self.role = dtype, role
        self.half = dtype == types.uint16
        self.value = types.float32 if self.half else dtype
        super().__init__(name=f"Pointer({dtype}, {role})")


class _PointerModel(cast(Any, models).PrimitiveModel):  # type: ignore[misc]
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, dmm.lookup(fe_type.dtype).get_data_type().as_pointer())


cast(Any, register_model)(Pointer)(_PointerModel)


def _pointer(typing: Any, address: Any, first: Any, like: Any, role: Any) -> Any:
    result = Pointer(like.dtype, role.literal_value)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        start = builder.inttoptr(args[0], context.get_value_type(result))
        return builder.gep(start, [args[1]])

    return _signature(result, types.uint64, types.intp, like, role), codegen


def _add(typing: Any, total: Any, x: Any) -> Any:
    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.fadd(*args, flags=("reassoc", "contract"))

    return _signature(types.float64, types.float64, types.float64), codegen


pointer: Callable[[Any, Any, Any, str], Any] = cast(Any, intrinsic)(prefer_literal=True)(_pointer)
"""``pointer(address, first, like, role)``: to element ``first`` of an array like ``like``."""

add: Callable[[Any, Any], Any] = cast(Any, intrinsic)(_add)
"""``add(total, x)`` in float64; the order of several is free, so that a sum vectorizes."""


class _Load(cast(Any, templates).AbstractTemplate):  # type: ignore[misc]
    def generic(self, args: Any, kws: Any) -> Any:
        if isinstance(args[0], Pointer):
            return _signature(args[0].value, args[0], types.intp)
        return None


class _Store(cast(Any, templates).AbstractTemplate):  # type: ignore[misc]
    def generic(self, args: Any, kws: Any) -> Any:
        if isinstance(args[0], Pointer):
            return _signature(types.none, args[0], types.intp, args[0].value)
        return None


cast(Any, templates).infer_global(operator.getitem)(_Load)
cast(Any, templates).infer_global(operator.setitem)(_Store)

_scopes: WeakKeyDictionary[Any, dict[str, tuple[Any, Any]]] = WeakKeyDictionary()


def _promise(module: Any, access: Any, role: str) -> None:
    """Mark a load or store as one of its role, and of no other."""
    if module not in _scopes:
        domain = module.add_metadata([ir.MetaDataString(module, "parabola")])
        own = [module.add_metadata([ir.MetaDataString(module, name), domain]) for name in ROLES]
        _scopes[module] = {
            name: (module.add_metadata([own[i]]), module.add_metadata(own[:i] + own[i + 1 :]))
            for i, name in enumerate(ROLES)
        }
    scope, others = _scopes[module][role]
    access.set_metadata("alias.scope", scope)
    access.set_metadata("noalias", others)


I16, I32, F32 = ir.IntType(16), ir.IntType(32), ir.FloatType()


@_lower(operator.getitem, Pointer, types.Integer)
def _load(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    x = builder.load(builder.gep(args[0], [args[1]]))
    _promise(builder.module, x, sig.args[0].role)
    if sig.args[0].half:
        x = builder.bitcast(builder.shl(builder.zext(x, I32), I32(16)), F32)
    return x


@_lower(operator.setitem, Pointer, types.Integer, types.Any)
def _store(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    x = args[2]
    if sig.args[0].half:
        bits = builder.bitcast(x, I32)
        odd = builder.and_(builder.lshr(bits, I32(16)), I32(1))
        rounded = builder.add(builder.add(bits, I32(0x7FFF)), odd)
        quiet = builder.or_(bits, I32(1 << 22))  # rounding could make an infinity of a NaN
        bits = builder.select(builder.fcmp_unordered("uno", x, x), quiet, rounded)
        x = builder.trunc(builder.lshr(bits, I32(16)), I16)
    store = builder.store(x, builder.gep(args[0], [args[1]]))
    _promise(builder.module, store, sig.args[0].role)
    return context.get_dummy_value()
