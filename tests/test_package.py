"""The public names, and what importing them costs."""

import subprocess
import sys

import pytest

import cbn_lab


def python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.parametrize("name", cbn_lab.__all__)
def test_every_public_name_is_there_and_documented(name):
    assert getattr(cbn_lab, name).__doc__


def test_importing_the_package_loads_nothing_heavy():
    code = (
        "import sys, cbn_lab; "
        "print(*{'torch', 'numpy', 'matplotlib', 'ipywidgets', 'numba'} & set(sys.modules))"
    )
    assert python(code).strip() == ""


def test_the_layers_and_the_data_made_here_load_no_plots_and_no_widgets():
    code = (
        "import sys; from cbn_lab import BatchNorm2d, ComplexBatchNorm2d, LeakyBatchNorm2d; "
        "from cbn_lab.datasets import speckle; "
        "print(*{'matplotlib', 'ipywidgets', 'numba', 'sklearn'} & set(sys.modules))"
    )
    assert python(code).strip() == ""


def test_the_layers_take_at_most_0_3_s_over_torch_and_numpy():
    code = (
        "import time, torch, numpy; start = time.perf_counter(); "
        "from cbn_lab import BatchNorm2d, ComplexBatchNorm2d, inspect_buffers; "
        "print(time.perf_counter() - start)"
    )
    # The machine may be busy with something else: the best of three, and no more than it takes.
    assert any(float(python(code)) < 0.3 for _ in range(3))
