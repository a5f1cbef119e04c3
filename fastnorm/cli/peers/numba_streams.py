"""Copies and sums of whole arrays: the rate that a kernel which only moves its arrays can reach.

The plain form writes through the caches. The streaming form writes past them (non-temporal stores of 64 bytes), which
is faster once the result does not fit there. Arrays are one-dimensional and of one dtype. Up to 63 bytes at either end
of the result are left out by the streaming form: it measures, it is no library.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import SimpleNamespace
from typing import Any

_numba: Any = import_module("numba")
_LINE = 64
_BLOCK = 4096  # lines in a block, the unit of the threads' work


def _intrinsics() -> SimpleNamespace:
    """`copy_line(to, of, i)` and `add_line(to, a, b, i)`: 64 bytes from element i on, stored past the caches."""
    types, ir = _numba.types, import_module("llvmlite.ir")

    def line(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> tuple[Any, Any]:
        item = context.get_data_type(array_type.dtype)
        vector = ir.VectorType(item, _LINE * 8 // array_type.dtype.bitwidth)
        data = context.make_array(array_type)(context, builder, array).data
        return builder.bitcast(builder.gep(data, [index]), vector.as_pointer()), vector

    def store(builder: Any, value: Any, place: Any) -> None:
        instruction = builder.store(value, place, align=_LINE)
        mark = builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)])
        instruction.set_metadata("nontemporal", mark)

    @_numba.extending.intrinsic  # type: ignore[untyped-decorator]
    def copy_line(typing: Any, to: Any, of: Any, i: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            target, _ = line(context, builder, to, values[0], values[2])
            source, _ = line(context, builder, of, values[1], values[2])
            store(builder, builder.load(source, align=of.dtype.bitwidth // 8), target)
            return context.get_dummy_value()

        return types.none(to, of, i), code

    @_numba.extending.intrinsic  # type: ignore[untyped-decorator]
    def add_line(typing: Any, to: Any, a: Any, b: Any, i: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            target, _ = line(context, builder, to, values[0], values[3])
            first, _ = line(context, builder, a, values[1], values[3])
            second, _ = line(context, builder, b, values[2], values[3])
            align = a.dtype.bitwidth // 8
            total = builder.fadd(builder.load(first, align=align), builder.load(second, align=align))
            store(builder, total, target)
            return context.get_dummy_value()

        return types.none(to, a, b, i), code

    return SimpleNamespace(copy_line=copy_line, add_line=add_line)


@cache
def compiled(parallel: bool) -> SimpleNamespace:
    """`copy(to, of)`, `add(to, a, b)`, `stream_copy(to, of, start)`, `stream_add(to, a, b, start)`."""
    jit = _numba.njit(fastmath=True, error_model="numpy", parallel=parallel)
    prange, line, block = _numba.prange, _LINE, _BLOCK
    intrinsics = _intrinsics()
    copy_line, add_line = intrinsics.copy_line, intrinsics.add_line

    def copy(to: Any, of: Any) -> None:
        for i in prange(of.size):
            to[i] = of[i]

    def add(to: Any, a: Any, b: Any) -> None:
        for i in prange(a.size):
            to[i] = a[i] + b[i]

    def stream_copy(to: Any, of: Any, start: Any) -> None:
        step = line // of.itemsize
        lines = (of.size - start) // step
        for part in prange((lines + block - 1) // block):
            for k in range(part * block, min((part + 1) * block, lines)):
                copy_line(to, of, start + k * step)

    def stream_add(to: Any, a: Any, b: Any, start: Any) -> None:
        step = line // a.itemsize
        lines = (a.size - start) // step
        for part in prange((lines + block - 1) // block):
            for k in range(part * block, min((part + 1) * block, lines)):
                add_line(to, a, b, start + k * step)

    return SimpleNamespace(**{f.__name__: jit(f) for f in (copy, add, stream_copy, stream_add)})
