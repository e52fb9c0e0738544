"""``cbn-lab lab``: JupyterLab at the first notebook."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
# Settings that keep JupyterLab from asking the network for news, and the user whether it may.
SETTINGS = Path(__file__).resolve().parent / "jupyter"
# Compiling takes a minute, once per machine: done while the reader reads, and giving way to all.
WARM_UP = (
    "import os; getattr(os, 'nice', int)(19); from cbn_lab.kernels.cpu.engine import warm; warm()"
)
PASSES_OPTIONS_ON = True  # --no-browser, --port and all others are JupyterLab's


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "All options go on to JupyterLab: cbn-lab lab --no-browser --port=8889"


def main(args: argparse.Namespace) -> int:
    notebooks = sorted(NOTEBOOKS.glob("[0-9]*.ipynb"))
    if not notebooks:
        print(
            f"cbn-lab lab: expected notebooks in {NOTEBOOKS}, found none; "
            "they come with a clone of the repository, not with the installed package",
            file=sys.stderr,
        )
        return 2
    command = [sys.executable, "-m", "jupyterlab", str(notebooks[0])]
    command += [f"--ServerApp.root_dir={NOTEBOOKS}"]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command.append("--allow-root")  # in a container; the server listens to this machine only
    print(f"cbn-lab: JupyterLab opens {notebooks[0].name}; Ctrl-C twice ends it", flush=True)
    paths = [str(SETTINGS), os.environ.get("JUPYTER_CONFIG_PATH", "")]
    env = dict(os.environ, JUPYTER_CONFIG_PATH=os.pathsep.join(filter(None, paths)))
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    warming = subprocess.Popen([sys.executable, "-c", WARM_UP], start_new_session=True, **quiet)
    server = subprocess.Popen([*command, *args.rest], env=env)
    try:
        while True:
            try:
                return server.wait()
            except KeyboardInterrupt:  # JupyterLab has had it too, and asks whether it is meant
                pass
    finally:
        warming.terminate()
