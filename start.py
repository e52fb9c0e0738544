#!/usr/bin/env python3
"""Set up cbn_lab in .venv and open it. Needs Python 3.10 or newer and nothing else.

    python3 start.py                 open JupyterLab at the first notebook
    python3 start.py test            run all tests, notebooks included
    python3 start.py notebooks       rebuild and execute the notebooks from their sources

What follows the word goes on to JupyterLab, pytest or the builder: start.py lab --no-browser.
With --cuda first, torch may bring CUDA packages (gigabytes) where no NVIDIA GPU was found.
"""

from __future__ import annotations  # so that an old Python gets as far as the message in main

import ast
import hashlib
import os
import shutil
import subprocess
import sys
import urllib.request
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
STAMP = VENV / "cbn_lab-is-set-up"
CONSTRAINTS = ["--constraint", str(ROOT / "constraints.txt")]
CPU_INDEX = "https://download.pytorch.org/whl/cpu"  # PyTorch's own index of CPU builds
COMMANDS = {  # word: (the extra it needs, what it runs)
    "lab": ("", ["-m", "cbn_lab.cli", "lab"]),
    "test": ("test", ["-m", "pytest"]),
    "notebooks": ("test", [str(ROOT / "notebooks" / "source" / "build.py")]),
}


def say(text: str) -> None:
    print(f"start: {text}", flush=True)


def run(*command: object, **options) -> subprocess.CompletedProcess:
    return subprocess.run([str(part) for part in command], cwd=ROOT, **options)


def pip_settings() -> dict[str, str]:
    """pip's configuration, files and environment together: {'find-links': '/wheels', ...}."""
    lines = run(PYTHON, "-m", "pip", "config", "list", capture_output=True, text=True).stdout
    pairs = [line.split("=", 1) for line in lines.splitlines() if "=" in line]
    pairs.sort(key=lambda pair: pair[0].startswith(":env:"))  # the environment has the last word
    return {key.rsplit(".", 1)[1]: str(ast.literal_eval(value)) for key, value in pairs}


def uv_environment() -> dict[str, str]:
    """uv reads none of pip's settings, so hand on those that say where packages come from."""
    settings, env = pip_settings(), dict(os.environ)
    for name, separator, key in [
        ("UV_FIND_LINKS", ",", "find-links"),
        ("UV_DEFAULT_INDEX", " ", "index-url"),
        ("UV_INDEX", " ", "extra-index-url"),
        ("SSL_CERT_FILE", " ", "cert"),
    ]:
        if key in settings:
            env.setdefault(name, separator.join(settings[key].split()))
    env.setdefault("UV_INDEX_STRATEGY", "unsafe-best-match")  # as pip: the best of all indexes
    return env


def installer() -> tuple[list[str], dict[str, str], bool]:
    """The command that installs into .venv, its environment, and whether it is uv."""
    uv = shutil.which("uv")
    if not uv:
        say("getting uv, which installs faster than pip")
        quiet = ["-q", "--disable-pip-version-check"]
        got = run(PYTHON, "-m", "pip", "install", *quiet, "uv", stderr=subprocess.DEVNULL)
        uv = shutil.which("uv", path=str(PYTHON.parent)) if got.returncode == 0 else None
    if uv:
        return [uv, "pip", "install", "--python", str(PYTHON)], uv_environment(), True
    say("uv is not to be had here: installing with pip, which takes some minutes")
    return [str(PYTHON), "-m", "pip", "install"], dict(os.environ), False


def reachable(url: str) -> bool:
    try:
        with urllib.request.urlopen(url + "/torch/", timeout=4):
            return True
    except OSError:
        return False


def install_torch(pip: list[str], env: dict[str, str], is_uv: bool, cuda: bool) -> None:
    """torch before all else, and never CUDA packages by surprise."""
    command = [*pip, *CONSTRAINTS, "torch"]
    if sys.platform == "darwin":
        say("installing torch")
    elif cuda:
        say("installing torch with CUDA, which is several gigabytes")
        if is_uv and reachable(CPU_INDEX):
            command += ["--torch-backend", "auto"]  # the CUDA version that the driver can run
    elif reachable(CPU_INDEX):
        say("installing torch, CPU build")
        command += ["--torch-backend", "cpu"] if is_uv else ["--index-url", CPU_INDEX]
    else:
        say("installing torch from where pip is configured to look")
        plan = run(*command, "--dry-run", env=env, capture_output=True, text=True)
        brings = plan.stdout + plan.stderr
        if plan.returncode == 0 and "nvidia-" in brings:
            sys.exit(
                "start: this would download gigabytes of CUDA packages, and no NVIDIA GPU was "
                f"found.\nEither make {CPU_INDEX} reachable, or accept them: "
                f"{sys.executable} start.py --cuda"
            )
    if run(*command, env=env).returncode:
        sys.exit("start: torch could not be installed; the lines above say why")


def set_up(extra: str, cuda: bool) -> None:
    """Make .venv hold this checkout and ``extra``; a stamp tells when there is nothing to do."""
    place = (
        f"{ROOT} {sys.version.split()[0]}"  # a .venv that was moved or has another Python is void
    )
    lists = (ROOT / "pyproject.toml").read_bytes() + (ROOT / "constraints.txt").read_bytes()
    digest = hashlib.sha256(lists).hexdigest()
    done = STAMP.read_text().splitlines() if STAMP.exists() else []
    if done[:2] == [place, digest] and (not extra or extra in done):
        return
    if not (PYTHON.exists() and done[:1] == [place]):
        if VENV.exists() and not STAMP.exists():
            sys.exit("start: .venv is there, and this script has not made it; move it away")
        say("making .venv")
        try:
            venv.create(VENV, clear=True, with_pip=True, symlinks=os.name != "nt")
        except subprocess.CalledProcessError:
            shutil.rmtree(VENV, ignore_errors=True)
            sys.exit("start: Python's venv is incomplete here (Debian: apt install python3-venv)")
        STAMP.write_text("")  # ours, and not yet complete
    pip, env, is_uv = installer()
    install_torch(pip, env, is_uv, cuda or bool(shutil.which("nvidia-smi")))
    say("installing the kit" + (" and its tests" if extra else ""))
    target = f"{ROOT}[{extra}]" if extra else str(ROOT)
    if run(*pip, *CONSTRAINTS, "--editable", target, env=env).returncode:
        sys.exit("start: the kit could not be installed; the lines above say why")
    STAMP.write_text("\n".join([place, digest, extra]))


def main() -> int:
    if sys.version_info < (3, 10):
        sys.exit(f"start: Python 3.10 or newer is needed, this is {sys.version.split()[0]}")
    words = sys.argv[1:]
    cuda = words[:1] == ["--cuda"]
    words = words[cuda:]
    if words[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    name = words.pop(0) if words and not words[0].startswith("-") else "lab"
    if name not in COMMANDS:
        sys.exit(f"start: expected one of {', '.join(COMMANDS)}, got {name!r}")
    extra, command = COMMANDS[name]
    if name == "test" and not words:
        words = ["-n", "2"]  # all tests, in two processes; conftest.py shares them out
    set_up(extra, cuda)
    child = subprocess.Popen([str(PYTHON), *command, *words], cwd=ROOT)
    while True:
        try:
            return child.wait()
        except KeyboardInterrupt:  # the child has had it too, and decides
            pass


if __name__ == "__main__":
    sys.exit(main())
