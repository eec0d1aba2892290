"""The tool that measures saving and loading."""

import json
from pathlib import Path

import yaml

from support.tiny_run import run_command


def test_saves_are_measured(tmp_path: Path) -> None:
    model = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 128}
    config = tmp_path / "config.yaml"
    routing = {"dense_first": 0, "group_size": 16}
    config.write_text(yaml.safe_dump({"model": model, "routing": routing, "data": {"sequence_length": 64}}))
    output = tmp_path / "results"
    said = run_command(
        "tools/bench_checkpoint.py", config, "training.micro_batch_size=2", "training.global_batch_size=2",
        "training.eval_sequences=2", "--output", output, "--quiet-steps", "2", "--saves", "2",
    )  # fmt: skip
    record = json.loads((output / "saves.json").read_text())
    assert (output / "saves.md").read_text() in said
    parameters = 2 * (4 * 32 * 32 + 2 * 8 * 32 * 32) + 128 * 32  # and norms and routers
    assert 12 * parameters < 1e9 * record["checkpoint_gb"] < 13 * parameters + 200_000, (
        "masters and two moments"
    )
    assert len(record["copied"]) == len(record["saved"]) == len(record["stall"]) == 2
    assert all(saved > copied > 0 for saved, copied in zip(record["saved"], record["copied"], strict=True))
    assert not (output / "run").exists()
