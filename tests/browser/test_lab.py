"""The path of a new user: JupyterLab, a notebook, run all, move every control."""

from pathlib import Path

import pytest

from browser import driver

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("[0-9]*.ipynb"))


@pytest.fixture(scope="module")
def context(browser):
    with driver.context(browser) as opened:
        yield opened


@pytest.fixture(scope="module")
def tab(lab, context, request):
    """A notebook, opened and run, in a page and a kernel of its own."""
    with driver.page_in(context) as page:
        driver.open_notebook(page, lab, request.param.name)
        driver.run_all(page)
        yield page
        driver.shut_down_kernel(page)


@pytest.mark.parametrize("tab", NOTEBOOKS[:1], indirect=True, ids=lambda path: path.stem)
def test_the_momentum_slider_redraws_its_picture(tab):
    explorer = tab.locator(f"{driver.PANEL} .cbn-explorer").first
    explorer.scroll_into_view_if_needed()
    slider = explorer.locator('input[data-trait="momentum"]')
    drawing, caption = explorer.locator(".cbn-drawing"), explorer.locator(".cbn-caption")
    before = drawing.inner_html(), caption.inner_text(), float(slider.input_value())
    slider.focus()
    for _ in range(10):
        tab.keyboard.press("ArrowRight")
    assert float(slider.input_value()) == pytest.approx(before[2] + 0.1)
    assert drawing.inner_html() != before[0]
    assert caption.inner_text() != before[1]
    assert driver.cell_errors(tab) == []
    assert tab.page_errors == []


@pytest.mark.parametrize("tab", NOTEBOOKS, indirect=True, ids=lambda path: path.stem)
def test_the_notebook_runs_and_every_control_moves_without_an_error(tab):
    assert driver.cell_errors(tab) == []
    assert driver.move_every_control(tab) >= 1
    driver.wait_until_run(tab)
    assert driver.cell_errors(tab) == []
    assert tab.page_errors == []
