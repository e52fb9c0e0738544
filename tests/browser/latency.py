"""How soon a picture follows a key, in a real JupyterLab: python tests/browser/latency.py

For each explorer: milliseconds from a key press, as the browser stamps it, to the end of the first
frame that has the new picture; and in how many frames of 20 presses, one in 33 ms on average as a
held key repeats, the picture was new. The presses are not evenly spaced: 33 ms is two frames of the
screen, so even ones would all meet it at the same point between two frames.
"""

import random
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nbformat
from playwright.sync_api import Locator, Page

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also run as a script
from browser import driver

EXPLORERS = ["MomentumExplorer", "WhiteningExplorer", "LeakExplorer"]
SLIDERS = {"MomentumExplorer": "momentum", "WhiteningExplorer": "rr", "LeakExplorer": "step"}
PRESSES = 20
ROUNDS = 24  # of the benchmark: where in a frame a press falls is chance, so few say little
PAUSES = [25 + 7 * k % 17 for k in range(PRESSES)]  # ms

# A frame is new where the picture changed since the frame before. What a frame took is known in
# the task after it: the browser paints between the callback and that task.
WATCH = """(explorer) => {
    window.watch?.stop();
    const watch = { latencies: [], frames: 0, changed: false, pressed: null };
    window.watch = watch;
    const onKey = (event) => (watch.pressed = event.timeStamp);
    explorer.addEventListener('keydown', onKey, true);
    const channel = new MessageChannel();
    let stamp = null;
    channel.port1.onmessage = () => {
        if (stamp !== null) watch.latencies.push(performance.now() - stamp);
        stamp = null;
    };
    const frame = () => {
        if (watch.changed) {
            watch.frames += 1;
            [stamp, watch.pressed] = [watch.pressed, null];
            channel.port2.postMessage(null);
        }
        watch.changed = false;
        request = requestAnimationFrame(frame);
    };
    const observer = new MutationObserver(() => (watch.changed = true));
    for (const svg of explorer.querySelectorAll('.cbn-drawing')) {
        observer.observe(svg, { subtree: true, childList: true, attributes: true });
    }
    let request = requestAnimationFrame(frame);
    watch.stop = () => {
        cancelAnimationFrame(request);
        observer.disconnect();
        explorer.removeEventListener('keydown', onKey, true);
    };
}"""


def write_notebook(folder: Path, *cells: str) -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    notebook.metadata.kernelspec = {
        "name": "python3",
        "display_name": "Python 3 (ipykernel)",
        "language": "python",
    }
    nbformat.write(notebook, folder / "explorers.ipynb")


@contextmanager
def opened(browser: str, folder: Path, *cells: str) -> Iterator[Page]:
    """A page with a notebook of these cells, run."""
    root = folder / "notebooks"
    root.mkdir()
    write_notebook(root, *cells)
    with driver.lab(folder, root=root) as url, driver.page(browser) as tab:
        driver.open_notebook(tab, url, "explorers.ipynb")
        driver.run_all(tab)
        yield tab


def measure(tab: Page, explorer: Locator, name: str) -> tuple[list[float], int]:
    """Latency of each press, and frames with a new picture, for one slider of an explorer."""
    slider = explorer.locator(f'input[data-trait="{name}"]')
    slider.scroll_into_view_if_needed()
    slider.focus()
    for key in ("Home", "ArrowRight", "ArrowRight"):  # the first ones warm the code up
        tab.keyboard.press(key)
        tab.wait_for_timeout(200)
    explorer.evaluate(WATCH)
    tab.wait_for_timeout(random.uniform(0, 17))
    for pause in PAUSES:
        tab.keyboard.press("ArrowRight")
        tab.wait_for_timeout(pause)
    tab.wait_for_timeout(300)
    watch = tab.evaluate("({ latencies: watch.latencies, frames: watch.frames })")
    return watch["latencies"], watch["frames"]


def main() -> int:
    browser = driver.find_browser()
    cells = [f"import cbn_lab\ncbn_lab.{name}()" for name in EXPLORERS]
    print(f"{'explorer':20}{'median ms':>10}{'p90 ms':>10}{'frames of 20':>14}")
    with tempfile.TemporaryDirectory() as folder, opened(browser, Path(folder), *cells) as tab:
        for k, name in enumerate(EXPLORERS):
            explorer = tab.locator(".cbn-explorer").nth(k)
            rounds = [measure(tab, explorer, SLIDERS[name]) for _ in range(ROUNDS)]
            latencies = [value for found, _ in rounds for value in found]
            frames = min(frames for _, frames in rounds)
            p90 = statistics.quantiles(latencies, n=10)[-1]
            print(f"{name:20}{statistics.median(latencies):10.1f}{p90:10.1f}{frames:14}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
