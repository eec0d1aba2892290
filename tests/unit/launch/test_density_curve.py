"""What is refused before a curve takes its time."""

from types import SimpleNamespace
from typing import Any

import pytest

from skipmega.config import build_config
from skipmega.errors import ConfigError
from skipmega.launch.density_curve import measure_curve

MODEL = {"num_layers": 4, "vocab_size": 128, "hidden_size": 64, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("router", "densities", "message"),
    [("quantile", [0.5, 2.0], "2.0 is no density"), ("highway", [0.5], "no meaning for router=highway")],
)
def test_every_density_is_checked_before_anything_is_read(
    router: str, densities: list[float], message: str
) -> None:
    config = build_config({"model": MODEL, "routing": {"router": router}}, source="test")
    nothing: Any = SimpleNamespace()
    checkpoint: Any = SimpleNamespace(config=config)  # without weights or data
    with pytest.raises(ConfigError, match=message):
        measure_curve(checkpoint, nothing, densities, lambda model: nothing)
