"""What the loops share: the job, its tasks, and plain access to memory."""

import numba
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from cbn_lab.kernels.cpu import job as structure
from cbn_lab.kernels.cpu.job import INTEGERS, NUMBERS

# No nnan and no ninf: NaN and infinity in the input must show in the output.
FAST = {"reassoc", "contract", "nsz", "arcp"}

# Only other loops call these: what would let Python call them takes half of the time to compile.
BARE = {"error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
plain = njit(forceinline=True, **BARE)
fast = njit(forceinline=True, fastmath=FAST, **BARE)
tiny = njit(inline="always", **BARE)
ceil_divide = plain(structure.ceil_divide)

JOB = types.Record.make_c_struct(
    [(name, types.int64) for name in INTEGERS] + [(name, types.float64) for name in NUMBERS]
)
SIGNATURE = types.void(types.CPointer(JOB))


@intrinsic
def pointer(typing, address, dtype):
    """The address as a pointer to numbers of ``dtype``."""
    kind = types.CPointer(dtype.dtype)

    def generate(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(kind))

    return kind(address, dtype), generate


@intrinsic
def next_task(typing, job):
    """Take the next number from the counter at the head of the job, atomically."""

    def generate(context, builder, signature, args):
        integer = ir.IntType(64)
        counter = builder.bitcast(args[0], integer.as_pointer())
        return builder.atomic_rmw("add", counter, ir.Constant(integer, 1), "seq_cst")

    return types.int64(job), generate


@intrinsic
def call(typing, loop, job):
    """Run the loop at this address."""

    def generate(context, builder, signature, args):
        kind = ir.PointerType(ir.FunctionType(ir.VoidType(), [args[1].type]))
        builder.call(builder.inttoptr(args[0], kind), [args[1]])
        return context.get_dummy_value()

    return types.void(loop, job), generate


@intrinsic
def call_parallel(typing, parallel, loop, job, threads):
    """Have OpenMP's ``GOMP_parallel``, at this address, run the loop on so many threads."""

    def generate(context, builder, signature, args):
        void, number, job_type = ir.VoidType(), ir.IntType(32), args[2].type
        kind = ir.FunctionType(void, [ir.IntType(64), job_type, number, number])
        count = builder.trunc(args[3], number)
        function = builder.inttoptr(args[0], ir.PointerType(kind))
        builder.call(function, [args[1], args[2], count, ir.Constant(number, 0)])
        return context.get_dummy_value()

    return types.void(parallel, loop, job, threads), generate


@plain
def doubles(address, count):
    return carray(pointer(address, numba.float64), (count,))


@plain
def number(address, i, single):
    """Number i of a small array, which may be of float32."""
    if single != 0:
        return float(pointer(address, numba.float32)[i])
    return pointer(address, numba.float64)[i]


@plain
def set_number(address, i, single, value):
    if single != 0:
        pointer(address, numba.float32)[i] = numba.float32(value)
    else:
        pointer(address, numba.float64)[i] = value


@plain
def table(address, rows, columns):
    """A table of float64 numbers."""
    return carray(pointer(address, numba.float64), (rows, columns))


@intrinsic
def ahead(typing, base, count):
    """The pointer ``count`` numbers further on."""

    def generate(context, builder, signature, args):
        return builder.gep(args[0], [args[1]], inbounds=True)

    return base(base, types.int64), generate


@intrinsic
def prefetch(typing, base, i):
    """Ask for the cache line of number i, which need not exist, to be brought near."""

    def generate(context, builder, signature, args):
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        where = builder.bitcast(builder.gep(args[0], [args[1]]), byte)
        read, second_cache, data = (ir.Constant(number, k) for k in (0, 2, 1))
        builder.call(function, [where, read, second_cache, data])
        return context.get_dummy_value()

    return types.void(base, types.int64), generate


@plain
def tasks(job):
    """How many tasks the job has: blocks of samples, of length and of channels."""
    return (
        ceil_divide(job.samples, job.sample_block)
        * ceil_divide(job.length, job.length_block)
        * ceil_divide(job.channels, job.channel_block)
    )


@plain
def bounds(job, task):
    """Where a task begins and ends; neighbours in memory follow each other."""
    by_channel = ceil_divide(job.channels, job.channel_block)
    by_length = ceil_divide(job.length, job.length_block)
    c = task % by_channel * job.channel_block
    part = task // by_channel
    start = part % by_length * job.length_block
    n = part // by_length * job.sample_block
    return (
        part,
        n,
        min(n + job.sample_block, job.samples),
        c,
        min(c + job.channel_block, job.channels),
        start,
        min(start + job.length_block, job.length),
    )


def access(step):
    """Read and write value i of what :func:`places` gives.

    By hand, so that the optimiser may count on step·i not to overflow: without that it does not
    see that real and imaginary parts alternate, and collects them one by one.
    """

    def address(builder, base, i, odd):
        integer = i.type
        index = builder.mul(i, ir.Constant(integer, step), flags=["nsw"])
        index = builder.add(index, ir.Constant(integer, odd), flags=["nsw"])
        return builder.gep(base, [index], inbounds=True)

    def reader(odd):
        @intrinsic
        def read(typing, base, i):
            def generate(context, builder, signature, args):
                return builder.load(address(builder, args[0], args[1], odd))

            return base.dtype(base, types.int64), generate

        return read

    def writer(odd):
        @intrinsic
        def write(typing, base, i, value):
            def generate(context, builder, signature, args):
                builder.store(args[2], address(builder, args[0], args[1], odd))

            return types.void(base, types.int64, base.dtype), generate

        return write

    return reader(0), reader(step - 1), writer(0), writer(step - 1)


def places(dtype, step):
    """Pointers to value (n, c, i): of input, output gradient and result, two each.

    A sweep gets them all; those of tensors that it does not have lead nowhere and are not used.
    """
    size = dtype(0).itemsize

    @tiny
    def pair(re, im, offset):
        first = pointer(re + size * offset, dtype)
        if step == 2:
            return first, first  # two pointers would hide that they are neighbours
        return first, pointer(im + size * offset, dtype)

    @tiny
    def at(job, n, c, i):
        x, y = pair(job.x_re, job.x_im, n * job.x_sample + c * job.x_channel + step * i)
        g, h = pair(job.g_re, job.g_im, n * job.g_sample + c * job.g_channel + step * i)
        o, p = pair(job.y_re, job.y_im, n * job.y_sample + c * job.y_channel + step * i)
        return x, y, g, h, o, p

    return at
