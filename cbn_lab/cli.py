"""The command ``cbn-lab``."""

import argparse
import importlib
import sys
from collections.abc import Sequence

# name: (module with add_arguments(parser) and main(args) -> exit status, one line of help)
COMMANDS = {
    "lab": ("cbn_lab.lab", "open JupyterLab at the first notebook"),
    "doctor": ("cbn_lab.diagnostics.doctor", "say what makes a training step's memory grow"),
    "bench": ("cbn_lab.bench", "time every complex batch norm at hand against two stock ones"),
}


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        prog="cbn-lab", description="Batch normalisation in PyTorch, taken apart."
    )
    subparsers = parser.add_subparsers(dest="command", required=True)
    for name, (module, text) in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=text, description=text)
        # Only the command that was asked for is imported: `lab` need not wait for torch.
        if argv[:1] == [name]:
            importlib.import_module(module).add_arguments(subparser)
    args, rest = parser.parse_known_args(argv)
    module = importlib.import_module(COMMANDS[args.command][0])
    if rest and not getattr(module, "PASSES_OPTIONS_ON", False):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.rest = rest
    return module.main(args)


if __name__ == "__main__":
    sys.exit(main())
