"""``cbn-lab doctor MODULE:FACTORY``: a diagnosis from the command line, for people and for CI."""

import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from cbn_lab.diagnostics.diagnose import LEAST_STEPS, diagnose

FINE, GROWING, COULD_NOT_RUN = 0, 1, 2


class CannotRun(Exception):
    """There is nothing to diagnose; the message says why."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "exit status: 0 nothing grows, 1 something grows at every step, 2 it could not be run"
    )
    parser.add_argument(
        "target",
        metavar="MODULE:FACTORY",
        help="a dotted module or a path to a .py file, and a function in it that takes nothing "
        "and returns a training step, or a tuple of the step and the objects to look at",
    )
    parser.add_argument("--steps", type=int, default=12, help="how often to run the step (12)")
    parser.add_argument("--json", action="store_true", help="write the diagnosis as JSON")


def main(args: argparse.Namespace) -> int:
    """Print the diagnosis; the exit status. What the step itself prints goes to stderr."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            if args.steps < LEAST_STEPS:
                raise CannotRun(f"expected --steps of at least {LEAST_STEPS}, got {args.steps}")
            step, objects = _built(_load(args.target), args.target)
            diagnosis = _attempt(
                "the step failed", lambda: diagnose(step, *objects, steps=args.steps, restore=False)
            )
    except CannotRun as reason:
        print(f"cbn-lab doctor: {reason}", file=sys.stderr)
        if args.json:
            print(json.dumps({"verdict": None, "error": str(reason)}))
        return COULD_NOT_RUN
    print(json.dumps(diagnosis.to_dict(), indent=2) if args.json else diagnosis)
    return GROWING if diagnosis.verdict == "growing" else FINE


def _load(target: str) -> Callable[[], Any]:
    """The factory that ``target`` names."""
    module_name, colon, factory_name = target.rpartition(":")
    if not (colon and module_name and factory_name) or module_name.startswith("."):
        raise CannotRun(
            f"expected MODULE:FACTORY, such as train.py:make_step, got {target!r}; FACTORY is a "
            "function of yours that returns a training step, itself a function without arguments"
        )
    module = _attempt(f"cannot import {module_name}", lambda: _import(module_name))
    factory = getattr(module, factory_name, None)
    if not callable(factory):
        what = "has no" if factory is None else f"has a {type(factory).__name__}, not a function,"
        raise CannotRun(f"{module_name} {what} {factory_name}")
    return factory


def _import(name: str) -> Any:
    if not name.endswith(".py"):
        sys.path.insert(0, os.getcwd())
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if f"{name}.".startswith(f"{error.name}."):  # itself, not what it imports
                raise CannotRun(f"cannot import {name}: {error}") from None
            raise
    path = Path(name).resolve()
    if not path.is_file():
        raise CannotRun(f"cannot import {name}: no file {path}")
    sys.path.insert(0, str(path.parent))  # its neighbours can be imported, as when it is run
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def _built(factory: Callable[[], Any], target: str) -> tuple[Callable[[], Any], tuple]:
    """What the factory returned, as a step and the objects to look at."""
    made = _attempt(f"{target} failed", factory)
    step, objects = (made[0], tuple(made[1:])) if isinstance(made, tuple) and made else (made, ())
    if isinstance(step, nn.Module) or not callable(step):
        raise CannotRun(
            f"expected {target} to return a step (a function without arguments), or a tuple of a "
            f"step and its objects, got {type(step).__name__}"
        )
    return step, objects


def _attempt(what: str, action: Callable[[], Any]) -> Any:
    """Run the user's code; whatever it raises, short of Ctrl-C, is shown and becomes a reason."""
    try:
        return action()
    except (KeyboardInterrupt, CannotRun):
        raise
    except BaseException as error:  # sys.exit() in a script included
        traceback.print_exc()
        raise CannotRun(f"{what}: {type(error).__name__}: {error}") from error
