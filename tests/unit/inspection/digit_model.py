"""A model whose routers are known: of its five layers, 1 and 3 execute exactly the digits, 2 all but them."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from skipmega.checkpoint.store import CheckpointStore
from skipmega.config import build_config
from skipmega.data.tokenizer import train_tokenizer
from skipmega.hf import write_export
from skipmega.models.decoder import DecoderStage
from skipmega.parallel.grid import create_grid, end_communication
from skipmega.parallel.logical import LogicalTensor
from skipmega.parallel.process import ProcessInfo
from skipmega.routing.state import RoutingState

LENGTH = 24
STEP = 7
# what a page could trip over, in a source's name and in a text
NOTES = "notes</script><b>"
HOSTILE = "</script><script>document.title = 'broken'</script> <b>bold</b> &amp; \x07 Ünï → 文字 \t end\n"
_DOCUMENTS = 12


@dataclass(frozen=True)
class DigitModel:
    """One model in both forms, its tokenizer, and texts by source: one of twelve documents, one of one."""

    checkpoint: Path
    export: Path
    tokenizer: Path
    texts: dict[str, Path]


def write_digit_model(folder: Path) -> DigitModel:
    """Write everything into ``folder``; call it where no grid is."""
    texts = _write_texts(folder)
    content = [path.read_text(encoding="utf-8") for path in texts.values()]
    tokenizer = train_tokenizer(content, folder / "tokenizer.model", 320)
    digits = [token for token, piece in enumerate(tokenizer.pieces()) if piece.lstrip("▁").isdigit()]
    values: dict[str, Any] = {
        "model": {"num_layers": 5, "hidden_size": 16, "num_attention_heads": 4, "ffn_hidden_size": 24},
        "routing": {"router": "sigmoid"},
        "data": {"tokenizer": str(tokenizer.path), "sequence_length": LENGTH},
    }
    values["model"]["vocab_size"] = 384  # more than the tokenizer's ids, as where it is padded
    config = build_config(values, source="the test")
    before = dict(os.environ)
    grid = create_grid(ProcessInfo(rank=0, world_size=1, local_rank=0, launcher="none"))
    try:
        torch.manual_seed(0)
        stage = DecoderStage(config, grid)
        routing = RoutingState(config, stage.routed_layers, torch.device("cpu"))
        routing.threshold.zero_()
        _mark_digits(stage, digits)
        weights = {name: parameter.data for name, parameter in stage.named_parameters()}
        named = {f"weights/{name}": tensor for name, tensor in weights.items()}
        named |= {f"routing/{name}": tensor for name, tensor in routing.tensors().items()}
        checkpoint = CheckpointStore(folder / "run", keep=0).save(
            grid, config, {"step": STEP}, {name: LogicalTensor(t, None) for name, t in named.items()}
        )
        export = write_export(folder / "export", config, weights, tokenizer.path, routing, STEP)
    finally:
        end_communication()
        os.environ.clear()
        os.environ.update(before)
    return DigitModel(checkpoint, export, tokenizer.path, texts)


@torch.no_grad()
def _mark_digits(stage: DecoderStage, digits: list[int]) -> None:
    """The sign of a hidden state's first entry says whether its token is a digit: no layer adds to it, no
    norm turns it, and routers read nothing else."""
    stage.embedding.weight[:, 0] = -1
    stage.embedding.weight[digits, 0] = 1
    for number in stage.layers:
        layer: Any = stage.layers[number]
        layer.attention.output.weight[0] = 0
        layer.mlp.down.weight[0] = 0
        if layer.router is not None:
            layer.router.weight.zero_()
            layer.router.weight[0, 0] = -1 if number == "2" else 1


def _write_texts(folder: Path) -> dict[str, Path]:
    lines = [
        f"In {1900 + 7 * i} there were {i * i} trees, of {i} kinds; so many trees.\n"
        for i in range(3 * _DOCUMENTS)
    ]
    texts = {"years": folder / "years.jsonl", NOTES: folder / "notes.txt"}
    documents = ("".join(lines[at : at + 3]) for at in range(0, len(lines), 3))
    texts["years"].write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    texts[NOTES].write_text(f"{HOSTILE}call_me(at, 42)\n{''.join(lines[:2])}", encoding="utf-8")
    return texts
