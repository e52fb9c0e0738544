"""Make the notebooks: percent scripts in this folder -> executed .ipynb in the folder above.

python3 start.py notebooks            all of them
python3 start.py notebooks 01 03      those whose names start so
"""

import sys
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

SOURCE = Path(__file__).resolve().parent
NOTEBOOKS = SOURCE.parent
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"


def read(source: Path) -> nbformat.NotebookNode:
    """The notebook that a percent script stands for, not yet executed.

    Cells are named by their position, so that building twice gives the same file.
    """
    notebook = jupytext.read(source, fmt="py:percent")
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {
                "name": "python3",
                "display_name": "Python 3 (ipykernel)",
                "language": "python",
            },
            "language_info": {"name": "python"},
        }
    )
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for index, cell in enumerate(notebook.cells):
        cell.id = f"{source.stem[:2]}-{index:03d}"
    return notebook


def execute(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Run it, and keep what a page without a kernel can show.

    A widget saved without its state opens as "model not found", and with its state does not open
    on GitHub: so a widget is left out, and what it shows stands beside it as a plain figure.
    """
    client = NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(NOTEBOOKS)}},
        record_timing=False,
        coalesce_streams=True,
    )
    client.execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if WIDGET_VIEW not in o.get("data", {})]
    notebook.metadata.pop("widgets", None)
    notebook.metadata["language_info"] = {"name": "python"}  # without the version of this Python
    return notebook


def main() -> int:
    wanted = tuple(sys.argv[1:])
    for source in sorted(SOURCE.glob("[0-9]*.py")):
        if wanted and not source.name.startswith(wanted):
            continue
        start = time.perf_counter()
        notebook = execute(read(source))
        nbformat.validate(notebook)
        nbformat.write(notebook, NOTEBOOKS / f"{source.stem}.ipynb")
        print(f"{source.stem}: executed in {time.perf_counter() - start:.1f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
