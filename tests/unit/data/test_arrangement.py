"""Shuffles over several pairs, packed or not: all documents once, whoever makes which shard and when."""

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from skipmega.data.corpora.readers import Corpus
from skipmega.data.pairs import arrangement
from skipmega.data.pairs.arrangement import Arrangement, arrange, arrange_shard
from skipmega.data.pairs.documents import Documents
from skipmega.data.pairs.indexed import check_dataset, verify_checksums
from skipmega.data.pairs.manifest import Manifest, read_manifest
from skipmega.data.tokenizer import Tokenizer
from skipmega.data.tokenizing.prepare import prepare_dataset
from skipmega.errors import DataError

PAIRS = 3


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> tuple[str, ...]:
    folder = tmp_path_factory.mktemp("pairs")
    for number in range(PAIRS):
        texts = [f"Pair {number}, document {i}: {'so ' * (7 * i % 40)}it ends." for i in range(30)]
        corpus = folder / f"{number}.jsonl"
        corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        prepare_dataset(Corpus([corpus]), folder / f"data-{number}", tokenizer)
    return tuple(str(folder / f"data-{number}") for number in range(PAIRS))


def contents(prefix: str | Path) -> list[bytes]:
    documents = Documents(str(prefix))
    return [documents[number].tobytes() for number in range(len(documents))]


def test_shards_hold_all_documents_once_in_another_order(
    pairs: tuple[str, ...], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    whole, many = (
        Arrangement(pairs, tmp_path / "one" / "data"),
        Arrangement(pairs, tmp_path / "data", shards=4),
    )
    (one,) = arrange(whole, 1)
    shards = arrange(many, 2)
    before = [document for pair in pairs for document in contents(pair)]
    after = [document for shard in range(4) for document in contents(many.target(shard))]
    assert Counter(before) == Counter(after) == Counter(contents(whole.output))
    assert before != contents(whole.output)
    for manifest in (one, *shards):
        assert (len(manifest.sources), manifest.arranged.pairs) == (PAIRS, PAIRS)  # type: ignore[union-attr]
    assert one.text_bytes == sum(read(pair).text_bytes for pair in pairs)
    assert abs(sum(shard.text_bytes for shard in shards) - one.text_bytes) < 4
    for shard in range(4):
        verify_checksums(str(many.target(shard)))
        check_dataset(str(many.target(shard)), tokenizer)
        drawn = Counter(contents(many.target(shard)))
        assert all(drawn & Counter(contents(pair)) for pair in pairs), "of all pairs"


def read(prefix: str | Path) -> Manifest:
    manifest = read_manifest(prefix)
    assert manifest is not None
    return manifest


def test_the_order_is_the_seed_s(pairs: tuple[str, ...], tmp_path: Path) -> None:
    a, b, c = (
        Arrangement(pairs, tmp_path / name, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    for each in (a, b, c):
        arrange(each, 1)
    assert contents(a.output) == contents(b.output) != contents(c.output)


def test_what_is_finished_stays_and_what_failed_is_made_again(
    pairs: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Arrangement(pairs, tmp_path / "data", shards=3)
    reads = Documents.read

    def fails(self: Documents, number: int, start: int, tokens: int) -> np.ndarray:
        if number == 17:
            raise DataError("the disk is gone")
        return reads(self, number, start, tokens)

    monkeypatch.setattr(Documents, "read", fails)
    outcomes = []
    for shard in range(3):
        try:
            arrange_shard(plan, shard)
            outcomes.append("made")
        except DataError:
            outcomes.append("failed")
    assert "failed" in outcomes
    made = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(made) == 3 * outcomes.count("made"), "nothing is left of a shard that failed"
    monkeypatch.undo()
    arrange(plan, 1)
    assert len(list(tmp_path.iterdir())) == 9
    assert made == {path: path.stat().st_mtime_ns for path in made}


def test_packed_samples(pairs: tuple[str, ...], tokenizer: Tokenizer, tmp_path: Path) -> None:
    length = 40
    arrange(Arrangement(pairs, tmp_path / "packed", sequence_length=length), 1)
    found = read(tmp_path / "packed")
    assert found.arranged is not None
    assert found.packed_for == length
    tokens = np.fromfile(tmp_path / "packed.bin", found.dtype).reshape(-1, length + 1)
    assert tokens.size == found.tokens
    given = Counter(document for pair in pairs for document in contents(pair))
    whole: Counter[bytes] = Counter()
    padding = 0
    for sample in tokens:
        ends = np.flatnonzero(sample == tokenizer.eod_id)
        for first, last in zip([0, *(ends + 1)], ends, strict=False):
            if first == last:
                padding += 1
            else:
                whole[sample[first : last + 1].tobytes()] += 1
    assert padding == found.arranged.padding
    fits = Counter({d: n for d, n in given.items() if len(d) <= (length + 1) * tokens.itemsize})
    assert fits <= whole, "what fits in a sample is not cut"
    assert found.arranged.cut == sum(n for d, n in given.items() if len(d) > (length + 1) * tokens.itemsize)
    assert found.arranged.cut > 0 < len(fits)
    with pytest.raises(DataError, match=r"packed for samples of 40 tokens, and data\.order=documents cuts"):
        check_dataset(str(tmp_path / "packed"), tokenizer)
    with pytest.raises(DataError, match="is packed for samples of 40 tokens: shuffle what it was made of"):
        arrange(Arrangement((str(tmp_path / "packed"),), tmp_path / "again"), 1)


def test_refusals(pairs: tuple[str, ...], tmp_path: Path, other_tokenizer: Tokenizer) -> None:
    arrange(Arrangement(pairs, tmp_path / "data"), 1)
    with pytest.raises(DataError, match=r"data exists and is something else \(seed=0 pairs=3 .*not seed=1"):
        arrange(Arrangement(pairs, tmp_path / "data", seed=1), 1)
    with pytest.raises(DataError, match="in the order of its corpus, not"):
        arrange(Arrangement(pairs[:1], Path(pairs[1])), 1)
    with pytest.raises(DataError, match="shard 3 of 3: number them from 0 to 2"):
        arrange_shard(Arrangement(pairs, tmp_path / "s", shards=3), 3)
    with pytest.raises(DataError, match="samples of 1 tokens: give at least 2"):
        Arrangement(pairs, tmp_path / "s", sequence_length=1)
    with pytest.raises(DataError, match="shards are too many, give fewer"):
        arrange(Arrangement(pairs, tmp_path / "s", shards=500), 1)
    corpus = tmp_path / "c.txt"
    corpus.write_text("another")
    prepare_dataset(Corpus([corpus]), tmp_path / "other", other_tokenizer)
    with pytest.raises(DataError, match="cannot be shuffled together: tokenizer is"):
        arrange(Arrangement((*pairs, str(tmp_path / "other")), tmp_path / "s"), 1)
    (tmp_path / "other.manifest.json").unlink()
    with pytest.raises(DataError, match=r"other\.manifest\.json is missing: prepare the data"):
        arrange(Arrangement((str(tmp_path / "other"),), tmp_path / "s"), 1)
    with pytest.raises(DataError, match=r"other\.bin exists without a manifest: choose another output"):
        arrange(Arrangement(pairs, tmp_path / "other"), 1)


def test_a_dead_process_is_named(
    pairs: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrangement, "arrange_shard", _die)
    with pytest.raises(DataError, match="one of 2 processes died, probably out of memory"):
        arrange(Arrangement(pairs, tmp_path / "data", shards=2), 2)


def _die(plan: Arrangement, shard: int) -> None:
    os._exit(1)
