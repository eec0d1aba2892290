"""Preparation: exact contents, the same files for any number of workers, all or nothing on disk."""

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset

from skipmega.data.corpora.readers import Corpus
from skipmega.data.pairs.manifest import read_manifest
from skipmega.data.progress import Progress
from skipmega.data.tokenizer import Tokenizer
from skipmega.data.tokenizing import prepare
from skipmega.data.tokenizing.encode import is_held_out, token_dtype
from skipmega.data.tokenizing.prepare import prepare_dataset
from skipmega.errors import DataError


@pytest.fixture
def corpus(tmp_path: Path, source_texts: list[str]) -> Corpus:
    """Each line of real source is a document; some are empty, one is bad."""
    lines = [json.dumps({"text": line}) for text in source_texts for line in text.splitlines(keepends=True)]
    path = tmp_path / "corpus.jsonl"
    path.write_text("\n".join([*lines, "{bad"]), encoding="utf-8")
    return Corpus([path], skip_bad=True)


def _files(folder: Path, name: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name.startswith(name)}


def test_the_pair_holds_every_document(tmp_path: Path, corpus: Corpus, tokenizer: Tokenizer) -> None:
    (pair,) = prepare_dataset(corpus, tmp_path / "out", tokenizer)
    texts = [document.text for document in corpus if document.text.strip()]
    data = IndexedDataset(str(tmp_path / "out"))
    assert [tokenizer.decode(document[:-1].tolist()) for document in data] == texts
    assert all(document[-1] == tokenizer.eod_id for document in data)
    manifest = pair.manifest
    assert manifest == read_manifest(tmp_path / "out")
    assert manifest.documents == len(data) == len(data.document_indices) - 1
    assert manifest.tokens == sum(map(len, data))
    assert manifest.text_bytes == sum(len(text.encode()) for text in texts)
    assert manifest.max_token_id == max(int(document.max()) for document in data)
    assert manifest.bin.bytes == (tmp_path / "out.bin").stat().st_size == 2 * manifest.tokens
    assert manifest.empty_documents == sum(not document.text.strip() for document in corpus) > 0
    assert manifest.bad_records == 1
    assert manifest.tokenizer.sha256 == tokenizer.sha256


def test_the_files_do_not_depend_on_the_workers(
    tmp_path: Path, corpus: Corpus, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("skipmega.data.tokenizing.encode._BATCH_CHARACTERS", 500)
    for workers, folder in ((1, tmp_path / "one"), (3, tmp_path / "three")):
        prepare_dataset(corpus, folder / "out", tokenizer, workers=workers, valid_fraction=0.3)
    one = _files(tmp_path / "one", "")
    assert len(one) == 6
    assert one == _files(tmp_path / "three", "")


def test_train_and_valid_share_out_the_documents(
    tmp_path: Path, corpus: Corpus, tokenizer: Tokenizer
) -> None:
    (whole,) = prepare_dataset(corpus, tmp_path / "whole", tokenizer)
    train, valid = prepare_dataset(corpus, tmp_path / "cut", tokenizer, valid_fraction=0.25)
    assert (train.manifest.part, valid.manifest.part, whole.manifest.part) == ("train", "valid", "all")
    assert train.manifest.documents + valid.manifest.documents == whole.manifest.documents
    assert train.manifest.tokens + valid.manifest.tokens == whole.manifest.tokens
    texts = {
        part: {tuple(document) for document in IndexedDataset(str(tmp_path / name))}
        for part, name in (("train", "cut"), ("valid", "cut-valid"))
    }
    assert not texts["train"] & texts["valid"]


@given(text=st.text(st.characters(exclude_categories=["Cs"])), low=st.floats(0, 1), high=st.floats(0, 1))
def test_a_larger_held_out_part_contains_the_smaller(text: str, low: float, high: float) -> None:
    low, high = sorted((low, high))
    assert not is_held_out(text, 0.0)
    assert is_held_out(text, 1.0)
    assert is_held_out(text, high) or not is_held_out(text, low)


def test_results_are_replaced_only_on_request(tmp_path: Path, corpus: Corpus, tokenizer: Tokenizer) -> None:
    prepare_dataset(corpus, tmp_path / "out", tokenizer)
    before = _files(tmp_path, "out")
    with pytest.raises(DataError, match=r"out\.bin exists"):
        prepare_dataset(corpus, tmp_path / "out", tokenizer)
    assert _files(tmp_path, "out") == before
    prepare_dataset(corpus, tmp_path / "out", tokenizer, valid_fraction=0.5, overwrite=True)
    after = _files(tmp_path, "out")
    assert after["out.bin"] != before["out.bin"]
    assert len(after) == 6


def test_a_failure_leaves_nothing_behind(
    tmp_path: Path, corpus: Corpus, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    strict = Corpus([corpus.files[0].path])
    with pytest.raises(DataError, match=r"corpus\.jsonl:\d+"):
        prepare_dataset(strict, tmp_path / "new" / "out", tokenizer, workers=2)
    assert list((tmp_path / "new").iterdir()) == []

    def fail(path: Path) -> str:
        raise OSError("disk full")

    monkeypatch.setattr(prepare, "sha256_of", fail)
    with pytest.raises(OSError, match="disk full"):
        prepare_dataset(corpus, tmp_path / "new" / "out", tokenizer)
    assert list((tmp_path / "new").iterdir()) == []


def test_an_interrupted_replacement_leaves_no_pair_that_passes(
    tmp_path: Path, corpus: Corpus, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_dataset(corpus, tmp_path / "out", tokenizer)
    replace = Path.replace

    def interrupted(self: Path, target: Path) -> Path:
        if target.suffix == ".idx":
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare_dataset(corpus, tmp_path / "out", tokenizer, overwrite=True)
    assert [path.name for path in tmp_path.glob("*out*")] == ["out.bin"]


def test_no_document_is_an_error(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"text": " \\n"}\n{bad\n')
    with pytest.raises(DataError, match=r"1 empty documents, 1 bad records \(.*corpus\.jsonl:2"):
        prepare_dataset(Corpus([path], skip_bad=True), tmp_path / "out", tokenizer)
    path.write_text('{"text": "only one"}\n')
    with pytest.raises(DataError, match=r"valid_fraction=0\.\d+ left this part none"):
        prepare_dataset(Corpus([path]), tmp_path / "out", tokenizer, valid_fraction=0.0001)
    with pytest.raises(DataError, match="less than 1"):
        prepare_dataset(Corpus([path]), tmp_path / "out", tokenizer, valid_fraction=1.0)
    assert not list(tmp_path.glob("out*"))


def test_a_worker_that_dies_is_reported(
    tmp_path: Path, corpus: Corpus, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = os.getpid()
    encode = Tokenizer.encode

    def die(self: Tokenizer, text: str) -> list[int]:
        return encode(self, text) if os.getpid() == parent else os._exit(1)

    monkeypatch.setattr(Tokenizer, "encode", die)
    with pytest.raises(DataError, match="one of 2 tokenizing processes died"):
        prepare_dataset(corpus, tmp_path / "out", tokenizer, workers=2)


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(2, np.uint16), (1 << 16, np.uint16), ((1 << 16) + 1, np.int32)]
)
def test_the_token_type_holds_every_id(vocab_size: int, dtype: type) -> None:
    assert token_dtype(vocab_size) is dtype
    assert np.iinfo(dtype).max >= vocab_size - 1


def test_progress_is_lines_where_there_is_no_terminal() -> None:
    stream = io.StringIO()
    with Progress("prepare", 200, stream=stream, interval=0.0) as progress:
        progress.update(50, 1000, 7)
    assert stream.getvalue().startswith("prepare: 25%, 7 documents, ")
    quiet = io.StringIO()
    with Progress("prepare", 200, stream=quiet, interval=3600.0) as progress:
        progress.update(50, 1000, 7)
    assert quiet.getvalue() == ""
