"""Attention of packed queries against causal attention of all of them."""

from functools import partial

import torch
import torch.nn.functional as F

from skipmega.experiments.speed.bench import GROUPED, Bench, Row, precision, time_backward
from skipmega.experiments.speed.layers import attention_on
from skipmega.kernels.attention import packed_attention

LENGTHS = (2048, 8192)
DENSITY = 0.5


def attention_rows() -> list[Row]:
    """Rows of ``bench.py attention``: as many tokens of every length, both kinds of heads."""
    rows = []
    for heads, overrides in {"MHA": [], "GQA": GROUPED}.items():
        for length in LENGTHS:
            for kind, density in (("causal", 1.0), ("packed", DENSITY)):
                measure = partial(_measure, overrides=overrides, length=length, density=density)
                rows.append(Row("attention", f"{heads} {kind} {length}", measure))
    return rows


def _measure(bench: Bench, overrides: list[str], length: int, density: float) -> dict[str, float]:
    """Queries [q, b, heads, d] at random positions of keys and values of all tokens, bf16."""
    config = bench.config(*overrides)
    length = length * config.data.sequence_length // LENGTHS[0]
    tokens = config.training.micro_batch_size * config.data.sequence_length
    model, device, batch = config.model, bench.grid.device, tokens // length
    dtype = precision(config)
    asked = round(density * length)
    query, key, value = (
        torch.randn(rows, batch, heads, model.head_size, device=device, dtype=dtype, requires_grad=True)
        for rows, heads in (
            (asked, model.num_attention_heads),
            (length, model.kv_heads),
            (length, model.kv_heads),
        )
    )
    if density == 1.0:

        def run(queries: torch.Tensor) -> torch.Tensor:
            q, k, v = (heads.permute(1, 2, 0, 3) for heads in (queries, key, value))
            mixed = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=model.kv_heads < q.shape[1]
            )
            return mixed.permute(2, 0, 1, 3)

    else:
        chosen = torch.rand(length, batch, device=device).argsort(dim=0)[:asked].sort(dim=0).values
        backend = attention_on(bench.grid, config)
        attend = (
            torch.compile(packed_attention, dynamic=False) if config.training.compile else packed_attention
        )

        def run(queries: torch.Tensor) -> torch.Tensor:
            return attend(queries, key, value, chosen, None, backend)

    return time_backward(run, [key, value], query, bench, config.training.cuda_graphs)
