"""Rotary positions as complex numbers, and root-mean-square normalisation."""

import math

import pytest
import torch
from torch import Tensor

from skipmega.models.norm import RMSNorm
from skipmega.models.rotary import RotaryTable, rotary_table, rotate

THETA = 10_000.0


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def table(heads: Tensor) -> RotaryTable:
    return rotary_table(1024, heads.shape[-1], THETA, torch.device("cpu"))


@pytest.mark.parametrize("size", [2, 6, 64])
def test_rotation_is_multiplication_by_complex_phases(size: int) -> None:
    heads = random(5, 2, 3, size)
    positions = torch.tensor([[0, 1], [1, 2], [5, 900], [7, 901], [1000, 1023]])
    found = rotate(heads, table(heads), positions)
    half = size // 2
    for n in range(5):
        for b in range(2):
            for i in range(half):
                phase = int(positions[n, b]) * THETA ** (-2 * i / size)
                z = torch.complex(heads[n, b, :, i].double(), heads[n, b, :, i + half].double())
                z = z * complex(math.cos(phase), math.sin(phase))
                # the angle is a float32, so it is off by 1e-7 of up to 1000 radians
                torch.testing.assert_close(found[n, b, :, i].double(), z.real, rtol=0, atol=3e-4)
                torch.testing.assert_close(found[n, b, :, i + half].double(), z.imag, rtol=0, atol=3e-4)


def test_position_zero_turns_nothing() -> None:
    heads = random(1, 1, 2, 8)
    assert torch.equal(rotate(heads, table(heads), torch.zeros(1, 1, dtype=torch.int64)), heads)


@pytest.mark.parametrize("shift", [1, 17, 500])
def test_scores_depend_on_the_distance_only(shift: int) -> None:
    query, key = random(1, 1, 4, 16, seed=1), random(1, 1, 4, 16, seed=2)

    def score(query_at: int, key_at: int) -> Tensor:
        turned = (rotate(x, table(x), torch.tensor([[at]])) for x, at in ((query, query_at), (key, key_at)))
        q, k = turned
        return (q * k).sum(-1)

    torch.testing.assert_close(score(9 + shift, 4 + shift), score(9, 4), rtol=1e-4, atol=1e-3)
    assert not torch.allclose(score(9, 4), score(10, 4), rtol=1e-2)


def test_one_column_of_positions_serves_every_sequence() -> None:
    heads = random(6, 3, 2, 8)
    column = torch.arange(6).unsqueeze(1)
    everywhere = rotate(heads, table(heads), column.expand(6, 3))
    assert torch.equal(rotate(heads, table(heads), column), everywhere)
    assert torch.equal(rotate(heads, table(heads)), everywhere)


def test_angles_are_fp32_whatever_the_heads_are() -> None:
    """bfloat16 cannot tell position 1000 from 1001."""
    heads = random(2, 1, 1, 16).bfloat16()
    found = rotate(heads, table(heads), torch.tensor([[1000], [1001]]))
    assert found.dtype == torch.bfloat16
    expected = rotate(heads.float(), table(heads), torch.tensor([[1000], [1001]]))
    assert torch.equal(found, expected.bfloat16())


def test_norm_divides_by_the_root_mean_square() -> None:
    norm = RMSNorm(8, 1e-2)
    torch.nn.init.uniform_(norm.weight, 0.5, 2.0, generator=torch.Generator().manual_seed(0))
    x = random(4, 3, 8)
    for row, found in zip(x.view(-1, 8), norm(x).view(-1, 8), strict=True):
        root = math.sqrt(sum(float(v) ** 2 for v in row) / 8 + 1e-2)
        torch.testing.assert_close(found, row / root * norm.weight)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e10])
def test_norm_s_statistics_are_fp32(scale: float) -> None:
    """bfloat16 in and out, but rounded once at the end only."""
    norm = RMSNorm(512, 1e-12)
    torch.nn.init.ones_(norm.weight)
    x = (scale * random(4, 512)).bfloat16()
    expected = norm(x.float()).bfloat16()
    out = norm.bfloat16()(x)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)
