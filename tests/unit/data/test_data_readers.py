"""Readers: the same documents from every format, and damage reported by file and line."""

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from skipmega.data.corpora.readers import Corpus, Document, first_bytes
from skipmega.errors import DataError

TEXTS = ["one", "two\nlines\u2028and a half", "", "vier é"]
SHARED_CORPUS = Path(__file__).parents[4] / "shared" / "corpus" / "docs-valid.jsonl.zst"


def _lines(texts: list[str], field: str = "text") -> bytes:
    return b"".join(json.dumps({field: text, "n": 1}).encode() + b"\n" for text in texts)


def _texts(corpus: Corpus) -> list[str]:
    return [document.text for document in corpus]


def _write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_every_format_gives_the_same_documents(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS, "n": [1, 2, 3, 4]}), path)
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(_lines(TEXTS)))
    elif name.endswith(".zst"):  # two frames, as parallel compressors write
        frames = [zstandard.compress(part) for part in (_lines(TEXTS[:2]), _lines(TEXTS[2:]))]
        path.write_bytes(b"".join(frames))
    else:
        path.write_bytes(_lines(TEXTS))
    corpus = Corpus([path])
    documents = list(corpus)
    assert [document.text for document in documents] == TEXTS
    assert documents[1].where == f"{path}:2"
    assert corpus.bytes_read == corpus.total_bytes == path.stat().st_size
    assert _texts(corpus) == TEXTS


def test_folders_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").mkdir()
    _write(tmp_path / ".hidden" / "x.txt", b"no")
    _write(tmp_path / "c.txt", b"third")
    _write(tmp_path / "b" / "z.py", b"second")
    _write(tmp_path / "a.jsonl", _lines(["first"]))
    assert list(Corpus([tmp_path])) == [
        Document("first", f"{tmp_path}/a.jsonl:1"),
        Document("second", f"{tmp_path}/b/z.py:1"),
        Document("third", f"{tmp_path}/c.txt:1"),
    ]


def test_the_text_field_can_be_named(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.jsonl", _lines(["x"], field="content"))
    assert _texts(Corpus([path], text_field="content")) == ["x"]
    with pytest.raises(DataError, match=r"a\.jsonl:1: no field 'text', only 'content', 'n'"):
        list(Corpus([path]))
    table = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"content": ["x"]}), table)
    with pytest.raises(DataError, match="no column 'text', only 'content'"):
        list(Corpus([table], skip_bad=True))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "cut of', "not a line of JSON"),
        (b'{"text": "\xff"}', "not a line of JSON"),
        (b'["text"]', "a JSON list"),
        (b'{"text": null}', "NoneType"),
        (b'{"text": "\\ud800"}', "not valid UTF-8"),
        (b"[" * 100_000, "not a line of JSON"),
    ],
)
def test_a_bad_line_is_named_or_skipped(tmp_path: Path, line: bytes, reason: str) -> None:
    path = _write(tmp_path / "a.jsonl", _lines(["good"]) + b"\n" + line + b"\n" + _lines(["also good"]))
    with pytest.raises(DataError, match=rf"a\.jsonl:3: .*{reason}"):
        list(Corpus([path]))
    corpus = Corpus([path], skip_bad=True)
    assert _texts(corpus) == ["good", "also good"]
    assert corpus.bad_records == 1
    assert "a.jsonl:3" in corpus.last_bad


def test_missing_text_in_parquet_is_a_bad_record(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x", None]}), path)
    with pytest.raises(DataError, match=r"a\.parquet:2"):
        list(Corpus([path]))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
@pytest.mark.parametrize("skip_bad", [False, True])
def test_truncated_files_are_refused_even_when_skipping(tmp_path: Path, name: str, skip_bad: bool) -> None:
    path = tmp_path / name
    texts = [f"{n} {n * n}" for n in range(2000)]
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(_lines(texts)))
    elif name.endswith(".zst"):
        path.write_bytes(zstandard.compress(_lines(texts)))
    else:
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(DataError, match=f"{name}, it is damaged"):
        list(Corpus([path], skip_bad=skip_bad))


def test_a_file_that_is_not_what_its_name_says(tmp_path: Path) -> None:
    for name in ("a.jsonl.gz", "a.jsonl.zst", "a.parquet"):
        with pytest.raises(DataError, match=name):
            list(Corpus([_write(tmp_path / name, b"plain text, really")]))


def test_missing_and_empty_corpora(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.jsonl does not exist"):
        Corpus([tmp_path / "nowhere.jsonl"])
    with pytest.raises(DataError, match="empty: 0 files"):
        Corpus([tmp_path])
    with pytest.raises(DataError, match="empty: 1 files with 0 bytes"):
        Corpus([_write(tmp_path / "a.jsonl", b"")])
    with pytest.raises(DataError, match="no path"):
        Corpus([])


def test_first_bytes_stops_after_the_document_that_reaches_the_limit() -> None:
    documents = [Document(text, "") for text in ("éé", "b", "c")]
    assert list(first_bytes(iter(documents), 5)) == documents[:2]


@pytest.mark.skipif(not SHARED_CORPUS.exists(), reason=f"{SHARED_CORPUS} is not there")
def test_real_text() -> None:
    corpus = Corpus([SHARED_CORPUS])
    texts = _texts(corpus)
    assert len(texts) > 100
    assert sum(map(len, texts)) > 1_000_000
    assert all(text.strip() for text in texts)
