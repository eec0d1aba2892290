"""The file that makes a checkpoint complete: size and SHA-256 of every other file, written last."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from skipmega.data.files import flush_to_disk, sha256_of

NAME = "manifest.json"


def describe_file(path: Path) -> dict[str, Any]:
    """Size in bytes and SHA-256 of a file that is on disk when this returns."""
    flush_to_disk(path)
    return {"size": path.stat().st_size, "sha256": sha256_of(path)}


def write_manifest(folder: Path, files: Mapping[str, dict[str, Any]]) -> None:
    """Write the manifest of ``files``, by path below ``folder``; it and all names are then on disk."""
    path = folder / NAME
    path.write_text(json.dumps({"format": 2, "files": files}, indent=2, sort_keys=True))
    flush_to_disk(path)
    for directory in {folder, *((folder / name).parent for name in files)}:
        flush_folder(directory)


def flush_folder(folder: Path) -> None:
    """Wait until the names in ``folder`` are on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def incompleteness(folder: Path) -> str | None:
    """What is missing or has another size; None when all files are there. Reads the manifest only."""
    try:
        files = _listed(folder)
    except FileNotFoundError:
        return f"{NAME} is missing (it was never finished)"
    except OSError as error:
        return f"{NAME} cannot be read: {error.strerror}"
    if files is None:
        return f"{NAME} is not readable"
    for name, entry in files.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != entry["size"]:
            return f"{name} has {file.stat().st_size} bytes instead of {entry['size']}"
    return None


def damage(folder: Path, share: int = 0, shares: int = 1) -> str | None:
    """What is wrong with the checkpoint in ``folder``; None when it is sound.

    Every ``shares``-th file is read, beginning with number ``share``, so that processes can divide the work.
    """
    problem = incompleteness(folder)
    if problem is not None:
        return problem
    files = _listed(folder)
    assert files is not None
    for name in sorted(files)[share::shares]:
        expected = files[name].get("sha256")
        try:
            if expected is not None and sha256_of(folder / name) != expected:
                return f"{name} is not what was written (its SHA-256 differs)"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None


def _listed(folder: Path) -> dict[str, dict[str, Any]] | None:
    """The entries of the manifest, None if it is not one. The first format had sizes alone."""
    try:
        files = json.loads((folder / NAME).read_text())["files"]
        entries = {
            name: {"size": entry} if isinstance(entry, int) else entry for name, entry in files.items()
        }
        return entries if all(isinstance(entry["size"], int) for entry in entries.values()) else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
