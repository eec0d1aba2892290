"""The tokenizer: a sentencepiece BPE model, and how it is trained.

The training options are those under which a model converts exactly to a Hugging Face fast tokenizer: BPE
without dummy prefix or normalization, bytes for what the vocabulary lacks. Text survives
``decode(encode(text))`` unchanged, control characters and line ends included; the one exception is U+2581,
sentencepiece's mark for a space, which comes back as a space.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import sentencepiece

from skipmega.data.files import atomic_write
from skipmega.errors import DataError

_TRAINER_OPTIONS: dict[str, Any] = {
    "model_type": "bpe",
    "normalization_rule_name": "identity",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,  # indentation is one token, not one token per space
    "byte_fallback": True,
    "split_digits": True,
    "unk_id": 0,
    "bos_id": 1,
    "eos_id": 2,
    "pad_id": 3,
    "max_sentence_length": 1 << 30,  # documents are given whole, so that pieces may hold line ends
    "num_threads": 16,  # recorded in the model: fixed, so that equal text gives an equal file anywhere
    "minloglevel": 2,
}


class Tokenizer:
    """Text to token ids and back. Special tokens are never made from text, not even from ``"</s>"``.

    ``eod_id`` ends every document (sentencepiece's end of sentence), and ``begin_id`` is what the first token
    of a text is predicted from: the same, as in training. A foreign model may lack ``bos_id`` or ``pad_id``:
    both are ``eod_id`` then.
    """

    def __init__(self, processor: sentencepiece.SentencePieceProcessor, path: Path, sha256: str) -> None:
        self._processor = processor
        self.path = path
        self.sha256 = sha256
        self.size: int = processor.get_piece_size()
        self.eod_id: int = processor.eos_id()
        self.begin_id = self.eod_id
        self.bos_id: int = processor.bos_id() if processor.bos_id() >= 0 else self.eod_id
        self.pad_id: int = processor.pad_id() if processor.pad_id() >= 0 else self.eod_id

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Read a sentencepiece ``.model`` file.

        Raises:
            DataError: the file is missing, is not a sentencepiece model, or has no end-of-sentence piece.
        """
        path = Path(path)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DataError(
                f"cannot read tokenizer {path}: {error.strerror}; tools/train_tokenizer.py makes one"
            ) from None
        try:
            processor = sentencepiece.SentencePieceProcessor(model_proto=content)
            defined = processor.get_piece_size() > 0
        except (RuntimeError, ValueError):
            defined = False
        if not defined:
            raise DataError(f"{path} is not a sentencepiece model ({len(content)} bytes)")
        if processor.eos_id() < 0:
            raise DataError(f"{path} has no end-of-sentence piece, which skipmega needs to end documents")
        return cls(processor, path, hashlib.sha256(content).hexdigest())

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, without special tokens.

        Raises:
            DataError: ``text`` holds a lone surrogate and is therefore no Unicode text.
        """
        try:
            ids: list[int] = self._processor.encode(text)
        except RuntimeError:
            raise DataError(f"text that UTF-8 cannot represent: {text[:80]!a}") from None
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; special tokens give no text.

        Raises:
            DataError: an id outside the vocabulary.
        """
        plain = [int(token) for token in ids]
        if plain and not 0 <= min(plain) <= max(plain) < self.size:
            raise DataError(f"token ids {min(plain)}..{max(plain)} lie outside {self.path}'s {self.size} ids")
        text: str = self._processor.decode(plain)
        return text

    def pieces(self) -> list[str]:
        """What sentencepiece calls each id: ``"▁the"``, ``"<0x0A>"`` for a byte, ``""`` for a special one."""
        special = (self._processor.is_control, self._processor.is_unknown)
        return [
            "" if any(asked(token) for asked in special) else self._processor.id_to_piece(token)
            for token in range(self.size)
        ]


def train_tokenizer(
    documents: Iterable[str], model_path: str | Path, vocab_size: int, *, overwrite: bool = False
) -> Tokenizer:
    """Train a BPE tokenizer of exactly ``vocab_size`` ids and write it to ``model_path``.

    Args:
        documents: whole documents; all are held in memory. Equal documents in equal order give an equal file.
        model_path: where the model goes; it appears there only when complete.
        vocab_size: number of ids, with 4 special ones and 256 bytes.
        overwrite: replace an existing file.

    Raises:
        DataError: the file exists, there is no text, or the text has too few or too many different pieces
            for ``vocab_size``.
    """
    path = Path(model_path)
    if path.exists() and not overwrite:
        raise DataError(f"{path} exists: choose another name, or overwrite it")
    counted = _Counted(documents)
    try:
        with atomic_write(path) as stream:
            sentencepiece.SentencePieceTrainer.Train(
                sentence_iterator=iter(counted),
                model_writer=stream,
                vocab_size=vocab_size,
                **_TRAINER_OPTIONS,
            )
    except RuntimeError as error:
        if counted.failure is not None:
            raise counted.failure from None
        raise DataError(_explain_failure(str(error), vocab_size, counted)) from None
    return Tokenizer.load(path)


class _Counted:
    """Documents on their way into sentencepiece, counted for the error message.

    sentencepiece turns an exception of its iterator into a RuntimeError of its own; ``failure`` keeps it.
    """

    def __init__(self, documents: Iterable[str]) -> None:
        self._documents = documents
        self.documents = 0
        self.characters = 0
        self.failure: Exception | None = None

    def __iter__(self) -> Iterator[str]:
        try:
            for text in self._documents:
                self.documents += 1
                self.characters += len(text)
                yield text
        except Exception as error:
            self.failure = error
            raise


def _explain_failure(message: str, vocab_size: int, corpus: _Counted) -> str:
    size = f"{corpus.documents} documents with {corpus.characters} characters"
    if corpus.characters == 0:
        return f"the corpus holds no text ({size}): check its paths and the text field"
    if most := re.search(r"value <= (\d+)", message):
        return (
            f"vocab_size={vocab_size} is too large for {size}, which have pieces for at most "
            f"{most.group(1)}: lower vocab_size or add text"
        )
    if least := re.search(r"smaller than required_chars\D*\d+ vs (\d+)", message):
        return (
            f"vocab_size={vocab_size} is too small for the characters of the corpus ({size}): "
            f"use at least {least.group(1)}"
        )
    return f"sentencepiece cannot train vocab_size={vocab_size} on {size}: {message}"
