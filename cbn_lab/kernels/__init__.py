"""Whitening of a batch: one operator, three engines.

``reference`` is plain torch and runs anywhere, ``cpu`` is compiled by numba, ``cuda`` by Triton.
Each has a class ``Sweep`` with a forward and a backward, whole and in steps; :mod:`operator` puts
them together.
"""

from cbn_lab.kernels.operator import ENGINES as ENGINES
from cbn_lab.kernels.operator import forget as forget
from cbn_lab.kernels.operator import whiten as whiten
