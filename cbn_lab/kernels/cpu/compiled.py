"""The loops of the CPU engine, in numba. Imported only when they must be compiled.

Every loop takes a :class:`cbn_lab.kernels.cpu.job.Job`. Data come in one of two layouts:

* planes: (N, C, L) with a channel's L values side by side, as in contiguous NCHW;
* rows: (L, C) with the channels side by side, as in channels_last or (N, C).

Real and imaginary parts lie ``step`` numbers apart: interleaved (2), or in two tensors (1).
Single precision is summed in float32 over short stretches and in float64 from there on. A channel
that float32 cannot serve is "wide": done again in float64, see :func:`algebra.finish_moments`.
"""

import numba
import numpy as np
from numba import carray

from cbn_lab.kernels.cpu import algebra, planes, rows
from cbn_lab.kernels.cpu.tools import (
    SIGNATURE,
    bounds,
    call,
    call_parallel,
    doubles,
    next_task,
    plain,
    table,
    tasks,
)


def forwards(block):
    """A loop that does the tasks in memory order."""

    def loop(pointer_to_job):
        job = carray(pointer_to_job, (1,))[0]
        last, task = tasks(job), next_task(pointer_to_job)
        while task < last:
            block(job, *bounds(job, task))
            task = next_task(pointer_to_job)

    return loop


def backwards(block):
    """The other way round: what the sweep before has read last is still in the cache."""

    def loop(pointer_to_job):
        job = carray(pointer_to_job, (1,))[0]
        last, task = tasks(job), next_task(pointer_to_job)
        while task < last:
            block(job, *bounds(job, last - 1 - task))
            task = next_task(pointer_to_job)

    return loop


def first_guess(block):
    """A point near each channel's mean, exact in float32: the mean of its first few values.

    No channel is wide yet.
    """

    def loop(pointer_to_job):
        job = carray(pointer_to_job, (1,))[0]
        shift = table(job.shift, 2, job.channels)
        block(job, shift)
        wide = doubles(job.wide, job.channels)
        for c in range(job.channels):
            wide[c] = 0.0
            for k in range(2):
                shift[k, c] = algebra.rounded(shift[k, c])

    return loop


@plain
def sweep(job, pointer_to_job, loop):
    job.counter = 0
    if job.threads <= 1:
        call(loop, pointer_to_job)
    else:
        call_parallel(job.parallel, loop, pointer_to_job, job.threads)


def whole_forward(pointer_to_job):
    """All steps of a forward. Python between them would run cold: a sweep empties the caches."""
    job = carray(pointer_to_job, (1,))[0]
    if job.training != 0:
        call(job.guess, pointer_to_job)
        sweep(job, pointer_to_job, job.moments)
        call(job.finish_moments, pointer_to_job)
        if job.wide_found != 0:
            job.only_wide = 1
            sweep(job, pointer_to_job, job.moments)
            call(job.finish_moments, pointer_to_job)
    call(job.map_forward, pointer_to_job)
    sweep(job, pointer_to_job, job.apply)


def whole_backward(pointer_to_job):
    """All steps of a backward; no gradient of the input where there is no place for it."""
    job = carray(pointer_to_job, (1,))[0]
    call(job.shift_to_mean, pointer_to_job)
    sweep(job, pointer_to_job, job.gram)
    call(job.finish_gram, pointer_to_job)
    call(job.map_backward, pointer_to_job)
    if job.y_re != 0:
        sweep(job, pointer_to_job, job.apply_backward)


def all_loops(double: bool, interleaved: bool, in_rows: bool):
    """Every loop by name, not yet compiled."""
    dtype = np.float64 if double else np.float32
    make = rows.blocks if in_rows else planes.blocks
    guess, moments, apply, gram, apply_backward = make(dtype, 2 if interleaved else 1)
    sweeps = {
        "guess": first_guess(guess),
        "moments": forwards(moments),
        "apply": backwards(apply),
        "gram": forwards(gram),
        "apply_backward": backwards(apply_backward),
    }
    others = (*algebra.SMALL, whole_forward, whole_backward)
    return {function.__name__: function for function in others} | sweeps


def compile_loops(
    label: str, double: bool, interleaved: bool, in_rows: bool
) -> dict[str, tuple[str, bytes]]:
    """Symbol and object code of every loop for one kind of data."""
    compiled = {}
    for name, function in all_loops(double, interleaved, in_rows).items():
        loop = numba.cfunc(SIGNATURE, error_model="numpy")(function)
        code = loop._library._get_compiled_object()
        compiled[f"{label}.{name}"] = loop.native_name, code
    return compiled
