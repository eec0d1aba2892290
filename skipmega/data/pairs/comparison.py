"""What a manifest says, and how two differ, for people."""

from collections.abc import Mapping

from skipmega.data.pairs.manifest import Manifest, manifest_path, read_manifest
from skipmega.errors import DataError

_COMPARED = (
    "skipmega_version", "part", "valid_fraction", "documents", "tokens", "text_bytes", "max_token_id",
    "dtype", "empty_documents", "bad_records", "text_field", "arranged", "cleaned",
)  # fmt: skip


def listed(prefix: str) -> Manifest:
    """The manifest of the pair ``prefix``.

    Raises:
        DataError: there is none.
    """
    manifest = read_manifest(prefix)
    if manifest is None:
        raise DataError(f"{manifest_path(prefix)} is missing: there is nothing to tell of {prefix}")
    return manifest


def describe(prefix: str) -> str:
    """A pair in a few lines: what it holds, what was dropped, what made it."""
    found = listed(prefix)
    lines = [
        f"  cleaned in {cleaning.path} ({cleaning.sha256[:12]}): of {cleaning.given} documents "
        f"{cleaning.kept} kept; {_listed_counts(cleaning.dropped)}"
        for cleaning in found.cleaned
    ]
    return "\n".join((_describe_pair(prefix, found), *lines))


def _listed_counts(dropped: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "nothing dropped"


def _describe_pair(prefix: str, found: Manifest) -> str:
    ratio = found.text_bytes / max(found.tokens, 1)
    return (
        f"{prefix}: {found.documents} documents, {found.tokens} tokens of {found.dtype} ({found.bin.bytes} "
        f"bytes), {ratio:.2f} bytes of text a token, {_describe_order(found)}\n"
        f"  part {found.part} of {len(found.sources)} files with "
        f"{sum(source.bytes for source in found.sources)} bytes; dropped: {found.empty_documents} empty "
        f"documents, {found.bad_records} bad records\n"
        f"  tokenizer {found.tokenizer.sha256[:12]} of {found.tokenizer.vocab_size} ids, skipmega "
        f"{found.skipmega_version}; tokens {found.bin.sha256[:12]}, index {found.idx.sha256[:12]}"
    )


def _describe_order(found: Manifest) -> str:
    arranged = found.arranged
    if arranged is None:
        return "in the corpus's order"
    of = (
        f", shard {arranged.shard} of {arranged.shards} of {arranged.pairs} pairs"
        if arranged.shards > 1
        else ""
    )
    packed = (
        ""
        if arranged.sequence_length is None
        else f", packed for {arranged.sequence_length} tokens: {arranged.padding / max(found.tokens, 1):.3%} "
        f"padding, {arranged.cut} documents cut"
    )
    return f"shuffled by {arranged.seed}{of}{packed}"


def differences(one: str, other: str) -> list[str]:
    """A line for everything in which the manifests of two pairs differ; none if they hold the same tokens,
    made of the same by the same."""
    here, there = listed(one), listed(other)
    lines = [
        f"{name}: {getattr(here, name)} and {getattr(there, name)}"
        for name in _COMPARED
        if getattr(here, name) != getattr(there, name)
    ]
    for name in ("bin", "idx", "tokenizer"):
        sums = getattr(here, name).sha256, getattr(there, name).sha256
        if sums[0] != sums[1]:
            lines.append(f"SHA-256 of {name}: {sums[0][:12]} and {sums[1][:12]}")
    files = [{source.path: source.bytes for source in found.sources} for found in (here, there)]
    for path in sorted(files[0].keys() | files[1].keys()):
        sizes = [sources.get(path) for sources in files]
        if sizes[0] != sizes[1]:
            of = ["not a source" if size is None else f"{size} bytes" for size in sizes]
            lines.append(f"source {path}: {of[0]} and {of[1]}")
    return lines
