"""Which line of the user's code made a tensor: from a node, from a live frame, from the source."""

import ast
import inspect
import os
import re
import sys
import sysconfig
from collections.abc import Iterator
from types import CodeType, FrameType
from typing import Any

import torch
from torch import nn

# Code that acts for its caller: the line to show is the caller's.
_FOREIGN = (
    os.path.dirname(torch.__file__) + os.sep,
    os.path.dirname(__file__) + os.sep,
)
_FRAME_LINE = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')


def is_foreign(filename: str) -> bool:
    """Whether a file belongs to torch or to the diagnostics themselves."""
    return filename.startswith((*_FOREIGN, "<frozen"))


_LIBRARIES = tuple(
    os.path.join(sysconfig.get_path(kind), "") for kind in ("stdlib", "purelib", "platlib")
)


def is_library(filename: str) -> bool:
    """Whether a file is installed rather than the user's own."""
    return is_foreign(filename) or filename.startswith(_LIBRARIES)


def label(filename: str, line: int) -> str:
    """``file:line``; a notebook cell is named as in its tracebacks, ``Cell In[3]:7``."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    name = getattr(shell, "compile", None) and shell.compile.format_code_name(filename)
    return f"{' '.join(name) if name else filename}:{line}"


def of_frame(frame: FrameType | None = None) -> str | None:
    """The innermost line of the user's on the stack of ``frame``, by default of the caller."""
    frame = frame or sys._getframe(1)
    while frame is not None:
        if not is_foreign(frame.f_code.co_filename):
            return label(frame.f_code.co_filename, frame.f_lineno)
        frame = frame.f_back
    return None


def of_node(node: Any) -> str | None:
    """The line that made an autograd node, known if anomaly mode was on then."""
    for entry in reversed(node.metadata.get("traceback_") or []):
        found = _FRAME_LINE.search(entry)
        if found and not is_foreign(found["file"]):
            return label(found["file"], int(found["line"]))
    return None


def of_writes(module: nn.Module, name: str) -> str | None:
    """The line of the module's class that writes its buffer with gradients on, if it shows.

    Read from the source: the first assignment to ``self.name`` or part of it, or in-place call on
    it, outside ``__init__`` and any ``no_grad`` block.
    """
    for kind in type(module).__mro__:
        if kind is nn.Module:
            break
        for function in vars(kind).values():
            code = getattr(function, "__code__", None)
            if isinstance(code, CodeType) and code.co_name != "__init__":
                for line in _writes(code, name):
                    return label(code.co_filename, line)
    return None


def _writes(code: CodeType, name: str) -> Iterator[int]:
    if name not in code.co_names and name not in code.co_consts:
        return  # spares parsing
    try:
        lines, first = inspect.getsourcelines(code)
        tree = ast.parse(inspect.cleandoc("\n" + "".join(lines)))
    except (OSError, SyntaxError, TypeError, IndexError):
        return
    yield from (first + line - 1 for line in _lines_writing(tree, name))


def _lines_writing(tree: ast.AST, name: str) -> Iterator[int]:
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.With) and "no_grad" in ast.dump(child.items[0]):
            continue
        if any(_is_buffer(target, name) for target in _targets(child)):
            yield child.lineno
        yield from _lines_writing(child, name)


def _targets(statement: ast.AST) -> list[ast.AST]:
    """What a statement or a call writes to."""
    if isinstance(statement, ast.Assign):
        return [t for one in statement.targets for t in getattr(one, "elts", [one])]
    if isinstance(statement, (ast.AugAssign, ast.AnnAssign)):
        return [statement.target]
    if not isinstance(statement, ast.Call):
        return []
    called = statement.func
    if isinstance(called, ast.Name) and called.id == "setattr":
        return [ast.Subscript(*statement.args[:2])]
    if isinstance(called, ast.Attribute) and called.attr == "register_buffer":
        return [ast.Subscript(called.value, statement.args[0])]
    in_place = isinstance(called, ast.Attribute) and re.fullmatch(r"[a-z]\w*[a-z]_", called.attr)
    return [called.value] if in_place else []


def _is_buffer(target: ast.AST, name: str) -> bool:
    """Whether ``target`` is ``self.name``, a part of it, or ``(self, "name")``."""
    while True:
        if isinstance(target, ast.Attribute) and target.attr == name:
            return True
        if isinstance(target, ast.Subscript) and getattr(target.slice, "value", None) == name:
            return True
        if isinstance(target, ast.Call):
            target = target.func
        if not isinstance(target, (ast.Attribute, ast.Subscript)):
            return False
        target = target.value
