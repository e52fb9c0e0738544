"""Whitening of a batch: one operator, three engines.

``reference`` is plain torch and runs anywhere, ``cpu`` is compiled by numba, ``cuda`` by Triton.
Each has a class ``Sweep`` with a forward and a backward, whole and in steps; :mod:`operator` puts
them together. :mod:`recall` knows calls again that need not be examined a second time.
"""

from cbn_lab.kernels.operator import ENGINES as ENGINES
from cbn_lab.kernels.operator import check_engine as check_engine
from cbn_lab.kernels.operator import forget as forget
from cbn_lab.kernels.operator import is_watched as is_watched
from cbn_lab.kernels.operator import learn_call as learn_call
from cbn_lab.kernels.operator import whiten as whiten
from cbn_lab.kernels.recall import recall_call as recall_call
