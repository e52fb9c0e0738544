"""How the whole suite is shared between two workers: conftest.py in a small suite of its own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

CONFTEST = Path(__file__).parent.parent / "conftest.py"
SLOW = """
import os, pathlib, time
import pytest

@pytest.mark.parametrize("k", range(3))
def test_slow(k):
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    time.sleep(0.1)
    pathlib.Path(os.environ["PYTEST_XDIST_WORKER"]).open("a").write("slow ")
"""
TIMED = """
import pathlib

def test_timed():
    done = [path.read_text() for path in pathlib.Path().glob("gw*")]
    assert len(done) == 2 and "".join(done).count("slow") == 9
"""
BROKEN = "def test_broken():\n    assert False"


def test_what_measures_time_runs_alone_after_all_else_and_one_line_tells_all(tmp_path):
    suite = {f"tests/test_{name}.py": SLOW for name in ("kernels", "one", "other")}
    suite |= {"tests/browser/test_explorers.py": TIMED, "tests/test_broken.py": BROKEN}
    for name, text in suite.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    shutil.copy(CONFTEST, tmp_path)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "OMP_"))}
    env["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "xdist", "-n", "2"]
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
    )
    last_line = done.stdout.splitlines()[-1]
    assert done.returncode == 1 and last_line.startswith("1 failed, 10 passed in "), done.stdout
