"""The path of a new user: JupyterLab, a notebook, run all, move the controls."""

from pathlib import Path

import pytest

from browser import driver

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("[0-9]*.ipynb"))


def test_the_momentum_slider_redraws_its_picture(lab, tab):
    driver.open_notebook(tab, lab, "01_running_mean.ipynb")
    driver.run_all(tab)
    assert driver.cell_errors(tab) == []

    handle = driver.sliders(tab).first
    handle.scroll_into_view_if_needed()
    picture = tab.locator(f"{driver.PANEL} .jupyter-widgets img").last
    picture.wait_for()
    before, value = picture.get_attribute("src"), driver.readout(tab)
    handle.focus()
    for _ in range(10):
        tab.keyboard.press("ArrowRight")
    tab.wait_for_function(
        "([selector, old]) => { const all = document.querySelectorAll(selector);"
        " return all.length && all[all.length - 1].src !== old; }",
        arg=[f"{driver.PANEL} .jupyter-widgets img", before],
        timeout=30_000,
    )
    assert float(value) == pytest.approx(0.10)
    assert float(driver.readout(tab)) == pytest.approx(0.20)
    assert driver.cell_errors(tab) == []
    assert tab.page_errors == []


@pytest.mark.parametrize("path", NOTEBOOKS[1:], ids=lambda path: path.stem)
def test_the_notebook_runs_and_its_sliders_move_without_an_error(lab, tab, path):
    driver.open_notebook(tab, lab, path.name)
    driver.run_all(tab)
    assert driver.cell_errors(tab) == []
    handles = driver.sliders(tab)
    for index in range(handles.count()):
        handles.nth(index).scroll_into_view_if_needed()
        before = driver.readout(tab, index)
        handles.nth(index).focus()
        tab.keyboard.press("ArrowRight")
        driver.wait_until_run(tab)
        assert driver.readout(tab, index) != before
    assert driver.cell_errors(tab) == []
    assert tab.page_errors == []
