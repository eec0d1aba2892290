"""Prepared documents in another order: shuffled over all pairs of a source, and packed into samples.

Each shard of the result is made by itself of what it draws from all pairs, in any process and at any time:
which documents those are follows from the seed and the pairs' checksums.
"""

import hashlib
import multiprocessing
import resource
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from numpy.typing import NDArray

from skipmega import __version__
from skipmega.data.files import flush_to_disk, sha256_of
from skipmega.data.pairs.documents import Documents
from skipmega.data.pairs.manifest import (
    ArrangementRecord,
    FileRecord,
    Manifest,
    manifest_path,
    read_manifest,
)
from skipmega.data.pairs.packing import pack
from skipmega.data.permutation import scattered
from skipmega.data.progress import Progress
from skipmega.errors import DataError

_SAME = ("part", "valid_fraction", "dtype", "text_field", "tokenizer")


@dataclass(frozen=True)
class Arrangement:
    """An order for the documents of some pairs.

    Attributes:
        prefixes: the pairs, without their endings.
        output: path of the result; of several shards each has its number after it.
        seed: of the order.
        shards: pairs of the result.
        sequence_length: of the samples that documents are packed into; None leaves them end to end.

    Raises:
        DataError: there cannot be so few shards or tokens in a sample.
    """

    prefixes: tuple[str, ...]
    output: Path
    seed: int = 0
    shards: int = 1
    sequence_length: int | None = None

    def __post_init__(self) -> None:
        if self.shards < 1:
            raise DataError(f"{self.shards} shards: give at least 1")
        if self.sequence_length is not None and self.sequence_length < 2:
            raise DataError(f"samples of {self.sequence_length} tokens: give at least 2")

    def check(self) -> list[Manifest]:
        """The manifests of the pairs.

        Raises:
            DataError: a pair has none, or fits not the others.
        """
        manifests = [_manifest_of(prefix) for prefix in self.prefixes]
        _check_alike(self.prefixes, manifests)
        return manifests

    def target(self, shard: int) -> Path:
        """Path of a shard, without an ending."""
        if self.shards == 1:
            return self.output
        return self.output.with_name(f"{self.output.name}-{shard:05d}")


def arrange(arrangement: Arrangement, workers: int) -> list[Manifest]:
    """Make all shards that are not there yet, on ``workers`` processes.

    Raises:
        DataError: as :func:`arrange_shard`; or a process died.
    """
    shards = range(arrangement.shards)
    if workers == 1 or len(shards) == 1:
        return [arrange_shard(arrangement, shard) for shard in shards]
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("fork")) as pool:
        try:
            return list(pool.map(arrange_shard, [arrangement] * len(shards), shards))
        except BrokenProcessPool:
            raise DataError(
                f"one of {workers} processes died, probably out of memory: use fewer, or more shards; "
                "what is finished stays"
            ) from None


def arrange_shard(arrangement: Arrangement, shard: int) -> Manifest:
    """Write one shard, whole or not at all; nothing if that was done before.

    Documents are read one by one where they are, those of all pairs in turn. Memory holds their lengths
    and places: an estimated 50 bytes for each of the shard's; packing adds 240 at its peak, at 1.9 pieces a
    document.

    Raises:
        DataError: there is no such shard, what is there was made of something else, or as
            :meth:`Arrangement.check`.
    """
    if not 0 <= shard < arrangement.shards:
        raise DataError(
            f"shard {shard} of {arrangement.shards}: number them from 0 to {arrangement.shards - 1}"
        )
    manifests = arrangement.check()
    planned = ArrangementRecord(
        seed=arrangement.seed,
        pairs=len(manifests),
        content=hashlib.sha256(" ".join(each.bin.sha256 for each in manifests).encode()).hexdigest(),
        shard=shard,
        shards=arrangement.shards,
        sequence_length=arrangement.sequence_length,
    )
    target = arrangement.target(shard)
    if (done := _finished(target, planned)) is not None:
        return done
    return _write(target, planned, [Documents(prefix) for prefix in arrangement.prefixes], manifests)


def _manifest_of(prefix: str) -> Manifest:
    manifest = read_manifest(prefix)
    if manifest is None:
        raise DataError(f"{manifest_path(prefix)} is missing: prepare the data with skipmega to shuffle it")
    if manifest.packed_for is not None:
        raise DataError(
            f"{prefix} is packed for samples of {manifest.packed_for} tokens: shuffle what it was made of"
        )
    return manifest


def _check_alike(prefixes: Sequence[str], manifests: Sequence[Manifest]) -> None:
    for prefix, manifest in zip(prefixes, manifests, strict=True):
        for name in _SAME:
            here, there = getattr(manifest, name), getattr(manifests[0], name)
            if here != there:
                raise DataError(
                    f"{prefix} and {prefixes[0]} cannot be shuffled together: {name} is {here} and {there}"
                )


def _finished(target: Path, planned: ArrangementRecord) -> Manifest | None:
    """The manifest of a shard that is there."""
    manifest = read_manifest(target)
    if manifest is None:
        if existing := [path for path in _names(target) if path.exists()]:
            raise DataError(f"{existing[0]} exists without a manifest: choose another output, or remove it")
        return None
    found = manifest.arranged
    if found is None or found.model_copy(update={"padding": 0, "cut": 0}) != planned:
        raise DataError(
            f"{target} exists and is something else ({found or 'in the order of its corpus'}, not "
            f"{planned}): choose another output, or remove it"
        )
    return manifest


def _names(target: Path) -> list[Path]:
    return [Path(f"{target}.bin"), Path(f"{target}.idx"), manifest_path(target)]


@dataclass(frozen=True)
class _Pieces:
    """What is written, in order: ``tokens`` from ``start`` on of a document of a pair, and ``padding`` ends
    of documents; all int64 [pieces]."""

    pair: NDArray[np.int64]
    document: NDArray[np.int64]
    start: NDArray[np.int64]
    tokens: NDArray[np.int64]
    padding: NDArray[np.int64]
    cut: int = 0

    def __iter__(self) -> Iterator[tuple[int, int, int, int, int]]:
        columns = (self.pair, self.document, self.start, self.tokens, self.padding)
        for at in range(0, len(self.pair), 1 << 16):
            yield from zip(*(column[at : at + (1 << 16)].tolist() for column in columns), strict=True)


def _write(
    target: Path, planned: ArrangementRecord, opened: Sequence[Documents], manifests: Sequence[Manifest]
) -> Manifest:
    pieces = _packed(_drawn(planned, opened, manifests), planned)
    total, first = int((pieces.tokens + pieces.padding).sum()), manifests[0]
    if total == 0:
        raise DataError(f"no document for {target}: {planned.shards} shards are too many, give fewer")
    dtype = np.dtype(first.dtype)
    _allow_open_files()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
        data, index, said = written = [Path(folder) / path.name for path in _names(target)]
        builder, done = IndexedDatasetBuilder(str(data), dtype=dtype.type), 0
        with Progress(f"shuffle {target.name}", total * dtype.itemsize, of="tokens") as progress:
            for number, (pair, document, start, tokens, padding) in enumerate(pieces):
                piece = opened[pair].read(document, start, tokens)
                piece = np.append(piece, np.full(padding, first.tokenizer.eod_id, dtype))
                builder.add_document(piece, [len(piece)])
                done += piece.nbytes
                progress.update(done, done, number + 1)
        builder.finalize(str(index))
        manifest = first.model_copy(
            update={
                "skipmega_version": __version__,
                "documents": len(pieces.pair),
                "tokens": total,
                "text_bytes": _text_bytes(pieces, manifests),
                "max_token_id": max(each.max_token_id for each in manifests),
                "bin": FileRecord(bytes=data.stat().st_size, sha256=sha256_of(data)),
                "idx": FileRecord(bytes=index.stat().st_size, sha256=sha256_of(index)),
                "empty_documents": sum(each.empty_documents for each in manifests),
                "bad_records": sum(each.bad_records for each in manifests),
                "sources": tuple(dict.fromkeys(source for each in manifests for source in each.sources)),
                "cleaned": tuple({c.sha256: c for each in manifests for c in each.cleaned}.values()),
                "arranged": planned.model_copy(
                    update={"padding": int(pieces.padding.sum()), "cut": pieces.cut}
                ),
            }
        )
        said.write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
        for path in written:
            flush_to_disk(path)
        for path, name in zip(written, _names(target), strict=True):
            path.replace(name)
    return manifest


def _drawn(planned: ArrangementRecord, opened: Sequence[Documents], manifests: Sequence[Manifest]) -> _Pieces:
    """The shard's documents, each whole, in a random order."""
    pairs, documents, lengths, draws = [], [], [], []
    for number, (each, manifest) in enumerate(zip(opened, manifests, strict=True)):
        draw = scattered(len(each), "documents", planned.seed, manifest.bin.sha256)
        chosen = np.flatnonzero(draw % np.uint64(planned.shards) == planned.shard)
        pairs.append(np.full(len(chosen), number))
        documents.append(chosen)
        lengths.append(each.lengths[chosen].astype(np.int64))
        draws.append(draw[chosen])
    order = np.argsort(np.concatenate(draws) // np.uint64(planned.shards), kind="stable")
    pair, document, tokens = (np.concatenate(column)[order] for column in (pairs, documents, lengths))
    nothing = np.zeros_like(tokens)
    return _Pieces(pair, document, nothing, tokens, nothing)


def _packed(drawn: _Pieces, planned: ArrangementRecord) -> _Pieces:
    """The same documents packed, samples in a random order; padding follows the last piece of a sample."""
    if planned.sequence_length is None:
        return drawn
    packing = pack(drawn.tokens, planned.sequence_length + 1)
    place = np.argsort(scattered(len(packing.padding), "samples", planned.seed, planned.shard), kind="stable")
    rank = np.empty_like(place)
    rank[place] = np.arange(len(place))
    order = np.lexsort((-packing.tokens, rank[packing.sample]))
    sample = packing.sample[order]
    is_last = np.append(sample[1:] != sample[:-1], True)
    document = packing.document[order]
    return _Pieces(
        drawn.pair[document],
        drawn.document[document],
        packing.start[order],
        packing.tokens[order],
        np.where(is_last, packing.padding[sample], 0),
        packing.cut,
    )


def _text_bytes(pieces: _Pieces, manifests: Sequence[Manifest]) -> int:
    tokens = np.bincount(pieces.pair, weights=pieces.tokens, minlength=len(manifests))
    shares = (
        count / max(each.tokens, 1) * each.text_bytes for count, each in zip(tokens, manifests, strict=True)
    )
    return round(sum(shares))


def _allow_open_files() -> None:
    """As many as the system lets this process have: each pair is one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
