"""Checks of prepared data: every kind of damage is one sentence that names the file."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from skipmega.data.corpora.readers import Corpus
from skipmega.data.pairs.indexed import check_dataset, verify_checksums
from skipmega.data.pairs.manifest import manifest_path
from skipmega.data.tokenizer import Tokenizer
from skipmega.data.tokenizing.prepare import prepare_dataset
from skipmega.errors import DataError

DOCUMENTS = [[5, 6, 7, 2], [8, 2], [9, 10, 11, 12, 13, 2]]


@pytest.fixture
def foreign(tmp_path: Path, write_pair: Callable[..., str]) -> str:
    """A sound pair without a manifest: 12 int32 tokens."""
    return write_pair(tmp_path / "foreign", DOCUMENTS)


@pytest.fixture
def prepared(tmp_path: Path, tokenizer: Tokenizer) -> str:
    """A sound pair with a manifest."""
    (tmp_path / "corpus.txt").write_text("some text to tokenize\n" * 20)
    prepare_dataset(Corpus([tmp_path / "corpus.txt"]), tmp_path / "prepared", tokenizer)
    return str(tmp_path / "prepared")


def _cut(path: str, count: int) -> None:
    Path(path).write_bytes(Path(path).read_bytes()[:-count])


def _patch(path: str, offset: int, content: bytes) -> None:
    with open(path, "r+b") as stream:
        stream.seek(offset)
        stream.write(content)


def test_sound_pairs_pass(foreign: str, prepared: str, tokenizer: Tokenizer) -> None:
    checked = check_dataset(foreign, tokenizer)
    assert checked.lengths.tolist() == [4, 2, 6]
    assert checked.tokens == 12
    manifest = verify_checksums(prepared)
    assert check_dataset(prepared, tokenizer).tokens == manifest.tokens
    assert check_dataset(prepared, tokenizer).index_sha256 == manifest.idx.sha256


def test_missing_files(tmp_path: Path, foreign: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"nowhere\.idx: No such file"):
        check_dataset(str(tmp_path / "nowhere"), tokenizer)
    Path(f"{foreign}.bin").unlink()
    with pytest.raises(DataError, match=r"foreign\.bin: No such file"):
        check_dataset(foreign, tokenizer)


def test_truncated_bin(foreign: str, tokenizer: Tokenizer) -> None:
    _cut(f"{foreign}.bin", 4)
    with pytest.raises(DataError, match=r"foreign\.bin has 44 bytes, .* 12 tokens of 4 bytes, 48 in all"):
        check_dataset(foreign, tokenizer)


def test_truncated_bin_or_idx_with_a_manifest(prepared: str, tokenizer: Tokenizer) -> None:
    for ending in ("idx", "bin"):
        _cut(f"{prepared}.{ending}", 2)
        with pytest.raises(DataError, match=rf"prepared\.{ending} has \d+ bytes, its manifest says \d+"):
            check_dataset(prepared, tokenizer)


@pytest.mark.parametrize("left", [0, 20, 34, 60])
def test_truncated_idx(foreign: str, tokenizer: Tokenizer, left: int) -> None:
    path = Path(f"{foreign}.idx")
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(DataError, match=rf"foreign\.idx has {left} bytes, .*(34|102)"):
        check_dataset(foreign, tokenizer)


def test_foreign_idx(foreign: str, tokenizer: Tokenizer) -> None:
    Path(f"{foreign}.idx").write_bytes(b"PK\x03\x04 something else altogether, and long enough")
    with pytest.raises(DataError, match=r"foreign\.idx is not a megatron-core index: it starts with b'PK"):
        check_dataset(foreign, tokenizer)


@pytest.mark.parametrize(
    ("offset", "content", "message"),
    [
        (9, b"\x02", "version 2"),
        (17, b"\x06", "type code 6"),
        (34, b"\x05\x00\x00\x00\x01\x00\x00\x00", "pointers do not follow"),  # 4, 2 tokens become 5, 1
        (46, b"\x04", "pointers do not follow"),  # the first document starts at byte 4
        (70, b"\x01", "boundaries are not in order"),
        (78, b"\x03\x00", "boundaries are not in order"),
    ],
)
def test_damaged_idx(foreign: str, tokenizer: Tokenizer, offset: int, content: bytes, message: str) -> None:
    _patch(f"{foreign}.idx", offset, content)
    with pytest.raises(DataError, match=message):
        check_dataset(foreign, tokenizer)


def test_the_parts_of_two_pairs_do_not_fit(
    tmp_path: Path, foreign: str, write_pair: Callable[..., str], tokenizer: Tokenizer
) -> None:
    other = write_pair(tmp_path / "other", DOCUMENTS[:2])
    Path(f"{other}.bin").replace(f"{foreign}.bin")
    with pytest.raises(DataError, match="belongs to another data set"):
        check_dataset(foreign, tokenizer)


def test_no_documents(tmp_path: Path, write_pair: Callable[..., str], tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"none\.bin is empty"):
        check_dataset(write_pair(tmp_path / "none", []), tokenizer)


@pytest.mark.parametrize("token", [600, 2_000_000, -1])
def test_tokens_outside_the_vocabulary(
    tmp_path: Path,
    write_pair: Callable[..., str],
    tokenizer: Tokenizer,
    token: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("skipmega.data.pairs.indexed._CHUNK", 5)
    prefix = write_pair(tmp_path / "wide", [*DOCUMENTS, [3, token, 4]])
    with pytest.raises(DataError, match=rf"wide\.bin holds token id {token}\b"):
        check_dataset(prefix, tokenizer)


def test_tokens_outside_the_vocabulary_by_the_manifest(prepared: str, tokenizer: Tokenizer) -> None:
    path = manifest_path(prepared)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_token_id": 600}))
    with pytest.raises(DataError, match=r"token id 600, but .* has 600 ids"):
        check_dataset(prepared, tokenizer)


def test_another_tokenizer(prepared: str, tokenizer: Tokenizer, other_tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError) as raised:
        check_dataset(prepared, other_tokenizer)
    assert tokenizer.sha256 in str(raised.value)
    assert other_tokenizer.sha256 in str(raised.value)


def test_an_unreadable_manifest(prepared: str, tokenizer: Tokenizer) -> None:
    manifest_path(prepared).write_text('{"format": 7}')
    with pytest.raises(DataError, match=r"prepared\.manifest\.json is not a manifest"):
        check_dataset(prepared, tokenizer)


def test_checksums(prepared: str, foreign: str) -> None:
    content = np.fromfile(f"{prepared}.bin", np.uint16)
    content[3] ^= 1
    content.tofile(f"{prepared}.bin")
    with pytest.raises(DataError, match=r"prepared\.bin is damaged"):
        verify_checksums(prepared)
    with pytest.raises(DataError, match=r"foreign\.manifest\.json is missing"):
        verify_checksums(foreign)
