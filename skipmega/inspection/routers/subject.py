"""What is inspected: a native checkpoint or an export, with the tokenizer it reads text with."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skipmega.checkpoint.store import Checkpoint
from skipmega.data.tokenizer import Tokenizer
from skipmega.errors import CheckpointError, ConfigError
from skipmega.inference.native import NativeModel
from skipmega.parallel.grid import create_grid, end_communication
from skipmega.parallel.process import ProcessInfo

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


@dataclass(frozen=True)
class Vocabulary:
    """Text to ids, and the bytes of each id (none of a special one).

    ``eod_id`` ends documents.
    """

    encode: Callable[[str], list[int]]
    eod_id: int
    pieces: list[bytes]


@dataclass(frozen=True)
class Subject:
    """A model whose routers are looked at.

    ``trace`` takes tokens and the token that follows each, both [b, s] int64, at most ``max_length`` long,
    and gives the losses in nats, [b, s] float32, and who executed, bool [routed layers, b, s]. ``step`` is
    None where it is not known.
    """

    name: str
    router: str
    num_layers: int
    routed_layers: list[int]
    max_length: int
    vocab_size: int
    step: int | None
    vocabulary: Vocabulary
    trace: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

    def __post_init__(self) -> None:
        if not self.routed_layers:
            raise ConfigError(
                f"{self.name} routes none of its {self.num_layers} layers (router {self.router}): there is "
                "nothing to inspect; give a model with routed layers"
            )
        if len(self.vocabulary.pieces) > self.vocab_size:
            raise ConfigError(
                f"the tokenizer has {len(self.vocabulary.pieces)} ids, more than the vocabulary of "
                f"{self.vocab_size} of {self.name}: give the tokenizer that it was trained with"
            )


@contextmanager
def open_subject(
    model: str | Path, tokenizer: str | Path | None = None, eval_density: float | None = None
) -> Iterator[Subject]:
    """Load a model for the time of the block, in this process alone; on a GPU where there is one.

    Args:
        model: a run folder (its newest checkpoint is taken), a checkpoint, or a Hugging Face export.
        tokenizer: a sentencepiece model; None for the model's own.
        eval_density: of a checkpoint, share of tokens to execute in each routed layer; None as trained.

    Raises:
        CheckpointError: there is no such model, or an export without a tokenizer.
        ConfigError: no layer is routed, the tokenizer does not fit, or ``eval_density`` has no meaning.
        DataError: the tokenizer is missing or damaged.
    """
    given = None if tokenizer is None else _of_sentencepiece(Tokenizer.load(tokenizer))
    if (Path(model) / "config.json").is_file():
        if eval_density is not None:
            raise ConfigError(
                f"eval_density={eval_density} moves the thresholds of a native checkpoint, and {model} is an "
                "export: export again with tools/export_hf.py --eval-density"
            )
        yield _open_export(model, given)
        return
    checkpoint = Checkpoint.open(model)
    grid = create_grid(ProcessInfo(rank=0, world_size=1, local_rank=0, launcher="none"))
    try:
        native = NativeModel.load(checkpoint, grid, eval_density=eval_density)
        own = given or _of_checkpoint(checkpoint)
        yield _of_native(native, own, str(checkpoint.path), checkpoint.state["step"])
    finally:
        end_communication()


def _of_native(model: NativeModel, vocabulary: Vocabulary, name: str, step: int | None) -> Subject:
    return Subject(
        name=name,
        router=model.config.routing.router,
        num_layers=model.config.model.num_layers,
        routed_layers=model.config.routed_layers,
        max_length=model.max_length,
        vocab_size=model.vocab_size,
        step=step,
        vocabulary=vocabulary,
        trace=model.trace,
    )


def _open_export(folder: str | Path, vocabulary: Vocabulary | None) -> Subject:
    from skipmega.hf.export import load_export

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_export(folder, dtype=torch.float32).eval().to(device)
    routed = list(model.config.routed_layers)

    @torch.no_grad()
    def trace(tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        output = model(tokens.to(device), use_cache=False, output_execution=True)
        losses = torch.nn.functional.cross_entropy(
            output.logits.transpose(1, 2), labels.to(device), reduction="none"
        )
        return losses, torch.stack([output.executed[layer] for layer in routed])

    return Subject(
        name=str(folder),
        router=model.config.router,
        num_layers=model.config.num_hidden_layers,
        routed_layers=routed,
        max_length=model.config.max_position_embeddings,
        vocab_size=model.config.vocab_size,
        step=None,
        vocabulary=vocabulary or _of_export(Path(folder)),
        trace=trace,
    )


def _of_checkpoint(checkpoint: Checkpoint) -> Vocabulary:
    path = checkpoint.config.data.tokenizer
    if path is None:
        raise CheckpointError(
            f"{checkpoint.path} was trained without a tokenizer: give its sentencepiece model (--tokenizer)"
        )
    return _of_sentencepiece(Tokenizer.load(path))


def _of_sentencepiece(tokenizer: Tokenizer) -> Vocabulary:
    return Vocabulary(tokenizer.encode, tokenizer.eod_id, _as_bytes(tokenizer.pieces()))


def _of_export(folder: Path) -> Vocabulary:
    if not (folder / "tokenizer_config.json").is_file():
        raise CheckpointError(f"export {folder} has no tokenizer: give its sentencepiece model (--tokenizer)")
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=True)
    names = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    for special in tokenizer.all_special_ids:
        names[special] = ""

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
        return ids

    return Vocabulary(encode, tokenizer.eos_token_id, _as_bytes(names))


def _as_bytes(pieces: Sequence[str]) -> list[bytes]:
    return [
        bytes.fromhex(byte[1]) if (byte := _BYTE.fullmatch(piece)) else piece.replace("▁", " ").encode()
        for piece in pieces
    ]
