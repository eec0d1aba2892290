"""From a model and texts to a folder with a page, its figures and the numbers."""

import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skipmega.data.files import atomic_write
from skipmega.errors import ConfigError, DataError
from skipmega.inspection.drawing import check_matplotlib
from skipmega.inspection.routers.kinds import TokenText, find_kinds
from skipmega.inspection.routers.subject import Subject
from skipmega.inspection.routers.texts import Texts, read_texts
from skipmega.inspection.routers.tracing import Traces, trace_texts

PAGE, NUMBERS = "index.html", "inspection.json"


def prepare_output(out_dir: str | Path) -> Path:
    """Make the folder and see that it can be written to, before hours are spent.

    Raises:
        ConfigError: it cannot, or a library that draws or counts is missing.
    """
    out = Path(out_dir)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make the output folder {out}: {error.strerror}; name another") from None
    if not os.access(out, os.W_OK | os.X_OK):
        raise ConfigError(f"the output folder {out} is not writable: name another")
    check_matplotlib()
    if importlib.util.find_spec("scipy") is None:
        raise ConfigError("inspection needs scipy, which is not installed: pip install 'skipmega[report]'")
    return out


def inspect_routers(
    subject: Subject,
    paths: Mapping[str, Path],
    out_dir: str | Path,
    *,
    max_tokens: int,
    shown_tokens: int,
    batch_size: int = 4,
    frequencies: NDArray[np.int64] | None = None,
    seed: int = 0,
    text_field: str = "text",
    skip_bad: bool = False,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Write ``index.html``, ``inspection.json`` and figures.

    Args:
        subject: the model.
        paths: text files, or any other files or folders of a corpus, by the name of their source.
        out_dir: made if absent; files of these names are replaced.
        max_tokens: read from each source.
        shown_tokens: of each source on the page.
        batch_size: sequences in one call of the model.
        frequencies: [ids] how often each occurs in training; None counts in the texts themselves.
        seed: of the confidence intervals.
        text_field: of JSON lines and parquet files.
        skip_bad: leave out records without usable text instead of raising.
        show_progress: draw progress bars.

    Returns:
        the content of ``inspection.json``.

    Raises:
        ConfigError: ``out_dir`` cannot be written to, or a library is missing.
        DataError: a text is missing, damaged or empty, or a loss is no number.
    """
    out = prepare_output(out_dir)
    from skipmega.inspection.routers.findings import find_out
    from skipmega.inspection.routers.page import build_page
    from skipmega.inspection.routers.pictures import write_pictures

    texts = read_texts(paths, subject.vocabulary, max_tokens, text_field, skip_bad)
    traces = trace_texts(subject, texts, batch_size, show_progress)
    token_texts = find_kinds(texts.documents, subject.vocabulary.pieces)
    kind = np.concatenate([text.kind for text in token_texts])
    counts = _count(traces.ids, subject.vocab_size, frequencies)
    findings = find_out(subject, texts, traces, kind, counts, seed, show_progress=show_progress)
    shown = _shown(texts, traces, token_texts, kind, counts, shown_tokens)
    _write(out / NUMBERS, json.dumps(findings, indent=1, allow_nan=False, ensure_ascii=False))
    _write(out / PAGE, build_page(findings, shown))
    write_pictures(findings, shown[0]["text"], traces.executed[:, : len(shown[0]["text"])], out)
    return findings


def _count(
    ids: NDArray[np.int64], vocab_size: int, frequencies: NDArray[np.int64] | None
) -> NDArray[np.int64]:
    """[n] how often each token's id occurs."""
    if frequencies is None:
        frequencies = np.bincount(ids, minlength=vocab_size)
    if len(frequencies) < vocab_size:
        raise DataError(
            f"frequencies are of {len(frequencies)} ids, and the model has a vocabulary of {vocab_size}: "
            "count data of the same tokenizer"
        )
    counts: NDArray[np.int64] = frequencies[ids]
    return counts


def _shown(
    texts: Texts,
    traces: Traces,
    token_texts: Sequence[TokenText],
    kind: NDArray[np.int64],
    counts: NDArray[np.int64],
    most: int,
) -> list[dict[str, Any]]:
    """The beginning of each source, as the page has it."""
    shown = []
    for number, source in enumerate(texts.sources):
        here = np.flatnonzero(traces.source == number)[:most]
        words: list[str] = []
        for document in dict.fromkeys(traces.document[here].tolist()):
            words += token_texts[document].shown()
        bits = traces.executed[:, here].T.astype(int)
        shown.append(
            {
                "name": source.name,
                "text": words[: len(here)],
                "document": traces.document[here].tolist(),
                "kind": kind[here].tolist(),
                "executed": ["".join(map(str, row)) for row in bits],
                "loss": [round(value, 3) for value in traces.loss[here].tolist()],
                "surprise": [round(value, 3) for value in traces.surprise[here].tolist()],
                "count": counts[here].tolist(),
            }
        )
    return shown


def _write(path: Path, content: str) -> None:
    with atomic_write(path) as stream:
        stream.write(content.encode())
