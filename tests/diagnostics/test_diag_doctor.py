"""The command and the pytest plugin, as a user meets them: in a process of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import cbn_lab
from cbn_lab import cli

PACKAGE = Path(cbn_lab.__file__).parents[1]
FACTORIES = """
    import torch
    import cbn_lab

    def build(update):
        net = torch.nn.Sequential(
            torch.nn.Conv2d(1, 2, 3), cbn_lab.LeakyBatchNorm2d(2, update=update))
        def step():
            print("training")
            net(torch.randn(2, 1, 5, 5)).sum().backward()
        return step, net

    def leaky():
        return build("rebind")

    def cured():
        return build("no_grad")[0]

    def fails():
        def step():
            raise ArithmeticError("diverged")
        return step

    def module():
        return torch.nn.Linear(2, 2)

    number = 3
"""


@pytest.fixture
def doctor(tmp_path, monkeypatch, capsys):
    lines = [line[4:] for line in FACTORIES.splitlines()]
    (tmp_path / "loops.py").write_text("\n".join(lines))
    (tmp_path / "needs.py").write_text("import absent\n")
    (tmp_path / "broken.py").write_text("import sys\nsys.exit('no data')\n")

    def run(*arguments):
        status = cli.main(["doctor", *arguments])
        return status, *capsys.readouterr()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield run
    for name in ("loops", "broken", "needs"):
        sys.modules.pop(name, None)


def test_a_growing_leak_exits_1_and_is_named(doctor):
    status, out, err = doctor("loops:leaky")
    assert status == 1 and "GROWING  1.running_mean" in out and "specimens.py:" in out
    assert "training" in err and "training" not in out


def test_json_from_a_file_of_a_clean_loop_exits_0(doctor):
    status, out, _ = doctor("loops.py:cured", "--json", "--steps", "8")
    found = json.loads(out)
    assert status == 0 and found["verdict"] == "clean" and found["steps"] == 8


@pytest.mark.parametrize(
    "target, reason",
    [
        ("nowhere:factory", "No module named 'nowhere'"),
        ("nowhere.train:factory", "No module named 'nowhere'"),
        ("loops.sub:factory", "'loops' is not a package"),
        (".loops:cured", "expected MODULE:FACTORY"),
        ("needs:factory", "No module named 'absent'"),
        ("missing.py:factory", "no file"),
        ("broken:factory", "SystemExit: no data"),
        ("loops:nothing", "loops has no nothing"),
        ("loops:number", "loops has a int, not a function"),
        ("loops:module", "got Linear"),
        ("loops:fails", "the step failed: ArithmeticError: diverged"),
        ("loops", "expected MODULE:FACTORY, such as train.py:make_step, got 'loops'"),
    ],
)
def test_what_cannot_be_run_exits_2_with_the_reason(doctor, target, reason):
    status, out, err = doctor(target, "--json")
    assert status == 2 and reason in err
    assert reason in json.loads(out)["error"]
    # Where the user's own code failed, and there alone, they need to see where.
    assert ("Traceback" in err) is (
        target in ("needs:factory", "broken:factory", "loops:fails")
    )


def run_pytest(tmp_path, body, *arguments):
    (tmp_path / "test_user.py").write_text(body)
    environment = {
        **os.environ,
        "PYTHONPATH": str(PACKAGE),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # else it may be loaded twice, under two names
    }
    command = [sys.executable, "-m", "pytest", "-p", "cbn_lab.pytest_plugin", "-q", *arguments]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout


def test_the_fixture_fails_a_leak_and_passes_its_cure(tmp_path):
    body = """
import pytest, torch
import cbn_lab

@pytest.mark.parametrize("update", ["inplace", "detach"])
def test_training(assert_no_graph_leak, update):
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 2, 3), cbn_lab.LeakyBatchNorm2d(2, update=update))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    try:
        assert_no_graph_leak(net, lambda: net(torch.randn(2, 1, 5, 5)).sum().backward())
    finally:
        assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
"""
    status, out = run_pytest(tmp_path, body)
    assert status == 1 and "1 failed, 1 passed" in out and "GROWING  1.running_mean" in out


def test_the_plugin_does_not_import_torch_until_it_is_used(tmp_path):
    body = (
        "import sys\ndef test_light(assert_no_graph_leak):\n    assert 'torch' not in sys.modules\n"
    )
    status, out = run_pytest(tmp_path, body)
    assert status == 0, out
