"""A small run, and sizes of its parts."""

from pathlib import Path
from typing import Any

from skipmega.config import RunConfig, build_config, resolve_grid
from skipmega.launch.estimate import with_vocabulary
from skipmega.launch.memory import process_memory

ROOT = Path(__file__).resolve().parents[3]
HIDDEN, INNER, LAYERS, VOCABULARY = 32, 80, 4, 256
MATRICES = 4 * HIDDEN**2 + 2 * HIDDEN * INNER  # of a layer
LAYER = MATRICES + 2 * HIDDEN  # with its norms, without router
TABLE = VOCABULARY * HIDDEN
WEIGHTS = LAYERS * LAYER + TABLE + HIDDEN
DENSE = {"router": "always"}


def make_config(**sections: dict[str, Any]) -> RunConfig:
    values: dict[str, Any] = {
        "run_dir": "runs/small",
        "model": {
            "num_layers": LAYERS, "hidden_size": HIDDEN, "num_attention_heads": 4, "ffn_hidden_size": INNER,
            "vocab_size": VOCABULARY,
        },
        "routing": {"router": "gumbel"},
        "data": {"sequence_length": 16},
        "training": {
            "steps": 10, "micro_batch_size": 2, "global_batch_size": 64, "eval_sequences": 16,
            "precision": "bf16",
        },
    }  # fmt: skip
    for section, fields in sections.items():
        values[section] = values.get(section, {}) | fields
    return build_config(values, source="test")


def memory(config: RunConfig, processes: int = 1) -> Any:
    return process_memory(resolve_grid(with_vocabulary(config), processes))
