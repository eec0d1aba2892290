"""A corpus that every machine has: the Python source of the running interpreter and its packages.

The files are taken in the order of a hash of their relative names, which mixes packages and is the same
wherever the same versions are installed.
"""

import hashlib
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from skipmega.data.corpora.readers import Document
from skipmega.data.files import atomic_write
from skipmega.errors import DataError

SMALLEST_USEFUL_BYTES = 10_000_000

_SMALLEST_FILE = 256
_LARGEST_FILE = 200_000
_NOT_ORDINARY_CODE = frozenset({"__pycache__", "test", "tests", "testing", "idlelib", "lib2to3"})


def python_documents(roots: dict[str, Path] | None = None) -> Iterator[Document]:
    """Python source files as documents, ``where`` being the name relative to its root.

    Left out: tests, files below 256 or above 200000 bytes, files that are not UTF-8, and every file whose
    content has come before under another name.

    Args:
        roots: named folders to search; left out, the standard library and the installed packages.
    """
    seen: set[bytes] = set()
    for name, path in sorted(_list_sources(roots or _interpreter_roots()), key=_shuffled):
        try:
            content = path.read_bytes()
            text = content.decode()
        except (OSError, UnicodeDecodeError):
            continue
        digest = hashlib.sha256(content).digest()
        if digest not in seen:
            seen.add(digest)
            yield Document(text, name)


def write_python_corpus(path: str | Path, target_bytes: int, roots: dict[str, Path] | None = None) -> int:
    """Write :func:`python_documents` as JSON lines (``text``, ``source``) until ``target_bytes`` are reached.

    Args:
        path: the file to write; replaced if it exists.
        target_bytes: UTF-8 bytes of text.
        roots: see :func:`python_documents`.

    Returns:
        UTF-8 bytes of text written, less than ``target_bytes`` where there is no more.

    Raises:
        DataError: less than both ``target_bytes`` and 10 MB were found.
    """
    written = documents = 0
    with atomic_write(Path(path)) as stream:
        for document in python_documents(roots):
            record = {"text": document.text, "source": document.where}
            stream.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
            written += len(document.text.encode())
            documents += 1
            if written >= target_bytes:
                break
        if written < min(target_bytes, SMALLEST_USEFUL_BYTES):
            raise DataError(
                f"found only {written} bytes in {documents} Python files, and {SMALLEST_USEFUL_BYTES} are "
                "needed: install the package's requirements into this interpreter"
            )
    return written


def _interpreter_roots() -> dict[str, Path]:
    paths = sysconfig.get_paths()
    return {"stdlib": Path(paths["stdlib"]), "packages": Path(paths["purelib"])}


def _list_sources(roots: dict[str, Path]) -> Iterator[tuple[str, Path]]:
    """(relative name, path) of the candidates; a root within another belongs to itself alone."""
    for root_name, root in roots.items():
        inner = [other for other in roots.values() if other != root and root in other.parents]
        for path in root.rglob("*.py"):
            relative = path.relative_to(root)
            if (
                not _NOT_ORDINARY_CODE.intersection(relative.parts)
                and not any(other in path.parents for other in inner)
                and path.is_file()
                and _SMALLEST_FILE <= path.stat().st_size <= _LARGEST_FILE
            ):
                yield f"{root_name}/{relative.as_posix()}", path


def _shuffled(source: tuple[str, Path]) -> bytes:
    return hashlib.sha256(source[0].encode()).digest()
