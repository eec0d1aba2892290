"""Models to be read with, of random weights."""

from typing import Any

import torch

from skipmega.config import build_config
from skipmega.inference.native import NativeModel
from skipmega.models.decoder import DecoderStage
from skipmega.parallel.grid import ParallelGrid
from skipmega.routing.state import RoutingState

VOCABULARY = 48


def make_model(grid: ParallelGrid, routing: dict[str, Any]) -> NativeModel:
    """Five layers with large random weights, texts of 64 tokens, on a CPU."""
    model = {
        "num_layers": 5, "hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2,
        "ffn_hidden_size": 24, "vocab_size": VOCABULARY, "init_std": 0.4,
    }  # fmt: skip
    values = {"model": model, "routing": routing, "data": {"sequence_length": 64}}
    config = build_config(values, source="test")
    torch.manual_seed(4)
    stage = DecoderStage(config, grid)
    state = RoutingState(config, stage.routed_layers, grid.device)
    return NativeModel(config, grid, stage, state, 0)
