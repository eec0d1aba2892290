"""How fast a corpus becomes tokens, beside sentencepiece alone and the ways of megatron-core and datatrove.

Each measurement is a process of its own that has everything loaded when it begins. On a shared machine its
time on processors counts, with that of its children, and time on the clock says little.
"""

import json
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron.core.tokenizers.text.libraries.sentencepiece_tokenizer import SentencePieceTokenizer

from skipmega.data.corpora.readers import Corpus
from skipmega.data.tokenizer import Tokenizer
from skipmega.data.tokenizing.prepare import prepare_dataset
from skipmega.hf.tokenizer import export_tokenizer

Way = Callable[[], None]
_FORK = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Cost:
    """Of one measurement: seconds on processors and on the clock, most MiB resident in one process above
    what was resident before."""

    processor: float
    clock: float
    mib: float


def ways(
    corpus: Path, tokenizer: Tokenizer, folder: Path, processes: Sequence[int] = (1, 2)
) -> dict[str, Way]:
    """What is compared, by name, each from the file to what it writes in ``folder``, by so many processes.

    ``sentencepiece`` has the texts in memory and writes nothing: nothing that uses it is faster. By several
    processes it tells what the host's cores lose by being busy together.
    """
    texts = [document.text for document in Corpus([corpus])]

    def ours(workers: int) -> Way:
        def prepare() -> None:
            target = folder / f"ours-{workers}"
            prepare_dataset(Corpus([corpus]), target, tokenizer, workers=workers, overwrite=True)

        return prepare

    theirs = {number: _megatron(corpus, tokenizer, folder, number) for number in processes}
    return {
        **{f"sentencepiece, {number}": _plain(texts, tokenizer, number) for number in processes},
        **{f"skipmega, {number}": ours(number) for number in processes},
        **{f"megatron-core, {number}": way for number, way in theirs.items()},
        **_datatrove(corpus, tokenizer, folder),
    }


def measure(way: Way) -> Cost:
    """Run ``way`` in a process of its own."""
    receiving, sending = _FORK.Pipe(duplex=False)
    process = _FORK.Process(target=_measure_here, args=(way, sending))
    process.start()
    cost: Cost = receiving.recv()
    process.join()
    return cost


def grown_corpus(corpus: Path, times: int, folder: Path) -> Path:
    """The same documents, ``times`` as many."""
    path = folder / f"{times}-{corpus.name}"
    content = corpus.read_bytes()
    with path.open("wb") as stream:
        for _ in range(times):
            stream.write(content)
    return path


def _measure_here(way: Way, sending: Connection) -> None:
    Path("/proc/self/clear_refs").write_text("5")
    before, began, used = _peak_mib(), time.perf_counter(), _processor_seconds()
    way()
    largest_child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    mib = max(_peak_mib(), largest_child) - before
    sending.send(Cost(_processor_seconds() - used, time.perf_counter() - began, mib))


def _processor_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _peak_mib() -> float:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))


def _plain(texts: Sequence[str], tokenizer: Tokenizer, processes: int) -> Way:
    def encode(first: int) -> None:
        for text in texts[first::processes]:
            tokenizer.encode(text)

    def encode_all() -> None:
        others = [_FORK.Process(target=encode, args=(first,)) for first in range(1, processes)]
        for process in others:
            process.start()
        encode(0)
        for process in others:
            process.join()

    return encode_all


def _megatron(corpus: Path, tokenizer: Tokenizer, folder: Path, processes: int) -> Way:
    """As its tools/preprocess_data.py goes about it: its tokenizer, its builder, document by document; with
    several processes lines go to a pool, 32 at a time, and ids come back as lists."""
    theirs = SentencePieceTokenizer(str(tokenizer.path))

    def encode(line: str) -> list[int]:
        return [*theirs.text_to_ids(json.loads(line)["text"]), tokenizer.eod_id]

    def write(documents: Iterable[list[int]]) -> None:
        builder = IndexedDatasetBuilder(str(folder / "megatron.bin"), dtype=np.uint16)
        for ids in documents:
            builder.add_document(ids, [len(ids)])
        builder.finalize(str(folder / "megatron.idx"))

    def prepare() -> None:
        with corpus.open(encoding="utf-8") as lines:
            if processes == 1:
                write(map(encode, lines))
                return
            with _FORK.Pool(processes, _encoders.append, (encode,)) as pool:
                write(pool.imap(_encode_line, lines, 32))
                pool.close()
                pool.join()

    return prepare


_encoders: list[Callable[[str], list[int]]] = []  # of a process of the pool


def _encode_line(line: str) -> list[int]:
    return _encoders[-1](line)


def _datatrove(corpus: Path, tokenizer: Tokenizer, folder: Path) -> dict[str, Way]:
    """Its writer of Megatron files, with the same vocabulary as a Hugging Face tokenizer; none where it is
    not installed."""
    try:
        from datatrove.data import Document
        from datatrove.pipeline.tokens.megatron_tokenizer import MegatronDocumentTokenizer
    except ImportError:
        return {}
    exported = tempfile.mkdtemp(dir=folder)
    export_tokenizer(tokenizer.path, exported)
    step = MegatronDocumentTokenizer(
        str(folder / "datatrove"), tokenizer_name_or_path=f"{exported}/tokenizer.json", eos_token="</s>"
    )

    def prepare() -> None:
        os.environ["RAYON_NUM_THREADS"] = "1"
        documents = (Document(text=text, id=str(number)) for number, text in enumerate(_texts(corpus)))
        step.run(documents)

    return {"datatrove, 1": prepare}


def _texts(corpus: Path) -> Iterable[str]:
    return (document.text for document in Corpus([corpus]))
