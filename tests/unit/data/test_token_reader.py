"""Tokens from files on disks that fail, for a while or for good."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skipmega.data.pairs import token_reader
from skipmega.data.pairs.token_reader import TokenReader
from skipmega.errors import DataFaultError

TOKENS = np.arange(1000, dtype=np.uint16)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "tokens.bin"
    TOKENS.tofile(path)
    return path


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that were waited, without waiting."""
    waited: list[float] = []
    monkeypatch.setattr(token_reader.time, "sleep", waited.append)
    return waited


def replace_read(monkeypatch: pytest.MonkeyPatch, fails: int, most: int | None = None) -> None:
    """The first ``fails`` reads are errors, and none gives more than ``most`` bytes."""
    read: Callable[..., int] = os.preadv
    calls = iter(range(10**6))

    def failing(descriptor: int, buffers: list[Any], offset: int) -> int:
        if next(calls) < fails:
            raise OSError(errno.EIO, "Input/output error")
        return read(descriptor, [buffers[0][:most]], offset)

    monkeypatch.setattr(os, "preadv", failing)


@given(first=st.integers(0, 1000), count=st.integers(0, 1000))
def test_what_is_read_is_there(tokens: Path, first: int, count: int) -> None:
    count = min(count, 1000 - first)
    read = TokenReader(str(tokens), retries=0).read(np.uint16, count, 2 * first)
    assert np.array_equal(read, TOKENS[first : first + count])


def test_short_reads_are_completed(tokens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_read(monkeypatch, fails=0, most=3)
    assert np.array_equal(TokenReader(str(tokens), 0).read(np.uint16, 100, 20), TOKENS[10:110])


def test_a_failing_read_is_tried_again(
    tokens: Path, monkeypatch: pytest.MonkeyPatch, pauses: list[float], capfd: pytest.CaptureFixture[str]
) -> None:
    replace_read(monkeypatch, fails=3)
    assert np.array_equal(TokenReader(str(tokens), 3).read(np.uint16, 100, 20), TOKENS[10:110])
    assert pauses == [1.0, 2.0, 4.0]
    assert "tokens.bin at 20: Input/output error; trying again in 4 s" in capfd.readouterr().err


def test_it_gives_up(tokens: Path, monkeypatch: pytest.MonkeyPatch, pauses: list[float]) -> None:
    replace_read(monkeypatch, fails=4)
    with pytest.raises(DataFaultError, match="Input/output error, also after 3 more tries"):
        TokenReader(str(tokens), 3).read(np.uint16, 100, 20)


def test_a_file_that_ends_before_is_no_data(tokens: Path, pauses: list[float]) -> None:
    with pytest.raises(DataFaultError, match=r"cannot read 4 bytes of .* at 1998: the file ends at 2000"):
        TokenReader(str(tokens), 1).read(np.uint16, 2, 1998)


def test_a_file_that_is_gone(tmp_path: Path, pauses: list[float]) -> None:
    with pytest.raises(DataFaultError, match="No such file"):
        TokenReader(str(tmp_path / "gone.bin"), 1).read(np.uint16, 2, 0)
