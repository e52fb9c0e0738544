"""How the whole suite shares two cores: ``start.py test`` runs it as ``pytest -n 2``.

Files are handed to pytest-xdist's workers one by one. Without workers this file only sets
environment variables.
"""

import os

import pytest

# Before torch is imported, here or in a notebook's kernel: its threads are not to spin on a core
# that another process could use.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch  # noqa: E402

if not torch.cuda.is_available():
    # Before Triton is imported: without a GPU its kernels run as Python, where they are asked for.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The first compiles the CPU loops, which JupyterLab would compile a second time if it did not find
# them on the disk; then the long ones.
EARLY = [
    "tests/test_kernels.py",
    "tests/test_triton.py",
    "tests/diagnostics/",
    "tests/browser/test_lab.py",
    "tests/course/test_course.py",
    "notebooks/",
]
TIMED = ["tests/browser/test_explorers.py"]  # counts frames: last, when the other worker is done


@pytest.hookimpl(optionalhook=True)  # pytest-xdist may be absent
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadScopeScheduling

    class Scheduler(LoadScopeScheduling):
        """Whole files to whichever worker is free, in the order above."""

        def _split_scope(self, nodeid):
            return nodeid.split("::")[0]

        def _reschedule(self, node):
            if [*self.workqueue] == TIMED and len(self.nodes) > 1:
                others = [other for other in self.nodes if other is not node]
                if not all(other.shutting_down for other in others):
                    node.shutdown()
                return  # the last worker waits: remove_node calls again
            super()._reschedule(node)

        def remove_node(self, node):
            crashed = super().remove_node(node)
            for other in self.nodes:
                self._reschedule(other)
            return crashed

    config.option.loadscopereorder = False  # as collected, which is as below
    return Scheduler(config, log)


def pytest_collection_modifyitems(config, items):
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: _turn(item.nodeid))


def _turn(nodeid: str) -> int:
    early = [k for k, start in enumerate(EARLY) if nodeid.startswith(start)]
    late = len(EARLY) + nodeid.startswith(tuple(TIMED))
    return early[0] if early else late
