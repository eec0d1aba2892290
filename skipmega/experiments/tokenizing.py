"""How fast a corpus becomes tokens, beside sentencepiece alone and the ways of megatron-core and datatrove.

Each measurement is a process of its own that has everything loaded when it begins; what counts is its time
on a processor, with that of its children, as on a shared machine time on the clock says little.
"""

import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron.core.tokenizers.text.libraries.sentencepiece_tokenizer import SentencePieceTokenizer

from skipmega.data.prepare import prepare_dataset
from skipmega.data.readers import Corpus
from skipmega.data.tokenizer import Tokenizer
from skipmega.hf.tokenizer import export_tokenizer

Way = Callable[[], None]


@dataclass(frozen=True)
class Cost:
    """Of one measurement: seconds on processors and on the clock, most MiB resident in one process above
    what was resident before."""

    processor: float
    clock: float
    mib: float


def ways(corpus: Path, tokenizer: Tokenizer, folder: Path) -> dict[str, Way]:
    """What is compared, by name, each from the file to what it writes in ``folder``.

    ``sentencepiece`` has the texts in memory and writes nothing: nothing that uses it is faster.
    """
    texts = [document.text for document in Corpus([corpus])]

    def ours(workers: int) -> Way:
        def prepare() -> None:
            target = folder / f"ours-{workers}"
            prepare_dataset(Corpus([corpus]), target, tokenizer, workers=workers, overwrite=True)

        return prepare

    def plain() -> None:
        for text in texts:
            tokenizer.encode(text)

    return {
        "sentencepiece": plain,
        "skipmega, 1 process": ours(1),
        "skipmega, 2 processes": ours(2),
        "megatron-core": _megatron(corpus, tokenizer, folder),
        "datatrove": _datatrove(corpus, tokenizer, folder),
    }


def measure(way: Way) -> Cost:
    """Run ``way`` in a process of its own."""
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_measure_here, args=(way, sending))
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


def _megatron(corpus: Path, tokenizer: Tokenizer, folder: Path) -> Way:
    """As its tools/preprocess_data.py goes about it: its tokenizer, its builder, document by document."""
    theirs = SentencePieceTokenizer(str(tokenizer.path))

    def prepare() -> None:
        builder = IndexedDatasetBuilder(str(folder / "megatron.bin"), dtype=np.uint16)
        for text in _texts(corpus):
            ids = [*theirs.text_to_ids(text), tokenizer.eod_id]
            builder.add_document(ids, [len(ids)])
        builder.finalize(str(folder / "megatron.idx"))

    return prepare


def _datatrove(corpus: Path, tokenizer: Tokenizer, folder: Path) -> Way:
    """Its writer of Megatron files, with the same vocabulary as a Hugging Face tokenizer."""
    from datatrove.data import Document
    from datatrove.pipeline.tokens.megatron_tokenizer import MegatronDocumentTokenizer

    exported = tempfile.mkdtemp(dir=folder)
    export_tokenizer(tokenizer.path, exported)
    step = MegatronDocumentTokenizer(
        str(folder / "datatrove"), tokenizer_name_or_path=f"{exported}/tokenizer.json", eos_token="</s>"
    )

    def prepare() -> None:
        os.environ["RAYON_NUM_THREADS"] = "1"
        documents = (Document(text=text, id=str(number)) for number, text in enumerate(_texts(corpus)))
        step.run(documents)

    return prepare


def _texts(corpus: Path) -> Iterable[str]:
    return (document.text for document in Corpus([corpus]))
