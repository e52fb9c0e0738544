"""The pytest fixture ``assert_no_graph_leak``.

pytest loads this file in every run of every project where the kit is installed, so nothing heavy
is imported before the fixture is called.
"""

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture
def assert_no_graph_leak() -> Callable[..., Any]:
    """Fail the test if a training step makes memory grow, naming what holds on to it::

        def test_training(assert_no_graph_leak):
            net = Net()
            assert_no_graph_leak(net, lambda: train(net))

    It takes the module, the step (without arguments), and ``steps=``, how often to run it (12);
    and returns the diagnosis. Module, step and all they lead to are put back as they were.
    """

    def check(module: Any, step: Callable[[], Any], steps: int = 12) -> Any:
        __tracebackhide__ = True
        import cbn_lab

        report = cbn_lab.inspect_buffers(module)
        if not report.ok:
            pytest.fail(f"before any step:\n{report}")
        diagnosis = cbn_lab.diagnose(step, module, steps=steps)
        if diagnosis.verdict == "growing":
            pytest.fail(str(diagnosis))
        return diagnosis

    return check
