"""Corpora to tokenized data sets: megatron-core's ``.bin``/``.idx`` pairs, each with a manifest."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from numpy.typing import NDArray

from skipmega import __version__
from skipmega.data.corpora.readers import Corpus
from skipmega.data.files import flush_to_disk, sha256_of
from skipmega.data.pairs.manifest import FileRecord, Manifest, SourceRecord, TokenizerRecord, manifest_path
from skipmega.data.progress import Progress
from skipmega.data.tokenizer import Tokenizer
from skipmega.data.tokenizing.encode import encode_documents, token_dtype
from skipmega.errors import DataError

Part = Literal["all", "train", "valid"]


@dataclass(frozen=True)
class PreparedPair:
    """A finished data set: the path of its files without the ending, and its manifest."""

    prefix: Path
    manifest: Manifest


def prepare_dataset(
    corpus: Corpus,
    prefix: str | Path,
    tokenizer: Tokenizer,
    *,
    workers: int = 1,
    valid_fraction: float = 0.0,
    overwrite: bool = False,
    allow_empty: bool = False,
) -> list[PreparedPair]:
    """Tokenize a corpus into ``<prefix>.bin``, ``.idx`` and ``.manifest.json``.

    Every document is followed by the end-of-document token; documents of nothing but white space are left
    out. The files are bit-identical for any number of workers. They are written in a hidden folder beside
    their place and moved there when all are complete and on disk, the manifest last.

    Args:
        corpus: what to read.
        prefix: path of the result without an ending.
        tokenizer: its vocabulary decides the integer type of the tokens.
        workers: tokenizing processes.
        valid_fraction: share of documents, in [0, 1), that goes to a second pair ``<prefix>-valid``,
            chosen by a hash of their text.
        overwrite: replace what exists under these names.
        allow_empty: a pair may be without documents.

    Returns:
        The pair, and the held-out pair if one was asked for.

    Raises:
        DataError: a result exists, the corpus is unreadable, or a pair would have no document.
    """
    with new_pairs(Path(prefix), tokenizer, valid_fraction, overwrite, allow_empty) as writers:
        empty = _write_documents(corpus, tokenizer, writers, workers, valid_fraction)
        return finish_pairs(writers, corpus, tokenizer, valid_fraction, empty)


def pair_targets(prefix: Path, valid_fraction: float) -> dict[Part, Path]:
    """Where the pairs of a preparation go, by what part of the corpus they hold.

    Raises:
        DataError: ``valid_fraction`` is no share.
    """
    if not 0 <= valid_fraction < 1:
        raise DataError(f"valid_fraction={valid_fraction} must be at least 0 and less than 1")
    if valid_fraction == 0:
        return {"all": prefix}
    return {"train": prefix, "valid": prefix.with_name(f"{prefix.name}-valid")}


@contextmanager
def new_pairs(
    prefix: Path, tokenizer: Tokenizer, valid_fraction: float, overwrite: bool, allow_empty: bool = False
) -> Iterator[list["PairWriter"]]:
    """Writers of the pairs of a preparation, in a hidden folder that is gone in the end.

    Raises:
        DataError: a pair exists that is not to be replaced.
    """
    targets = pair_targets(prefix, valid_fraction)
    for target in targets.values():
        _check_free(target, overwrite)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{prefix.name}.", dir=prefix.parent) as folder:
        yield [
            PairWriter(part, target, Path(folder), tokenizer, allow_empty) for part, target in targets.items()
        ]


def finish_pairs(
    writers: Sequence["PairWriter"], corpus: Corpus, tokenizer: Tokenizer, valid_fraction: float, empty: int
) -> list[PreparedPair]:
    """Complete all pairs, then move all to their places.

    Args:
        empty: number of documents left out because they were empty.
    """
    pairs = [
        PreparedPair(writer.target, writer.finish(corpus, tokenizer, valid_fraction, empty))
        for writer in writers
    ]
    for writer in writers:
        writer.publish()
    return pairs


def _check_free(prefix: Path, overwrite: bool) -> None:
    existing = [name for name in _final_names(prefix) if name.exists()]
    if existing and not overwrite:
        raise DataError(
            f"{existing[0]} exists: choose another output, or replace what is there with --overwrite"
        )


def _final_names(prefix: Path) -> tuple[Path, Path, Path]:
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx"), manifest_path(prefix)


def _write_documents(
    corpus: Corpus,
    tokenizer: Tokenizer,
    writers: Sequence["PairWriter"],
    workers: int,
    valid_fraction: float,
) -> int:
    """Send every document to the first or (held out) the last writer; return the number of empty ones."""
    empty = text_bytes = documents = 0
    with Progress("prepare", corpus.total_bytes) as progress:
        for encoded in encode_documents(corpus, tokenizer, workers=workers, valid_fraction=valid_fraction):
            for tokens, held_out, size in zip(
                encoded.documents, encoded.held_out, encoded.text_bytes, strict=True
            ):
                writers[-1 if held_out else 0].add(tokens, size)
            empty += encoded.empty
            text_bytes += sum(encoded.text_bytes)
            documents += len(encoded.documents)
            progress.update(corpus.bytes_read, text_bytes, documents)
    return empty


class PairWriter:
    """One pair on its way: written in ``folder``, moved to ``target`` by :meth:`publish`."""

    def __init__(
        self, part: Part, target: Path, folder: Path, tokenizer: Tokenizer, allow_empty: bool
    ) -> None:
        self.part = part
        self._allow_empty = allow_empty
        self.target = target
        self._partial = _final_names(folder / target.name)
        self._dtype = token_dtype(tokenizer.size)
        self._builder = IndexedDatasetBuilder(str(self._partial[0]), dtype=self._dtype)
        self._documents = self._tokens = self._text_bytes = 0
        self._max_token_id = -1

    def add(self, tokens: NDArray[Any], text_bytes: int) -> None:
        """Append one document, an integer array [tokens]."""
        self._builder.add_document(tokens, [len(tokens)])
        self._documents += 1
        self._tokens += len(tokens)
        self._text_bytes += text_bytes
        self._max_token_id = max(self._max_token_id, int(tokens.max()))

    def add_pair(self, prefix: Path, manifest: Manifest) -> None:
        """Append all documents of a finished pair of the same tokenizer."""
        self._builder.add_index(str(prefix))
        self._documents += manifest.documents
        self._tokens += manifest.tokens
        self._text_bytes += manifest.text_bytes
        self._max_token_id = max(self._max_token_id, manifest.max_token_id)

    def finish(
        self, corpus: Corpus, tokenizer: Tokenizer, valid_fraction: float, empty_documents: int
    ) -> Manifest:
        """Complete the files in the folder, down to the disk.

        Raises:
            DataError: no document was added, and that is not allowed.
        """
        data, index, manifest_file = self._partial
        if self._documents == 0 and not self._allow_empty:
            raise DataError(
                f"no document for {self.target}: {len(corpus.files)} files gave {empty_documents} empty "
                f"documents, {corpus.bad_records} bad records"
                + (f" ({corpus.last_bad})" if corpus.last_bad else "")
                + (f", and valid_fraction={valid_fraction} left this part none" if self.part != "all" else "")
            )
        self._builder.finalize(str(index))
        manifest = Manifest(
            skipmega_version=__version__,
            part=self.part,
            valid_fraction=valid_fraction,
            documents=self._documents,
            tokens=self._tokens,
            text_bytes=self._text_bytes,
            max_token_id=self._max_token_id,
            dtype=self._dtype.__name__,
            bin=FileRecord(bytes=data.stat().st_size, sha256=sha256_of(data)),
            idx=FileRecord(bytes=index.stat().st_size, sha256=sha256_of(index)),
            empty_documents=empty_documents,
            bad_records=corpus.bad_records,
            text_field=corpus.text_field,
            sources=tuple(SourceRecord(path=str(file.path), bytes=file.size) for file in corpus.files),
            tokenizer=TokenizerRecord(
                sha256=tokenizer.sha256, vocab_size=tokenizer.size, eod_id=tokenizer.eod_id
            ),
            cleaned=corpus.cleaned,
        )
        manifest_file.write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
        for file in self._partial:
            flush_to_disk(file)
        return manifest

    def publish(self) -> None:
        """Move the files to their final names, so that at no moment an old file stands beside a new one."""
        data, index, manifest_file = _final_names(self.target)
        manifest_file.unlink(missing_ok=True)
        index.unlink(missing_ok=True)
        for partial, final in zip(self._partial, (data, index, manifest_file), strict=True):
            partial.replace(final)
