"""The notebooks as a course: their exercises, the solutions folded away, and solved copies."""

import importlib.util
import linecache
import re
from pathlib import Path

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
SOURCES = sorted((NOTEBOOKS / "source").glob("[0-9]*.py"))
FENCE = re.compile(r"```python\n(.*?)```", re.DOTALL)
CHECK = re.compile(r'^check\("([^"]+)", (\w+)\)', re.MULTILINE)


def builder():
    path = NOTEBOOKS / "source" / "build.py"
    spec = importlib.util.spec_from_file_location("build", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def solutions(notebook) -> dict[str, str]:
    """{exercise: code}, from the folded cells: the only place where a solution stands."""
    return {
        cell.metadata["solution"]: FENCE.search(cell.source).group(1)
        for cell in notebook.cells
        if "solution" in cell.metadata
    }


def stubs(notebook) -> dict[str, str]:
    return {
        cell.metadata["exercise"]: cell.source
        for cell in notebook.cells
        if "exercise" in cell.metadata
    }


def checked(notebook) -> dict[str, str]:
    """{exercise: the variable that its check is given}."""
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    return dict(CHECK.findall(code))


def solved(notebook):
    """The notebook with each stub replaced by its solution."""
    answers = solutions(notebook)
    for cell in notebook.cells:
        if "exercise" in cell.metadata:
            cell.source = answers[cell.metadata["exercise"]]
    return notebook


def run_code(code: str, namespace: dict, name: str) -> None:
    """Execute like a cell: an error in it can be traced to its line."""
    filename = f"<{name}>"
    linecache.cache[filename] = (len(code), None, code.splitlines(True), filename)
    exec(compile(code, filename, "exec"), namespace)


def run_in_process(notebook, inspect_check) -> None:
    """Run all cells in one namespace; each ``check(...)`` goes through ``inspect_check``.

    Much cheaper than a kernel each; that the cells run in a kernel, nbval has shown.
    """
    namespace = {"__name__": "__main__"}
    for index, cell in enumerate(c for c in notebook.cells if c.cell_type == "code"):
        run_code(cell.source, namespace, f"cell {index}")
        if "check" in namespace:
            namespace["check"] = inspect_check
