"""Whitening of a batch: one operator, three engines.

``reference`` is plain torch and runs anywhere, ``cpu`` is compiled by numba, ``cuda`` by Triton.
Each has a class ``Sweep`` with a forward and a backward, whole and in steps; :mod:`operator` puts
them together.
"""

from cbn_lab.kernels.operator import ENGINES as ENGINES
from cbn_lab.kernels.operator import forget as forget
from cbn_lab.kernels.operator import learn_call as learn_call
from cbn_lab.kernels.operator import recall_call as recall_call
from cbn_lab.kernels.operator import values_per_channel as values_per_channel
from cbn_lab.kernels.operator import whiten as whiten
