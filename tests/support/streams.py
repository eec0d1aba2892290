"""Configurations of streams, opened."""

from pathlib import Path
from typing import Any

from skipmega.config import DataConfig
from skipmega.data.order.datasets import RunDatasets
from skipmega.data.order.streams import build_streams
from skipmega.data.tokenizer import Tokenizer

LENGTH = 16
TOTAL = 480


def config(folder: Path, **changes: Any) -> DataConfig:
    train = [
        {"path": f"{folder}/web-*", "name": "web", "weight": 0.5},
        {"path": f"{folder}/code", "weight": 0.4},
        {"path": f"{folder}/few", "weight": 0.1},
    ]
    values = {"train": train, "order": "stream", "sequence_length": LENGTH, "split": [90.0, 10.0]} | changes
    return DataConfig.model_validate(values)


def build(data: DataConfig, tokenizer: Tokenizer, train: int = TOTAL, valid: int = 0) -> RunDatasets:
    return build_streams(data, tokenizer, num_train_samples=train, num_valid_samples=valid, seed=3)
