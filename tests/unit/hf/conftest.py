"""No test here may reach for the network, nor write into the user's Hugging Face cache."""

import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(autouse=True)
def private_module_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Remote code is copied to, and imported from, a folder of the test."""
    cache = tmp_path / "modules"
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(cache))
    monkeypatch.syspath_prepend(str(cache))
