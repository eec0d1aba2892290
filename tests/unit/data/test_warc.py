"""WARC text: what Common Crawl's WET files hold, and every way in which a file can be no such file."""

import gzip
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from skipmega.data.corpora.readers import Corpus
from skipmega.errors import DataError

TEXTS = ["one\r\n\r\nWARC/1.0\r\n", "", "vier é\n" * 500]


def record(text: str, kind: str = "conversion") -> bytes:
    body = text.encode()
    head = f"WARC/1.0\r\nWARC-Type: {kind}\r\nContent-Type: text/plain\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body + b"\r\n\r\n"


RECORDS = [record("about this file", "warcinfo"), *map(record, TEXTS)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.wet", b"".join(RECORDS)),
        ("a.warc.wet.gz", b"".join(map(gzip.compress, RECORDS))),  # a member for each record, as crawls have
        ("a.warc.zst", zstandard.compress(b"".join(RECORDS))),
    ],
)
def test_texts_are_read_whole_and_told_by_their_record(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    documents = list(Corpus([path]))
    assert [document.text for document in documents] == TEXTS
    assert [document.where for document in documents] == [f"{path}:{number}" for number in (2, 3, 4)]


@pytest.mark.parametrize("cut", [1, 700, len(RECORDS[-1]) - 30])
@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstandard.compress], ids=["plain", "gz", "zst"])
def test_a_file_that_is_cut_off_is_refused(tmp_path: Path, pack: Callable[[bytes], bytes], cut: int) -> None:
    path = tmp_path / {bytes: "a.wet", gzip.compress: "a.wet.gz"}.get(pack, "a.wet.zst")
    whole = b"".join(RECORDS).removesuffix(b"\r\n\r\n")
    path.write_bytes(pack(whole)[:-cut] if pack is bytes else pack(whole)[: -min(cut, 40)])
    with pytest.raises(DataError, match=r"cannot read .*a\.wet.*it is damaged"):
        list(Corpus([path], skip_bad=True))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (record("<html>", "response"), "record 1 is a page, not its text"),
        (b"not a record\n", "record 1 begins with b'not a record"),
        (RECORDS[0] + b"WARC/1.0\r\nWARC-Type: conversion\r\n\r\n", "record 2 has no Content-Length"),
        (RECORDS[0] + b"WARC/1.0\r\nWARC-Type", "it ends within the headers of record 2"),
    ],
)
def test_what_is_no_warc_text_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.wet"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"a\.wet, it is damaged or unreadable: {message}"):
        list(Corpus([path]))


def test_text_that_is_not_utf8_is_a_bad_record(tmp_path: Path) -> None:
    path = tmp_path / "a.wet"
    path.write_bytes(RECORDS[1].replace(b"one", b"\xff\xff\xff") + RECORDS[3])
    with pytest.raises(DataError, match=r"a\.wet:1: not valid UTF-8"):
        list(Corpus([path]))
    corpus = Corpus([path], skip_bad=True)
    assert [document.text for document in corpus] == TEXTS[2:]
    assert corpus.bad_records == 1
