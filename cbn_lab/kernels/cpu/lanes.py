"""Vectors of 64 bytes for numba: complex numbers as they lie in memory, re im re im ...

The optimiser on its own takes interleaved numbers apart and puts them together again, or collects
them one by one. Whitening needs neither: with D = (rr, ii, rr, ii, ...) and O = (ri, ir, ...),
A·x is D·x + O·swap(x), where swap exchanges the neighbours. LLVM cuts the vectors to whatever the
processor has.
"""

import operator

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, overload, register_model

BYTES = 64
CONTRACT = ["contract", "reassoc", "nsz"]  # a·b + c in one step; NaN and infinity are kept


class Lanes(types.Type):
    def __init__(self, dtype: types.Float) -> None:
        self.dtype, self.count = dtype, BYTES * 8 // dtype.bitwidth
        super().__init__(f"lanes({dtype})")


@register_model(Lanes)
class LanesModel(models.PrimitiveModel):
    def __init__(self, manager, kind):
        number = manager.lookup(kind.dtype).get_value_type()
        super().__init__(manager, kind, ir.VectorType(number, kind.count))


def _indices(positions):
    return ir.Constant(ir.VectorType(ir.IntType(32), len(positions)), list(positions))


def _at(builder, kind, base, i):
    where = builder.gep(base, [i], inbounds=True)
    number = base.type.pointee
    return builder.bitcast(where, ir.VectorType(number, kind.count).as_pointer())


@intrinsic
def load(typing, base, i):
    """The numbers base[i], base[i + 1], ..."""
    kind = Lanes(base.dtype)

    def generate(context, builder, signature, args):
        return builder.load(_at(builder, kind, *args), align=kind.dtype.bitwidth // 8)

    return kind(base, types.int64), generate


@intrinsic
def store(typing, base, i, lanes):
    def generate(context, builder, signature, args):
        where = _at(builder, lanes, args[0], args[1])
        builder.store(args[2], where, align=lanes.dtype.bitwidth // 8)

    return types.void(base, types.int64, lanes), generate


@intrinsic
def stream(typing, base, i, lanes):
    """Store a whole cache line, which base[i] must begin, past the cache.

    An ordinary store first reads the line that it is about to overwrite. No fence follows: the
    atomic count of :func:`tools.next_task`, after every task, makes such stores seen by all.
    """

    def generate(context, builder, signature, args):
        where = _at(builder, lanes, args[0], args[1])
        once = builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)])
        builder.store(args[2], where, align=BYTES).set_metadata("nontemporal", once)

    return types.void(base, types.int64, lanes), generate


@intrinsic
def pairs(typing, a, b):
    """(a, b, a, b, ...)"""
    kind = Lanes(a)

    def generate(context, builder, signature, args):
        two = ir.Constant(ir.VectorType(context.get_value_type(a), 2), ir.Undefined)
        for k, value in enumerate(args):
            two = builder.insert_element(two, value, ir.Constant(ir.IntType(32), k))
        return builder.shuffle_vector(two, two, _indices([0, 1] * (kind.count // 2)))

    return kind(a, a), generate


@intrinsic
def swap(typing, lanes):
    """Real and imaginary parts exchanged."""

    def generate(context, builder, signature, args):
        return builder.shuffle_vector(
            args[0], args[0], _indices([k ^ 1 for k in range(lanes.count)])
        )

    return lanes(lanes), generate


@intrinsic
def totals(typing, lanes):
    """The sums over the real and over the imaginary lanes, in float64."""
    result = types.UniTuple(types.float64, 2)

    def generate(context, builder, signature, args):
        sums = []
        for start in (0, 1):
            total = ir.Constant(ir.DoubleType(), 0)
            for k in range(start, lanes.count, 2):
                number = builder.extract_element(args[0], ir.Constant(ir.IntType(32), k))
                if lanes.dtype != types.float64:
                    number = builder.fpext(number, ir.DoubleType())
                total = builder.fadd(total, number)
            sums.append(total)
        return cgutils.pack_array(builder, sums)

    return result(lanes), generate


def _arithmetic(function, instruction):
    @intrinsic
    def run(typing, a, b):
        def generate(context, builder, signature, args):
            return getattr(builder, instruction)(*args, flags=CONTRACT)

        return a(a, b), generate

    @overload(function, jit_options={"forceinline": True})
    def choose(a, b):
        if isinstance(a, Lanes) and a == b:
            return lambda a, b: run(a, b)


_arithmetic(operator.add, "fadd")
_arithmetic(operator.sub, "fsub")
_arithmetic(operator.mul, "fmul")
