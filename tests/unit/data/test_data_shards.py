"""Shards: whatever their number, and whenever they were made, the files are those of one process."""

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skipmega.data.corpora.readers import Corpus
from skipmega.data.tokenizer import Tokenizer
from skipmega.data.tokenizing.prepare import prepare_dataset
from skipmega.data.tokenizing.shards import merge_shards, prepare_shard, shards_folder
from skipmega.errors import DataError

DOCUMENTS = st.lists(
    st.lists(st.sampled_from(["def f(): pass", "x = 1\n" * 9, " ", "import os"]), max_size=4),
    min_size=1,
    max_size=7,
)


def write_corpus(folder: Path, files: list[list[str]]) -> Corpus:
    folder.mkdir()
    for number, documents in enumerate(files):
        lines = [json.dumps({"text": text}) for text in documents]
        (folder / f"{number}.jsonl").write_text("\n".join(lines))
    return Corpus([folder])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@settings(deadline=None, max_examples=30)
@given(files=DOCUMENTS, shards=st.integers(1, 7), valid_fraction=st.sampled_from([0.0, 0.5]), data=st.data())
def test_shards_make_the_files_of_one_process(
    tokenizer: Tokenizer, files: list[list[str]], shards: int, valid_fraction: float, data: st.DataObject
) -> None:
    files[0].append("def main(): return 0")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = write_corpus(folder / "corpus", files)
        shards = min(shards, len(files))
        options = {"valid_fraction": valid_fraction}
        try:
            prepare_dataset(corpus, folder / "whole" / "data", tokenizer, **options)
        except DataError:  # one of the parts is without documents
            return
        target = folder / "parts" / "data"
        for shard in data.draw(st.permutations(range(shards))):
            prepare_shard(corpus, target, tokenizer, shard, shards, **options)
        merge_shards(Corpus([folder / "corpus"]), target, tokenizer, shards, **options)
        assert contents(folder / "parts") == contents(folder / "whole")
        assert not shards_folder(target).exists()


def test_a_finished_shard_is_left_alone_and_a_missing_one_is_named(
    tmp_path: Path, tokenizer: Tokenizer, other_tokenizer: Tokenizer
) -> None:
    corpus = write_corpus(tmp_path / "corpus", [["import os\n" * 5]] * 3)
    target = tmp_path / "data"
    prepare_shard(corpus, target, tokenizer, 0, 3)
    first = shards_folder(target) / "0000-of-0003.bin"
    before = first.stat()
    with pytest.raises(DataError, match=r"shard 1 of 3 is missing .*0001-of-0003"):
        merge_shards(corpus, target, tokenizer, 3)
    prepare_shard(corpus, target, tokenizer, 0, 3)
    assert first.stat() == before
    with pytest.raises(DataError, match="a shard of something else: the tokenizer's SHA-256"):
        prepare_shard(corpus, target, other_tokenizer, 0, 3)
    with pytest.raises(DataError, match="a shard of something else: text_field: text there, body here"):
        prepare_shard(Corpus([tmp_path / "corpus"], text_field="body"), target, tokenizer, 0, 3)
    (tmp_path / "corpus" / "0.jsonl").write_text(json.dumps({"text": "import sys\n" * 5}) + "\n")
    with pytest.raises(DataError, match="a shard of something else: the files' sizes"):
        prepare_shard(Corpus([tmp_path / "corpus"]), target, tokenizer, 0, 3)


@pytest.mark.parametrize(
    ("shard", "shards", "message"),
    [
        (0, 4, "4 shards of a corpus of 3 files"),
        (0, 0, "0 shards"),
        (3, 3, "shard 3 of 3: number them from 0 to 2"),
    ],
)
def test_shards_that_cannot_be_are_refused(
    tmp_path: Path, tokenizer: Tokenizer, shard: int, shards: int, message: str
) -> None:
    corpus = write_corpus(tmp_path / "corpus", [["import os"]] * 3)
    with pytest.raises(DataError, match=message):
        prepare_shard(corpus, tmp_path / "data", tokenizer, shard, shards)
