"""Single documents of a pair."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from skipmega.data.pairs.indexed import document_places
from skipmega.data.pairs.manifest import read_manifest
from skipmega.data.pairs.token_reader import TokenReader
from skipmega.data.permutation import Permutation
from skipmega.data.tokenizer import Tokenizer
from skipmega.errors import DataError


class Documents:
    """The documents of the pair ``prefix``, each an integer array [tokens], its end token included;
    ``lengths`` int32 [documents] are their tokens.

    Raises:
        DataError: there is no such pair, or none that can be read.
    """

    def __init__(self, prefix: str) -> None:
        self._dtype, self.lengths, self._pointers = document_places(prefix)
        self._reader = TokenReader(f"{prefix}.bin", retries=0)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, number: int) -> NDArray[Any]:
        return self.read(number, 0, int(self.lengths[number]))

    def read(self, number: int, start: int, tokens: int) -> NDArray[Any]:
        """Some ``tokens`` of a document, [tokens], from ``start`` on."""
        first = int(self._pointers[number]) + start * np.dtype(self._dtype).itemsize
        return self._reader.read(self._dtype, tokens, first)


def sample_documents(prefix: str, tokenizer: Tokenizer, count: int, seed: int) -> list[tuple[int, str]]:
    """Numbers and decoded text of ``count`` documents, or all if there are fewer.

    Raises:
        DataError: the pair was made with another tokenizer, or cannot be read.
    """
    manifest, documents = read_manifest(prefix), Documents(prefix)
    if manifest is not None and manifest.tokenizer.sha256 != tokenizer.sha256:
        raise DataError(
            f"{prefix} was made with a tokenizer of SHA-256 {manifest.tokenizer.sha256}, and "
            f"{tokenizer.path} is {tokenizer.sha256}: give the former"
        )
    order = Permutation(len(documents), "sample", seed)
    numbers = [order[place] for place in range(min(count, len(documents)))]
    return [(number, tokenizer.decode(documents[number].tolist())) for number in numbers]
