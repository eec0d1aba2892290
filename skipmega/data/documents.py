"""Single documents of a pair: read, sampled, shuffled."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from numpy.typing import NDArray

from skipmega.data.files import flush_to_disk, sha256_of
from skipmega.data.indexed import document_places
from skipmega.data.manifest import FileRecord, Manifest, manifest_path, read_manifest
from skipmega.data.permutation import Permutation
from skipmega.data.token_reader import TokenReader
from skipmega.data.tokenizer import Tokenizer
from skipmega.errors import DataError


class Documents:
    """The documents of the pair ``prefix``, each an integer array [tokens], its end token included.

    Raises:
        DataError: there is no such pair, or none that can be read.
    """

    def __init__(self, prefix: str) -> None:
        self._dtype, self._lengths, self._pointers = document_places(prefix)
        self._reader = TokenReader(f"{prefix}.bin", retries=0)

    def __len__(self) -> int:
        return len(self._lengths)

    def __getitem__(self, number: int) -> NDArray[Any]:
        return self._reader.read(self._dtype, int(self._lengths[number]), int(self._pointers[number]))


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


def shuffle_documents(prefix: str, output: Path, seed: int) -> Manifest:
    """Write the documents of a pair to another in an order drawn of ``seed``.

    Samples of the order ``stream`` are cut from files as they are: without this, neighbours in the corpus are
    neighbours in a sample. Reads document by document at random, and holds their lengths only.

    Raises:
        DataError: ``prefix`` has no manifest or cannot be read, or the output exists.
    """
    manifest = read_manifest(prefix)
    if manifest is None:
        raise DataError(f"{manifest_path(prefix)} is missing: prepare the data with skipmega to shuffle it")
    names = [Path(f"{output}.{ending}") for ending in ("bin", "idx", "manifest.json")]
    if existing := [name for name in names if name.exists()]:
        raise DataError(f"{existing[0]} exists: choose another output, or remove it")
    documents = Documents(prefix)
    order = Permutation(len(documents), "documents", seed)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as folder:
        written = [Path(folder) / name.name for name in names]
        builder = IndexedDatasetBuilder(str(written[0]), dtype=np.dtype(manifest.dtype).type)
        for place in range(len(documents)):
            document = documents[order[place]]
            builder.add_document(document, [len(document)])
        builder.finalize(str(written[1]))
        shuffled = manifest.model_copy(
            update={
                "bin": FileRecord(bytes=written[0].stat().st_size, sha256=sha256_of(written[0])),
                "idx": FileRecord(bytes=written[1].stat().st_size, sha256=sha256_of(written[1])),
                "shuffle_seed": seed,
            }
        )
        written[2].write_text(shuffled.model_dump_json(indent=2) + "\n", encoding="utf-8")
        for path, name in zip(written, names, strict=True):
            flush_to_disk(path)
            shutil.move(path, name)
    return shuffled
