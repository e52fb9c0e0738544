import subprocess
import sys

from cbn_lab import cli, lab


def test_lab_opens_the_first_notebook_and_passes_options_on(monkeypatch, capsys):
    commands = []

    class Child:
        interrupts = [KeyboardInterrupt]  # one Ctrl-C: JupyterLab has it too, and decides

        def __init__(self, command, **_):
            commands.append(command)

        def wait(self):
            if self.interrupts:
                raise self.interrupts.pop()
            return 0

        def terminate(self):
            commands.append("terminated")

    monkeypatch.setattr(lab.subprocess, "Popen", Child)
    assert cli.main(["lab", "--no-browser", "--port=9999"]) == 0
    warming, command, end = commands
    assert warming == [sys.executable, "-c", lab.WARM_UP] and end == "terminated"
    assert command[:3] == [sys.executable, "-m", "jupyterlab"]
    assert command[3] == str(lab.NOTEBOOKS / "01_running_mean.ipynb")
    assert command[-2:] == ["--no-browser", "--port=9999"]
    assert "01_running_mean.ipynb" in capsys.readouterr().out


def test_lab_without_notebooks_says_where_they_come_from(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(lab, "NOTEBOOKS", tmp_path)
    assert cli.main(["lab"]) == 2
    assert "clone of the repository" in capsys.readouterr().err


def test_help_does_not_wait_for_torch():
    code = (
        "import sys; from cbn_lab import cli\ntry: cli.main(['--help'])\nexcept SystemExit: pass\n"
    )
    code += "print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "open JupyterLab" in out.stdout
    assert out.stdout.splitlines()[-1] == "False"
