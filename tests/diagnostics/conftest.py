"""The gallery is imported by name; what other tests hold is told apart."""

import gc
import sys
from pathlib import Path

import pytest

from cbn_lab.diagnostics import graph

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def others() -> int:
    """Nodes that models of other tests, still alive, hold when this one begins."""
    gc.collect()
    graph.release()
    return len(graph.keeper.nodes)
