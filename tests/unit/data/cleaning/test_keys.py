"""Keys: equal documents have them in common, unlike ones do not, and files give back what was put in."""

import hashlib
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skipmega.data.cleaning.config import DeduplicateConfig
from skipmega.data.cleaning.keys import EXACT, ROW, KeyMaker, KeyWriter, read_keys
from skipmega.data.cleaning.words import hash_runs, hash_words, normalized
from skipmega.errors import DataError


def words(seed: int, count: int) -> list[str]:
    return [f"w{number}" for number in random.Random(seed).choices(range(10_000), k=count)]


def shared(maker: KeyMaker, one: str, other: str) -> int:
    return len(np.intersect1d(maker.keys(one), maker.keys(other)))


def test_runs_of_words() -> None:
    hashes = hash_words("a, b_c! a b c")
    assert len(hashes) == 6
    assert hashes.dtype == np.uint32
    runs = hash_runs(hashes, 3)
    assert runs[0] == runs[3]
    assert len(np.unique(runs)) == 3
    assert len(hash_runs(hashes, 7)) == 0
    assert hash_runs(hash_words("a b"), 2) != hash_runs(hash_words("b a"), 2)


def test_case_white_space_and_compatible_forms_make_no_difference() -> None:
    maker = KeyMaker(DeduplicateConfig())
    one, other = "The \n\tﬁne  Text", "the fine text"
    assert normalized(one) == other
    assert np.array_equal(maker.keys(one), maker.keys(other))
    assert shared(maker, "x = a + b", "x = a - b") == 0  # few words, equal ones: not the same text


def test_near_duplicates_share_a_band_as_often_as_promised() -> None:
    """Of two texts of 400 words with 8 changed, 9 in 10 shingles are common: found with certainty almost.
    With 100 changed, (3/4)^5 = 0.24 of them are: s = 0.13, never found."""
    maker = KeyMaker(DeduplicateConfig(exact=False))
    found = {8: 0, 100: 0}
    for seed in range(20):
        text = words(seed, 400)
        for changed in found:
            other = list(text)
            for place in random.Random(seed).sample(range(400), changed):
                other[place] = "changed"
            found[changed] += shared(maker, " ".join(text), " ".join(other)) > 0
    assert found == {8: 20, 100: 0}


def test_half_of_similar_documents_share_a_band_where_theory_says_half() -> None:
    """1 - (1 - s^rows)^bands = 0.5 at s = 0.5, rows = 2, bands = 2.4: here 2 bands, 0.4375."""
    maker = KeyMaker(DeduplicateConfig(exact=False, shingle=1, bands=2, rows=2))
    pairs = [(words(seed, 200), words(-seed - 1, 100)) for seed in range(400)]
    hits = sum(
        shared(maker, " ".join(text), " ".join(text[:100] + new)) > 0 for text, new in pairs
    )  # s = 100 / 300
    expected = 1 - (1 - (1 / 3) ** 2) ** 2
    assert abs(hits / 400 - expected) < 0.1


def test_keys_are_those_of_earlier_versions() -> None:
    """A corpus is cleaned over weeks: keys must not change."""
    keys = KeyMaker(DeduplicateConfig()).keys("To be, or not to be: that is the question. Ωμέγα, 中文!")
    assert len(keys) == 15
    assert (keys & np.uint64(1) == EXACT).sum() >= 1
    assert hashlib.sha256(keys.tobytes()).hexdigest()[:16] == "d14a311e36427b81"


@settings(deadline=None, max_examples=30)
@given(
    documents=st.lists(st.lists(st.integers(0, 2**64 - 1), max_size=5, unique=True), max_size=12),
    partitions=st.integers(1, 5),
    flush_after=st.integers(1, 5),
)
def test_partitions_hold_all_keys_once(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], partitions: int, flush_after: int
) -> None:
    path = tmp_path_factory.mktemp("keys") / "keys"
    with path.open("wb") as stream:
        writer = KeyWriter(stream, partitions)
        for number, keys in enumerate(documents):
            writer.add(number, np.array(keys, np.uint64))
            if number % flush_after == 0:
                writer.flush()
        writer.flush()
    parts = [read_keys(path, partition, partitions) for partition in range(partitions)]
    together = sorted((int(row["document"]), int(row["key"])) for part in parts for row in part)
    assert together == sorted((number, key) for number, keys in enumerate(documents) for key in keys)
    assert all(np.all(np.diff(part["document"].astype(int)) >= 0) for part in parts)
    for one, part in enumerate(parts):
        for other in parts[one + 1 :]:
            assert not len(np.intersect1d(part["key"], other["key"]))


@pytest.mark.parametrize("damage", ["cut", "bit", "head", "missing"])
def test_damaged_key_files_are_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "keys"
    with path.open("wb") as stream:
        writer = KeyWriter(stream, 1)
        writer.add(0, np.arange(10, dtype=np.uint64))
        writer.flush()
    content = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(content[: -ROW.itemsize])
    elif damage == "bit":
        content[-5] ^= 1
        path.write_bytes(content)
    elif damage == "head":
        path.write_bytes(content[:9])
    else:
        path.unlink()
    with pytest.raises(DataError, match=rf"cannot read {path}"):
        read_keys(path, 0, 1)
