"""What a committed notebook must be; that its cells run, nbval tests."""

import importlib.util
import json
import re
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
SOURCES = sorted((NOTEBOOKS / "source").glob("[0-9]*.py"))
PATHS = sorted(NOTEBOOKS.glob("[0-9]*.ipynb"))


@pytest.fixture(scope="module")
def build():
    spec = importlib.util.spec_from_file_location("build", NOTEBOOKS / "source" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def code_cells(path: Path) -> list[dict]:
    return [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]


def test_every_source_has_its_notebook_and_no_notebook_is_without():
    assert [path.stem for path in PATHS] == [path.stem for path in SOURCES] != []


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_the_notebook_is_in_step_with_its_source(source, build):
    expected = build.read(source)
    committed = nbformat.read(NOTEBOOKS / f"{source.stem}.ipynb", as_version=4)

    def content(notebook):
        return [(c.cell_type, c.source, c.metadata.get("tags")) for c in notebook.cells]

    assert content(committed) == content(expected), "run: python3 start.py notebooks"


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_it_is_executed_from_top_to_bottom_without_an_error(path):
    cells = code_cells(path)
    # nbval compares nothing where the execution count is missing.
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_its_numbers_are_checked(path):
    checked = [c for c in code_cells(path) if "nbval-check-output" in c.metadata.get("tags", [])]
    assert len(checked) >= 3
    for cell in checked:
        assert any(output.get("text", "").strip() for output in cell.outputs), cell.source


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_it_carries_no_widget_state_and_no_trace_of_a_machine(path):
    text = path.read_text(encoding="utf-8")
    notebook = json.loads(text)
    assert "widgets" not in notebook["metadata"]
    assert "widget-view" not in text
    assert not re.search(r"(/home/|/root/|/tmp/|/Users/|[A-Z]:\\\\|site-packages|ipykernel_)", text)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_cell_fits_on_a_screen(path):
    assert max(len(cell.source.splitlines()) for cell in code_cells(path)) <= 25


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_it_has_a_picture_that_shows_without_a_kernel(path):
    images = [o for c in code_cells(path) for o in c.outputs if "image/png" in o.get("data", {})]
    assert images
