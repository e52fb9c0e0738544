import os

import pytest

from browser import driver


@pytest.fixture(scope="session")
def browser() -> str:
    path = driver.find_browser()
    if path is None:
        reason = "no Chromium or Chrome found; install one or set $CHROMIUM to its path"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return path


@pytest.fixture(scope="session")
def lab(tmp_path_factory, browser) -> str:
    with driver.lab(tmp_path_factory.mktemp("lab")) as url:
        yield url
