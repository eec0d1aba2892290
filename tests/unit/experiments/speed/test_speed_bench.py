"""Every row runs; records are kept and not repeated; the plain loops do the work they are compared for."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from skipmega.experiments.speed.attention import attention_rows
from skipmega.experiments.speed.bench import Bench, Row, read_records, run_rows
from skipmega.experiments.speed.layers import layer_rows, peer_rows
from skipmega.experiments.speed.profiles import profile_steps
from skipmega.experiments.speed.steps import MasterWeights, PlainWeights, hugging_face, own_stage, step_rows
from skipmega.experiments.step_times import random_batches
from skipmega.parallel.grid import ParallelGrid

BASE = Path("pretrain/configs/bench/speed_1b.yaml")
TINY = [
    "model.num_layers=2", "model.hidden_size=64", "model.num_attention_heads=8", "model.ffn_hidden_size=96",
    "model.vocab_size=128", "data.sequence_length=32", "training.micro_batch_size=2",
    "training.global_batch_size=4", "training.compile=false", "training.cuda_graphs=false",
    "training.precision=fp32",
]  # fmt: skip


@pytest.fixture
def bench(grid: ParallelGrid) -> Bench:
    return Bench(BASE, TINY, grid, layers=2, repeats=1, warmup=1, steps=1)


def test_every_row_but_what_needs_a_gpu_is_measured(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [*layer_rows(), *attention_rows(), *peer_rows(), *step_rows()]
    assert len({(row.mode, row.name) for row in rows}) == len(rows)
    run_rows(rows, bench, tmp_path, None)
    records = {(record["mode"], record["row"]): record for record in read_records(tmp_path)}
    missing = {(row.mode, row.name) for row in rows} - records.keys()
    assert missing == {("peers", "random-LTD 0.5"), ("peers", "random-LTD 0.125")}
    assert "FAILED" in capsys.readouterr().out
    assert all(record["seconds"] > 0 and record["commit"] for record in records.values())

    dense, half = records["layer", "MHA dense"], records["layer", "MHA 0.5"]
    assert dense["executed"] == 1
    assert 0.4 < half["executed"] <= 0.5
    assert 0.5 < half["flops"] / dense["flops"] < 0.6
    doubled = records["layer", "MHA 0.5, twice as many layers"]
    assert doubled["flops"] == pytest.approx(2 * half["flops"], rel=0.1)
    assert records["step", "MHA 0.5, twice as many layers"]["layers"] == 4
    assert records["step", "own, bf16 weights"]["flops"] == records["step", "MHA dense"]["flops"]


def test_steps_are_profiled_kernel_by_kernel(bench: Bench, tmp_path: Path) -> None:
    lines = profile_steps(bench, tmp_path).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["dense", "P=0.25"]
    assert "aten::" in (tmp_path / "profile-step-P0.25.txt").read_text()


def test_records_are_kept_failures_and_late_rows_are_not(bench: Bench, tmp_path: Path) -> None:
    measured = []

    def measure(_: Bench) -> dict[str, Any]:
        measured.append(1)
        return {"seconds": 1.0}

    def fail(_: Bench) -> dict[str, Any]:
        raise RuntimeError("no such kernel")

    rows = [Row("layer", "first", measure), Row("layer", "broken", fail), Row("peers", "first", measure)]
    run_rows(rows[:2], bench, tmp_path, None)
    run_rows(rows, bench, tmp_path, None)
    run_rows([Row("layer", "late", measure)], bench, tmp_path, -1.0)
    assert [(r["mode"], r["row"]) for r in read_records(tmp_path)] == [("layer", "first"), ("peers", "first")]
    assert len(measured) == 2


def test_hugging_face_computes_the_same_model(bench: Bench) -> None:
    config = bench.config("routing.router=always")
    own, own_loss = own_stage(config, bench)
    other, other_loss = hugging_face(config, bench)
    names = {
        "embedding.weight": "model.embed_tokens.weight", "head.weight": "lm_head.weight",
        "final_norm.weight": "model.norm.weight",
    }  # fmt: skip
    parts = {
        "attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
        "attention.query": "self_attn.q_proj", "attention.key": "self_attn.k_proj",
        "attention.value": "self_attn.v_proj", "attention.output": "self_attn.o_proj",
        "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj",
    }  # fmt: skip
    names |= {
        f"layers.{i}.{a}.weight": f"model.layers.{i}.{b}.weight" for i in range(2) for a, b in parts.items()
    }
    theirs = dict(other.named_parameters())
    with torch.no_grad():
        for name, parameter in own.named_parameters():
            parameter.normal_(std=0.1)
            theirs.pop(names[name]).copy_(parameter)
    assert not theirs
    batch = next(random_batches(config, bench.grid))
    losses = own_loss(batch), other_loss(batch)
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    for loss in losses:
        loss.backward()
    for name, parameter in own.named_parameters():
        torch.testing.assert_close(
            parameter.grad, other.get_parameter(names[name]).grad, rtol=1e-4, atol=1e-6
        )


def test_masters_are_updated_in_fp32_and_rounded() -> None:
    """A step that bf16 cannot hold adds up in the masters; the update is AdamW's of the clipped gradient."""
    torch.manual_seed(0)
    start, gradient = torch.randn(300) + 3, torch.randn(300) * 0.1
    options = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "fused": False}
    weight = nn.Parameter(start.bfloat16())
    reference = nn.Parameter(weight.detach().float())
    exact = PlainWeights([reference], options)
    masters = MasterWeights([weight], options)
    for _ in range(50):
        masters.begin()
        for part in (gradient.bfloat16(), gradient.bfloat16() / 256):  # a sum that bf16 would round
            (weight * part).sum().backward()
        reference.grad = gradient.bfloat16().float() * (1 + 1 / 256)
        masters.step(0.5)
        exact.step(0.5)
    assert weight.grad is None
    assert torch.equal(masters.masters[0], reference)
    assert torch.equal(weight, reference.bfloat16())
    assert not torch.equal(weight, start.bfloat16())
