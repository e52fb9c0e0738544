"""``cbn-lab lab``: JupyterLab at the first notebook."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
NO_NETWORK = [  # JupyterLab asks the network for news and updates, and the user whether it may
    "--LabApp.news_url=None",
    "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
]


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
    command += [f"--ServerApp.root_dir={NOTEBOOKS}", *NO_NETWORK]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command.append("--allow-root")  # in a container; the server listens to this machine only
    print(f"cbn-lab: JupyterLab opens {notebooks[0].name}; Ctrl-C twice ends it", flush=True)
    return subprocess.call([*command, *args.rest])
