"""Pairs that a stream cannot be read from: each refused, or named when it is read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from skipmega.data.files import sha256_of
from skipmega.data.pairs import token_reader
from skipmega.data.pairs.manifest import FileRecord, Manifest, TokenizerRecord, manifest_path
from skipmega.data.tokenizer import Tokenizer
from skipmega.errors import DataError, DataFaultError
from support.streams import build, config


def with_manifest(folder: Path, tokenizer: Tokenizer, documents: list[list[int]]) -> Path:
    """A pair as skipmega prepares it."""

    prefix = folder / "listed"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for document in documents:
        builder.add_document(np.array(document), [len(document)])
    builder.finalize(f"{prefix}.idx")
    files = {
        end: FileRecord(
            bytes=Path(f"{prefix}.{end}").stat().st_size, sha256=sha256_of(Path(f"{prefix}.{end}"))
        )
        for end in ("bin", "idx")
    }
    manifest = Manifest(
        skipmega_version="0", part="all", valid_fraction=0.0, documents=len(documents),
        tokens=sum(map(len, documents)), text_bytes=1, max_token_id=599, dtype="uint16", empty_documents=0,
        bad_records=0, text_field="text", sources=(), **files,
        tokenizer=TokenizerRecord(sha256=tokenizer.sha256, vocab_size=tokenizer.size, eod_id=2),
    )  # fmt: skip
    manifest_path(prefix).write_text(manifest.model_dump_json())
    return prefix


@pytest.fixture
def listed(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    return with_manifest(tmp_path, tokenizer, [[5] * 30 + [2] for _ in range(20)])


def change_manifest(prefix: Path, **changes: Any) -> None:
    values = json.loads(manifest_path(prefix).read_text()) | changes
    manifest_path(prefix).write_text(json.dumps(values))


def cut(prefix: Path, ending: str) -> None:
    path = Path(f"{prefix}.{ending}")
    path.write_bytes(path.read_bytes()[:-2])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda prefix: cut(prefix, "bin"), r"listed\.bin has 1238 bytes, its manifest says 1240"),
        (lambda prefix: cut(prefix, "idx"), r"listed\.idx has \d+ bytes, its manifest says"),
        (lambda prefix: Path(f"{prefix}.bin").unlink(), r"cannot read .*listed\.bin: No such file"),
        (
            lambda prefix: change_manifest(prefix, documents=7),
            "describes 20 documents of uint16 ",
        ),
        (
            lambda prefix: change_manifest(prefix, dtype="int32"),
            "its manifest says 20 of int32: one",
        ),
        (
            lambda prefix: change_manifest(prefix, tokens=7),
            "contradicts itself: 7 tokens of uint16",
        ),
        (lambda prefix: manifest_path(prefix).write_text("{}"), "is not a manifest that this version reads"),
    ],
    ids=["short-bin", "short-idx", "missing", "documents", "dtype", "tokens", "no-manifest"],
)
def test_pairs_that_do_not_fit(
    listed: Path, tokenizer: Tokenizer, damage: Callable[[Path], object], message: str
) -> None:
    damage(listed)
    with pytest.raises(DataError, match=message):
        build(config(listed.parent, train=[{"path": str(listed)}]), tokenizer)


def test_foreign_pairs(listed: Path, other_tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="was made with a tokenizer of SHA-256"):
        build(config(listed.parent, train=[{"path": str(listed)}]), other_tokenizer)


def test_an_id_that_is_none(listed: Path, tokenizer: Tokenizer) -> None:
    """A flipped bit that makes an id too large; others only a checksum shows."""
    datasets = build(config(listed.parent, train=[{"path": str(listed)}], split=[100.0, 0.0]), tokenizer)
    content = bytearray(Path(f"{listed}.bin").read_bytes())
    content[601] ^= 0x80
    Path(f"{listed}.bin").write_bytes(content)
    with pytest.raises(DataFaultError, match=r"listed\.bin holds what is no token between bytes \d+ and"):
        [datasets.train[number] for number in range(39)]


def test_a_file_that_goes_away(listed: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opened, it is read to the end; not yet opened, it is named."""
    monkeypatch.setattr(token_reader, "_FIRST_PAUSE", 0.0)
    data = config(listed.parent, train=[{"path": str(listed)}])
    opened, not_yet = build(data, tokenizer), build(data, tokenizer)
    before = opened.train[0]["tokens"]
    Path(f"{listed}.bin").unlink()
    assert torch.equal(opened.train[0]["tokens"], before)
    with pytest.raises(DataFaultError, match=r"cannot read 34 bytes of .*listed\.bin at \d+: No such file"):
        not_yet.train[0]
