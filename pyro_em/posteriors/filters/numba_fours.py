"""Four numbers at a time in compiled loops: one instruction where the machine has it.

LLVM finds such instructions in loops of many turns. Those over the rows and columns of a small matrix
have few, and take less time, and less time to compile, if they are written so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, register_model

_FOUR = ir.VectorType(ir.DoubleType(), 4)
_PLACES = ir.VectorType(ir.IntType(32), 4)
_FAST = ("contract",)

_instruction: Callable[[Any], Any] = intrinsic


class Four(types.Type):
    """The type of four numbers of double precision."""

    def __init__(self) -> None:
        super().__init__(name="Four")


@register_model(Four)
class _FourModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, type_: Any) -> None:
        super().__init__(manager, type_, _FOUR)


_four = Four()


def _same(builder: Any, x: Any) -> Any:
    """One number four times."""
    none = ir.Constant(_FOUR, ir.Undefined)
    first = builder.insert_element(none, x, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(first, none, ir.Constant(_PLACES, [0] * 4))


def _address(context: Any, builder: Any, of: Any, X: Any, i: Any, j: Any) -> Any:
    """Where the number of a row and a column lies; nobody looks whether it is there."""
    array = context.make_array(of)(context, builder, X)
    columns = builder.extract_value(array.shape, 1)
    place = builder.add(builder.mul(i, columns), j)
    return builder.bitcast(builder.gep(array.data, [place]), _FOUR.as_pointer())


@_instruction
def load(_: Any, X: Any, i: Any, j: Any) -> Any:
    """The numbers of a row from a column on.

    Args:
        X: One row after the other.
        i: The row.
        j: The column.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        at = _address(context, builder, signature.args[0], *args)
        return builder.load(at, align=8)

    return _four(X, types.intp, types.intp), generate


@_instruction
def store(_: Any, X: Any, i: Any, j: Any, x: Any) -> Any:
    """Put them there, see `load`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        at = _address(context, builder, signature.args[0], *args[:3])
        builder.store(args[3], at, align=8)
        return context.get_dummy_value()

    return types.void(X, types.intp, types.intp, x), generate


@_instruction
def times(_: Any, x: Any, by: Any) -> Any:
    """Four numbers times one."""

    def generate(_: Any, builder: Any, __: Any, args: Any) -> Any:
        return builder.fmul(args[0], _same(builder, args[1]), flags=_FAST)

    return _four(x, types.float64), generate


@_instruction
def plus(_: Any, total: Any, x: Any, by: Any) -> Any:
    """Four numbers and four others times one."""

    def generate(_: Any, builder: Any, __: Any, args: Any) -> Any:
        more = builder.fmul(args[1], _same(builder, args[2]), flags=_FAST)
        return builder.fadd(args[0], more, flags=_FAST)

    return _four(total, x, types.float64), generate


@_instruction
def product(_: Any, x: Any, y: Any) -> Any:
    """Four numbers times four others, each with its own."""

    def generate(_: Any, builder: Any, __: Any, args: Any) -> Any:
        return builder.fmul(args[0], args[1], flags=_FAST)

    return _four(x, y), generate


@_instruction
def larger(_: Any, x: Any, y: Any) -> Any:
    """The larger of four numbers and the magnitudes of four others, each with its own."""

    def generate(_: Any, builder: Any, __: Any, args: Any) -> Any:
        out, y = args
        for other in (y, builder.fneg(y)):
            out = builder.select(builder.fcmp_ordered(">", other, out), other, out)
        return out

    return _four(x, y), generate


@_instruction
def plus_product(_: Any, total: Any, x: Any, y: Any) -> Any:
    """Four numbers and the products of four others with four others."""

    def generate(_: Any, builder: Any, __: Any, args: Any) -> Any:
        more = builder.fmul(args[1], args[2], flags=_FAST)
        return builder.fadd(args[0], more, flags=_FAST)

    return _four(total, x, y), generate


@_instruction
def lane(_: Any, x: Any, i: Any) -> Any:
    """One of four numbers."""

    def generate(_: Any, builder: Any, __: Any, args: Any) -> Any:
        return builder.extract_element(args[0], args[1])

    return types.float64(x, types.intp), generate


@_instruction
def apart(_: Any) -> Any:
    """Called by a function that is to stay a function: where it is called, it is not copied to.

    What is compiled with each of its callers again takes time again.
    """

    def generate(context: Any, builder: Any, __: Any, ___: Any) -> Any:
        builder.function.attributes.add("noinline")
        return context.get_dummy_value()

    return types.void(), generate
