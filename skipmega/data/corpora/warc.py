"""Plain text out of WARC files (Common Crawl's WET), so that a file cut off is an error and not an end."""

from collections.abc import Iterator
from typing import BinaryIO


class WarcError(ValueError):
    """A file that is not WARC, is cut off, or holds pages instead of their text."""


def read_conversions(stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """The content of the records of type ``conversion``, each with its number among all records, from 1.

    Raises:
        WarcError: as it says, with the record's number.
    """
    number = 0
    while headers := _headers(stream, number + 1):
        number += 1
        kind = headers.get("warc-type", "")
        if kind == "response":
            raise WarcError(f"record {number} is a page, not its text: give WET files (.warc.wet.gz)")
        try:
            length = int(headers["content-length"])
        except (KeyError, ValueError):
            raise WarcError(f"record {number} has no Content-Length") from None
        content = stream.read(length)
        if len(content) < length:
            raise WarcError(f"it ends {length - len(content)} bytes before record {number} does")
        if kind == "conversion":
            yield number, content


def _headers(stream: BinaryIO, number: int) -> dict[str, str]:
    """Those of the next record, by lower-case names; none at the end of the file."""
    line = stream.readline()
    while line in (b"\r\n", b"\n"):
        line = stream.readline()
    if line and not line.startswith(b"WARC/"):
        raise WarcError(f"record {number} begins with {line[:20]!r} instead of WARC/")
    headers = {"warc-version": line.decode("latin-1")} if line else {}
    while line and (line := stream.readline()).strip():
        name, _, value = line.decode("utf-8", "replace").partition(":")
        headers[name.strip().lower()] = value.strip()
    if headers and not line:
        raise WarcError(f"it ends within the headers of record {number}")
    return headers
