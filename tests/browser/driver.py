"""Drive the real JupyterLab in a real Chromium, as a user would."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from playwright.sync_api import BrowserContext, ElementHandle, Page, sync_playwright

from cbn_lab.lab import SETTINGS

TOKEN = "browser-test"
PANEL = ".jp-NotebookPanel:not(.lm-mod-hidden)"
NAMES = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome"]
PLACES = [
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    "C:/Program Files/Google/Chrome/Application/chrome.exe",
    "C:/Program Files (x86)/Google/Chrome/Application/chrome.exe",
]


def find_browser() -> str | None:
    """A Chromium or Chrome: $CHROMIUM, on the path, or where its installer puts it."""
    named = [os.environ.get("CHROMIUM"), *map(shutil.which, NAMES)]
    return next((path for path in [*named, *PLACES] if path and Path(path).exists()), None)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@contextlib.contextmanager
def lab(folder: Path, theme: str = "JupyterLab Light", root: Path | None = None) -> Iterator[str]:
    """``cbn-lab lab`` with settings of its own in ``folder``; yields the server's address.

    With a ``root`` the notebooks are those of that folder, in a JupyterLab set up the same way.
    """
    settings = {
        "apputils-extension/themes": {"theme": theme},
        # Cells out of sight stay in the page, so that their controls are found.
        "notebook-extension/tracker": {"windowingMode": "none"},
    }
    for name, values in settings.items():
        path = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(values))
    env = dict(
        os.environ,
        JUPYTER_CONFIG_DIR=str(folder / "config"),
        JUPYTER_DATA_DIR=str(folder / "data"),
        JUPYTER_RUNTIME_DIR=str(folder / "runtime"),
        JUPYTERLAB_SETTINGS_DIR=str(folder / "settings"),
        JUPYTERLAB_WORKSPACES_DIR=str(folder / "workspaces"),
        IPYTHONDIR=str(folder / "ipython"),
    )
    port = free_port()
    options = ["--no-browser", f"--port={port}", "--ServerApp.port_retries=0"]
    options += [f"--IdentityProvider.token={TOKEN}", "--expose-app-in-browser"]
    command = [sys.executable, "-m", "cbn_lab.cli", "lab"]
    if root is not None:
        command = [sys.executable, "-m", "jupyterlab", f"--ServerApp.root_dir={root}"]
        command += ["--allow-root"]
        env["JUPYTER_CONFIG_PATH"] = str(SETTINGS)
    log = folder / "lab.log"
    with log.open("w") as output:
        server = subprocess.Popen(
            [*command, *options],
            env=env,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=os.name != "nt",
        )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for_server(url, server, log)
        yield url
    finally:
        shut_down(url, server)


def wait_for_server(url: str, server: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 90
    while True:
        try:
            urllib.request.urlopen(f"{url}/api/status?token={TOKEN}", timeout=2).read()
            return
        except OSError as error:
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(log.read_text()[-3000:]) from error
            time.sleep(0.2)


def shut_down(url: str, server: subprocess.Popen) -> None:
    """Ask the server to stop itself and its kernels: a signal would reach its parent only."""
    headers = {"Authorization": f"token {TOKEN}"}
    with contextlib.suppress(OSError):
        request = urllib.request.Request(f"{url}/api/shutdown", method="POST", headers=headers)
        urllib.request.urlopen(request, timeout=5)
    try:
        server.wait(20)
    except subprocess.TimeoutExpired:
        server.kill()


@contextlib.contextmanager
def page(browser: str) -> Iterator[Page]:
    """A page in a browser of its own."""
    with context(browser) as opened, page_in(opened) as tab:
        yield tab


@contextlib.contextmanager
def context(browser: str, width: int = 1300, height: int = 950) -> Iterator[BrowserContext]:
    """A browser whose pages share a cache."""
    flags = ["--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        flags.append("--no-sandbox")  # Chromium refuses to run as root otherwise
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, headless=True, args=flags)
        yield chromium.new_context(viewport={"width": width, "height": height})
        chromium.close()


@contextlib.contextmanager
def page_in(context: BrowserContext) -> Iterator[Page]:
    """A page that collects in ``page_errors`` what its console reports as an error."""
    tab = context.new_page()
    tab.page_errors = []
    tab.on("pageerror", lambda error: tab.page_errors.append(str(error)))
    yield tab
    tab.close()


def open_notebook(tab: Page, url: str, name: str, timeout: int = 90_000) -> None:
    tab.goto(f"{url}/lab/tree/{name}?token={TOKEN}&reset", timeout=timeout)
    tab.locator("#jupyterlab-splash").wait_for(state="detached", timeout=timeout)
    tab.locator(f"{PANEL} .jp-Cell").first.wait_for(timeout=timeout)
    # The status bar says idle before there is a kernel, and Run All is then dropped silently: ask
    # the session itself.
    tab.wait_for_function(
        """() => {
            const widget = window.jupyterapp?.shell.currentWidget;
            const session = widget?.sessionContext;
            const kernel = session?.session?.kernel;
            return session?.isReady && widget.context.isReady
                && kernel?.connectionStatus === 'connected' && kernel.status === 'idle';
        }""",
        timeout=timeout,
    )


def run_all(tab: Page, timeout: int = 180_000) -> None:
    tab.locator("#jp-MainMenu li.lm-MenuBar-item", has_text="Run").first.click()
    tab.locator('.lm-Menu li[data-command="runmenu:run-all"]').click()
    wait_until_run(tab, timeout)


def wait_until_run(tab: Page, timeout: int = 180_000) -> None:
    """Every code cell has run; asks the model, which also knows the cells out of sight."""
    tab.wait_for_function(
        """() => {
            const widget = window.jupyterapp.shell.currentWidget;
            const code = widget.content.widgets.filter(
                (cell) => cell.model.type === 'code' && cell.model.sharedModel.getSource().trim());
            const waiting = code.some((cell) => cell.model.executionState === 'running'
                || cell.model.executionCount === null
                || cell.promptNode?.textContent.includes('*'));
            return !waiting && widget.sessionContext.session.kernel.status === 'idle';
        }""",
        timeout=timeout,
    )


def shut_down_kernel(tab: Page) -> None:
    tab.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.shutdown()")


def cell_errors(tab: Page) -> list[str]:
    """Tracebacks and stderr of all cells, from the model."""
    return tab.evaluate(
        """() => window.jupyterapp.shell.currentWidget.content.widgets
            .filter((cell) => cell.model.type === 'code')
            .flatMap((cell) => cell.model.outputs.toJSON())
            .filter((o) => o.output_type === 'error' || o.name === 'stderr')
            .map((o) => o.ename ? `${o.ename}: ${o.evalue}` : String(o.text))"""
    )


def execute(tab: Page, code: str) -> str:
    """Run code in the kernel of the open notebook, past its cells; what it prints."""
    return tab.evaluate(
        """async (code) => {
            const context = window.jupyterapp.shell.currentWidget.sessionContext;
            const future = context.session.kernel.requestExecute({ code, store_history: false });
            let printed = '';
            future.onIOPub = ({ content }) => {
                if (content.ename) printed += `${content.ename}: ${content.evalue}`;
                printed += content.name === 'stdout' ? content.text : '';
            };
            await future.done;
            return printed;
        }""",
        code,
    )


# Every control of the notebooks: how it is found, how it is moved, and what must change by that.
VALUE = "(element) => element.type === 'checkbox' ? String(element.checked) : element.value"
MOVES = {
    ".jupyter-widgets .noUi-handle": (
        lambda tab, control: _press(tab, control, "ArrowRight", "ArrowLeft"),
        "(element) => element.getAttribute('aria-valuenow')",
    ),
    ".cbn-explorer input[type=range]:enabled": (
        lambda tab, control: _press(tab, control, "ArrowRight", "ArrowLeft"),
        VALUE,
    ),
    ".cbn-explorer input[type=checkbox]": (lambda tab, control: control.click(), VALUE),
    ".widget-radio input[type=radio]:not(:checked)": (
        lambda tab, control: control.click(),
        "(element) => String(element.checked)",
    ),
    ".widget-text input": (lambda tab, control: _type(control, "3"), VALUE),
    ".jupyter-widgets select, .cbn-explorer select": (lambda tab, control: _choose(control), VALUE),
    ".cbn-explorer button:enabled": (lambda tab, control: control.click(), None),
}


def move_every_control(tab: Page) -> int:
    """Move each control once, by keyboard where it takes keys; the number of controls."""
    moved = 0
    for selector, (move, value) in MOVES.items():
        selector = ", ".join(f"{PANEL} {part}" for part in selector.split(", "))
        for control in tab.locator(selector).element_handles():
            if not control.is_visible():
                continue
            control.scroll_into_view_if_needed()
            before = value and control.evaluate(value)
            move(tab, control)
            wait_until_run(tab)
            assert value is None or control.evaluate(value) != before, selector
            moved += 1
    return moved


def _press(tab: Page, control: ElementHandle, key: str, other: str) -> None:
    """Press ``key``, or at the end of the slider the other one."""
    value = "(e) => e.getAttribute('aria-valuenow') ?? e.value"
    control.focus()
    before = control.evaluate(value)
    tab.keyboard.press(key)
    if control.evaluate(value) == before:
        tab.keyboard.press(other)


def _type(control: ElementHandle, text: str) -> None:
    control.fill(text)
    control.press("Enter")


def _choose(control: ElementHandle) -> None:
    control.select_option(index=(int(control.evaluate("(e) => e.selectedIndex")) + 1) % 2)
