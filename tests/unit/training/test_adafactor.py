"""ShardedAdafactor on one process, over flat pieces with fragments, against the paper's algorithm.

That sums over ranks are completed is the grid-parity tests' matter.
"""

from types import SimpleNamespace

import pytest
import torch
from adafactor_reference import PlainAdafactor
from torch import Tensor, nn

from skipmega.parallel.grid import Axis
from skipmega.training.adafactor import Fragment, ShardedAdafactor

BETA2, CLIP, DECAY = 0.9, 0.8, 0.05
GAP = 3  # elements of alignment between parameters, as ZeRO leaves them
SHAPES = {
    "matrices": {"wide": (4, 7), "tall": (6, 2), "row": (1, 5)},
    "vectors": {"norm": (7,), "one": (1,)},
}


def alone() -> Axis:
    return Axis(size=1, rank=0, group=None)  # type: ignore[arg-type]


class Setup:
    """One flat piece a group, its parameters at hand-made places, and a plain twin of each."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.pieces: dict[str, nn.Parameter] = {}
        self.fragments: dict[str, list[Fragment]] = {}
        self.twins: dict[str, PlainAdafactor] = {}
        for kind, shapes in SHAPES.items():
            offset, placed = GAP, []
            for name, shape in shapes.items():
                count = torch.Size(shape).numel()
                placed.append(Fragment(name, shape, shape, None, 0, count, offset))
                offset += count + GAP
            piece = torch.full((offset,), 7.0)
            for fragment in placed:
                # "wide" starts so small that the smallest scale of the paper takes over
                scale = 1e-4 if fragment.name == "wide" else 1.0
                value = scale * torch.randn(fragment.shape, generator=generator)
                fragment.of(piece).copy_(value.flatten())
                decay = DECAY if kind == "matrices" else 0.0
                self.twins[fragment.name] = PlainAdafactor(value.double(), BETA2, CLIP, decay)
            self.pieces[kind], self.fragments[kind] = nn.Parameter(piece), placed
        groups = [
            {
                "name": kind,
                "kind": kind,
                "params": [piece],
                "weight_decay": DECAY if kind == "matrices" else 0.0,
            }
            for kind, piece in self.pieces.items()
        ]
        grid = SimpleNamespace(replicas=alone(), tensor=alone())
        self.optimizer = ShardedAdafactor(groups, grid, lr=1.0, beta2=BETA2, update_clip=CLIP)  # type: ignore[arg-type]
        self.optimizer.place(self.fragments)

    def step(self, rate: float, generator: torch.Generator) -> None:
        """The same random gradients for both, of very different sizes by row."""
        for kind, piece in self.pieces.items():
            piece.grad = torch.zeros_like(piece)
            for fragment in self.fragments[kind]:
                gradient = torch.randn(fragment.shape, generator=generator)
                gradient *= 10 ** torch.randn(
                    fragment.shape[0], *[1] * (gradient.dim() - 1), generator=generator
                )
                fragment.of(piece.grad).copy_(gradient.flatten())
                self.twins[fragment.name].step(gradient, rate)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()

    def weight(self, name: str) -> Tensor:
        for kind, placed in self.fragments.items():
            for fragment in placed:
                if fragment.name == name:
                    return fragment.of(self.pieces[kind].detach()).view(fragment.shape)
        raise KeyError(name)


def test_it_is_the_paper_s_algorithm_on_every_parameter() -> None:
    setup, generator = Setup(), torch.Generator().manual_seed(1)
    for step in range(6):
        setup.step(0.1 / (1 + step), generator)
        for name, twin in setup.twins.items():
            torch.testing.assert_close(
                setup.weight(name).double(), twin.weight, rtol=2e-5, atol=1e-7, msg=name
            )
    twins = setup.twins.values()
    assert 0 < sum(twin.clipped for twin in twins) < 6 * len(twins), "clipping is active, not always"
    assert setup.twins["wide"].scaled < 6, "the smallest scale was in force"
    assert setup.twins["tall"].scaled == 6, "and the parameter's own elsewhere"


def test_what_lies_between_parameters_is_left_alone() -> None:
    setup, generator = Setup(), torch.Generator().manual_seed(1)
    setup.step(0.1, generator)
    for kind, piece in setup.pieces.items():
        outside = torch.ones(len(piece), dtype=torch.bool)
        for fragment in setup.fragments[kind]:
            outside[fragment.offset : fragment.offset + fragment.numel] = False
        if kind == "matrices":
            assert torch.equal(piece.detach()[outside], torch.full((int(outside.sum()),), 7.0))


def test_groups_step_one_at_a_time_as_deepspeed_does() -> None:
    """DeepSpeed shows the optimizer one group at a time; the moments and counts of the others wait."""
    together, apart = Setup(), Setup()
    for seed in (1, 2):
        together.step(0.1, torch.Generator().manual_seed(seed))
        groups = apart.optimizer.param_groups
        for kind, piece in together.pieces.items():
            assert piece.grad is not None
            apart.pieces[kind].grad = piece.grad.clone()
        for group in groups:
            group["lr"] = 0.1
            apart.optimizer.param_groups = [group]
            apart.optimizer.step()
        apart.optimizer.param_groups = groups
        for name in together.twins:
            assert torch.equal(together.weight(name), apart.weight(name))


def test_a_group_without_gradients_does_not_move() -> None:
    setup = Setup()
    before = {name: setup.weight(name).clone() for name in setup.twins}
    setup.optimizer.step()
    assert all(torch.equal(setup.weight(name), value) for name, value in before.items())
    assert all(state["step"] == 0 for state in setup.optimizer.state.values())


def test_a_vector_s_zero_gradient_changes_nothing() -> None:
    setup = Setup()
    before = setup.weight("norm").clone()
    setup.pieces["vectors"].grad = torch.zeros_like(setup.pieces["vectors"])
    setup.optimizer.step()
    assert torch.equal(setup.weight("norm"), before)


@pytest.mark.parametrize("rows", [[0.0] * 4, [1e-8, 1e-8, 0.0, 0.0]])
def test_rows_without_a_gradient_stay_finite(rows: list[float]) -> None:
    piece, alone = nn.Parameter(torch.ones(12)), Axis(1, 0, None)  # type: ignore[arg-type]
    groups = [{"name": "matrices", "kind": "matrices", "params": [piece], "weight_decay": 0.0}]
    grid = SimpleNamespace(replicas=alone, tensor=alone)
    optimizer = ShardedAdafactor(groups, grid, lr=0.1, beta2=0.99, update_clip=1.0)  # type: ignore[arg-type]
    optimizer.place({"matrices": [Fragment("m", (4, 3), (4, 3), None, 0, 12, 0)]})
    piece.grad = torch.tensor(rows).repeat_interleave(3)
    optimizer.step()
    assert piece.isfinite().all()
