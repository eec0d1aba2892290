"""Texts as sequences of words, and runs of words as numbers: equal on every machine and in every version."""

import re
import unicodedata
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

_BETWEEN_WORDS = re.compile(r"[\W_]+")
_FACTORS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))  # splitmix64's


def normalized(text: str) -> str:
    """``text`` without differences of case, of white space and of Unicode's compatible forms."""
    return " ".join(unicodedata.normalize("NFKC", text).lower().split())


def hash_words(text: str) -> NDArray[np.uint32]:
    """A number for each word of a normalized text; punctuation is left out."""
    words = _BETWEEN_WORDS.sub(" ", text).encode().split()
    return np.fromiter(map(zlib.crc32, words), np.uint32, len(words))


def hash_runs(words: NDArray[np.uint32], length: int) -> NDArray[np.uint64]:
    """A number for each run of ``length`` words, uint64 [words - length + 1]; none if there are fewer."""
    count = max(0, len(words) - length + 1)
    runs = np.zeros(count, np.uint64)
    for place in range(length):
        runs = mix(runs + words[place : place + count])
    return runs


def mix(numbers: NDArray[Any]) -> NDArray[np.uint64]:
    """A permutation of 64-bit numbers that looks random."""
    mixed = numbers.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * _FACTORS[0]
    mixed = (mixed ^ (mixed >> np.uint64(27))) * _FACTORS[1]
    return mixed ^ (mixed >> np.uint64(31))
