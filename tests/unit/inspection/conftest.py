"""Models whose routers are known, and a browser to look at pages with."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.hf_modules import remote_code_in

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
INSTALL = "apt-get install chromium, or playwright install chromium"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny products wait for each other's threads where cores are busy."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def hf_modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Remote code is copied to, and imported from, a folder of the tests."""
    with remote_code_in(tmp_path_factory.mktemp("modules")):
        yield


@pytest.fixture(scope="session")
def digit_model(hf_modules: None, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of :mod:`digit_model`."""
    from digit_model import write_digit_model

    return write_digit_model(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="session")
def inspected(digit_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that an inspection of it wrote, as a checkpoint."""
    pytest.importorskip("scipy")
    pytest.importorskip("matplotlib")
    from skipmega.inspection.routers import inspect_routers, open_subject

    folder = tmp_path_factory.mktemp("inspected")
    with open_subject(digit_model.checkpoint) as subject:
        inspect_routers(
            subject, digit_model.texts, folder, max_tokens=10_000, shown_tokens=250, show_progress=False
        )
    return folder


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A headless Chromium, driven by playwright."""
    wanted = "REQUIRE_BROWSER" in os.environ
    if not wanted:
        pytest.importorskip(
            "playwright", reason="no playwright to look at pages with: pip install playwright"
        )
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        own = started.chromium.executable_path  # there if it was ever downloaded
        path = own if Path(own).exists() else next(filter(None, map(shutil.which, BROWSERS)), None)
        if path is None:
            reason = f"no Chromium to look at pages with: {INSTALL}"
            (pytest.fail if wanted else pytest.skip)(reason)
        flags = ["--no-sandbox"] if os.geteuid() == 0 else []  # for root its sandbox does not work
        launched = started.chromium.launch(executable_path=path, args=flags)
        yield launched
        launched.close()
