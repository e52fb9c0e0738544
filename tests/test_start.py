"""start.py without installing anything: what it reads, decides and says."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def start(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("start", ROOT / "start.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(module, "STAMP", tmp_path / "stamp")
    return module


@pytest.fixture
def calls(start, monkeypatch):
    """Replaces the subprocess: records the commands, answers with ``calls.answer``."""

    class Calls(list):
        answer = subprocess.CompletedProcess([], 0, stdout="", stderr="")

    calls = Calls()

    def run(*command, **options):
        calls.append([str(part) for part in command])
        return calls.answer

    monkeypatch.setattr(start, "run", run)
    return calls


def answer(stdout: str, returncode: int = 0) -> subprocess.CompletedProcess:
    return subprocess.CompletedProcess([], returncode, stdout=stdout, stderr="")


def test_pip_settings_are_read_and_the_environment_has_the_last_word(start, calls):
    calls.answer = answer(
        ":env:.find-links='/from/env'\n"
        "global.find-links='/from/file'\n"
        "global.extra-index-url='https://a.example/simple https://b.example/simple'\n"
    )
    assert start.pip_settings() == {
        "find-links": "/from/env",
        "extra-index-url": "https://a.example/simple https://b.example/simple",
    }


def test_uv_is_told_where_pip_looks(start, calls, monkeypatch):
    monkeypatch.delenv("UV_FIND_LINKS", raising=False)
    monkeypatch.delenv("UV_INDEX", raising=False)
    calls.answer = answer(
        "global.find-links='/one /two'\nglobal.extra-index-url='https://a.example/simple'\n"
    )
    env = start.uv_environment()
    assert env["UV_FIND_LINKS"] == "/one,/two"
    assert env["UV_INDEX"] == "https://a.example/simple"


def test_a_setting_of_uv_itself_is_left_alone(start, calls, monkeypatch):
    monkeypatch.setenv("UV_FIND_LINKS", "/mine")
    calls.answer = answer("global.find-links='/pips'\n")
    assert start.uv_environment()["UV_FIND_LINKS"] == "/mine"


def test_cuda_packages_are_never_installed_by_surprise(start, calls, monkeypatch):
    monkeypatch.setattr(start.sys, "platform", "linux")
    monkeypatch.setattr(start, "reachable", lambda url: False)
    calls.answer = answer("Would install nvidia-cublas-13.1 torch-2.13.0")
    with pytest.raises(SystemExit, match="--cuda"):
        start.install_torch(["pip", "install"], {}, is_uv=False, cuda=False)
    assert len(calls) == 1 and "--dry-run" in calls[0]


def test_torch_comes_from_pips_own_places_where_it_brings_no_cuda(start, calls, monkeypatch):
    monkeypatch.setattr(start.sys, "platform", "linux")
    monkeypatch.setattr(start, "reachable", lambda url: False)
    calls.answer = answer("Would install torch-2.13.0+cpu")
    start.install_torch(["pip", "install"], {}, is_uv=False, cuda=False)
    assert calls[1] == ["pip", "install", *start.CONSTRAINTS, "torch"]


@pytest.mark.parametrize(
    "is_uv, expected",
    [(True, ["--torch-backend", "cpu"]), (False, ["--index-url", "<cpu index>"])],
)
def test_a_reachable_index_of_cpu_builds_is_used(start, calls, monkeypatch, is_uv, expected):
    monkeypatch.setattr(start.sys, "platform", "linux")
    monkeypatch.setattr(start, "reachable", lambda url: True)
    start.install_torch(["pip", "install"], {}, is_uv=is_uv, cuda=False)
    expected = [start.CPU_INDEX if part == "<cpu index>" else part for part in expected]
    assert calls == [["pip", "install", *start.CONSTRAINTS, "torch", *expected]]


def test_a_failed_installation_says_so_and_is_not_taken_for_done(start, calls, monkeypatch):
    monkeypatch.setattr(start, "installer", lambda: (["pip", "install"], {}, False))
    monkeypatch.setattr(start.venv, "create", lambda *args, **options: None)
    calls.answer = answer("", returncode=1)
    with pytest.raises(SystemExit, match="could not be installed"):
        start.set_up("", cuda=False)
    assert start.STAMP.read_text() == ""  # ours, but not complete: the next start begins anew


def test_a_second_start_installs_nothing_and_tests_add_their_extra(start, calls, monkeypatch):
    monkeypatch.setattr(start, "installer", lambda: (["pip", "install"], {}, False))
    monkeypatch.setattr(start, "PYTHON", Path(sys.executable))
    monkeypatch.setattr(start.venv, "create", lambda *args, **options: None)
    start.set_up("", cuda=False)
    calls.clear()
    start.set_up("", cuda=False)
    assert calls == []
    start.set_up("test", cuda=False)
    assert calls[-1][-1] == f"{start.ROOT}[test]"
    calls.clear()
    start.set_up("", cuda=False)  # what the tests need includes what the lab needs
    start.set_up("test", cuda=False)
    assert calls == []


@pytest.mark.parametrize(
    "words, expected",
    [
        (["test"], ["-m", "pytest", "-n", "2"]),  # all tests share two cores
        (["test", "-x", "tests"], ["-m", "pytest", "-x", "tests"]),
        ([], ["-m", "cbn_lab.cli", "lab"]),
        (["--no-browser"], ["-m", "cbn_lab.cli", "lab", "--no-browser"]),
    ],
)
def test_words_become_a_command_whose_status_is_handed_on(start, monkeypatch, words, expected):
    commands = []

    class Child:
        def __init__(self, command, **_):
            commands.append(command)

        def wait(self):
            return 3

    monkeypatch.setattr(start, "set_up", lambda extra, cuda: None)
    monkeypatch.setattr(start.subprocess, "Popen", Child)
    monkeypatch.setattr(start.sys, "argv", ["start.py", *words])
    assert start.main() == 3
    assert commands == [[str(start.PYTHON), *expected]]


def test_an_unknown_word_is_named(start, monkeypatch):
    monkeypatch.setattr(start.sys, "argv", ["start.py", "tset"])
    with pytest.raises(SystemExit, match="lab, test, notebooks, got 'tset'"):
        start.main()


def test_an_old_python_is_told_so(start, monkeypatch):
    monkeypatch.setattr(start.sys, "version_info", (3, 9, 1))
    with pytest.raises(SystemExit, match=r"Python 3\.10 or newer"):
        start.main()


def test_a_venv_of_the_users_own_is_not_deleted(start, calls):
    start.VENV.mkdir()
    (start.VENV / "precious").touch()
    with pytest.raises(SystemExit, match="has not made"):
        start.set_up("", cuda=False)
    assert (start.VENV / "precious").exists() and calls == []
