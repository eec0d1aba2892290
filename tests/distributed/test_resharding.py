"""A run saved on one grid goes on on another as if it had always been there: weights, moments, routing."""

from itertools import groupby
from pathlib import Path

import pytest
import torch

from skipmega.checkpoint.store import Checkpoint, CheckpointStore
from skipmega.config import resolve_grid, resolve_vocabulary
from skipmega.training.optimizers import updates_done
from skipmega.training.state import collect_state, restore_state
from skipmega.training.sums import StepSums, average
from support.parity import check_gradients, names_of, parallel_of
from support.steps import (
    GLOBAL_BATCH,
    SAMPLES_PER_MICRO_STEP,
    make_engine,
    tiny_batches,
    tiny_config,
    tiny_grid,
)
from support.worlds import run_world

HALF, STEPS = 5, 10
RATE = 0.003
OVERRIDES = {
    "adamw": {"routing": {"density_control": "coefficient", "coefficient_rate": 0.5}},
    "adafactor": {"optimizer": {"name": "adafactor", "gradient_clip": 0.0}},
}
# saved on > goes on on, the optimizer: see support.parity.names_of
SELECTION = """
DP4 > TP2-SP-DP2 adamw, TP2-SP-DP2 > PP2-V2-DP2 adamw, PP2-V2-DP2 > CP2-PP2 adamw, CP2-PP2 > DP4-Z3 adamw,
DP4-Z3 > DP4 adamw, PP2-V2-DP2 > PP2-V2-DP2 adamw
"""
MORE = """
DP4 > DP4 adamw, DP4 > TP2-DP2 adamw, TP2-DP2 > DP4 adamw, DP4 > DP4-Z2 adamw, DP4-Z2 > DP4-Z3 adamw,
DP4-Z3 > TP2-SP-DP2 adamw, DP4-Z3 > DP4-Z3 adamw, TP2-SP-DP2 > PP2-DP2 adamw, PP2-DP2 > TP2-PP2 adamw,
TP2-PP2 > CP4 adamw, CP4 > CP2-PP2 adamw, CP2-PP2 > TP2-SP-CP2 adamw, CP2-PP2 > CP2-PP2 adamw,
TP2-SP-CP2 > CP2-DP2-Z2 adamw, CP2-DP2-Z2 > TP2-SP-DP2-Z3 adamw, TP2-SP-DP2-Z3 > PP2-DP2-Z2 adamw,
TP2-SP-DP2-Z3 > TP2-SP-DP2-Z3 adamw, PP2-DP2-Z2 > PP4 adamw, PP4 > TP2-SP-PP2-V2 adamw,
TP2-SP-PP2-V2 > TP2-DP2-Z3 adamw, TP2-DP2-Z3 > CP4 adamw, CP4 > PP2-V2-DP2 adamw,
DP4 > TP2-SP-DP2 adafactor, TP2-SP-DP2 > CP2-PP2 adafactor, CP2-PP2 > DP4-Z2 adafactor,
DP4-Z2 > DP4-Z2 adafactor
"""


class Trainer:
    """An engine on a grid, which trains, saves and loads."""

    def __init__(self, grid, parallel, variant):
        config = tiny_config({**OVERRIDES[variant], "parallel": parallel})
        size = {"micro_batch_size": SAMPLES_PER_MICRO_STEP // grid.data.size}
        config = config.model_copy(update={"training": config.training.model_copy(update=size)})
        self.config = resolve_grid(resolve_vocabulary(config, None), grid.world_size)
        self.grid = grid
        torch.manual_seed(grid.rank)
        self.engine = make_engine(self.config, grid)

    def train(self, first, last):
        """By step: loss and gradient norm."""
        batches, seen = tiny_batches(self.config, self.grid, first_sample=first * GLOBAL_BATCH), []
        for step in range(first, last):
            sums = StepSums.zeros(self.config, self.grid)
            norm = float(self.engine.train_step(batches, step, RATE, sums))
            seen.append((average(sums, self.config, self.grid).loss, norm))
        return seen

    def save(self, folder, step):
        state = {"step": step, "optimizer_updates": updates_done(self.engine.optimizer)}
        CheckpointStore(folder, keep=0).save(self.grid, self.config, state, collect_state(self.engine))

    def load(self, checkpoint):
        tensors = collect_state(self.engine)
        checkpoint.read_into(tensors, self.grid)
        restore_state(self.engine, checkpoint.state["optimizer_updates"], tensors)


def straight(grid, parallel, variant, folder):
    """All steps; saved in the middle and in the end."""
    trainer = Trainer(grid, parallel, variant)
    seen = trainer.train(0, HALF)
    trainer.save(folder, HALF)
    seen += trainer.train(HALF, STEPS)
    trainer.save(folder, STEPS)
    trainer.engine.close()
    return seen[HALF:]


def going_on(grid, parallel, variant, folder, before):
    """From another run's middle; saved as it was loaded, and in the end."""
    trainer = Trainer(grid, parallel, variant)
    trainer.train(0, 1)  # to be forgotten
    trainer.load(Checkpoint.open(before / f"step-{HALF:08d}"))
    trainer.save(folder, HALF)
    seen = trainer.train(HALF, STEPS)
    trainer.save(folder, STEPS)
    trainer.engine.close()
    return seen


def parts(name):
    """(saved on, goes on on, variant) of a pair."""
    cuts, variant = name.rsplit(" ", 1)
    return *cuts.split(" > "), variant


def train_all(pairs, home):
    """By grid and by pair, what was seen in the second half; checkpoints lie in folders of these names."""
    home, names, seen = Path(home), names_of(pairs), {}
    wholes = sorted({(cut, parts(name)[2]) for name in names for cut in parts(name)[:2]})
    for cut, group in groupby(wholes, key=lambda whole: whole[0]):
        with tiny_grid(parallel_of(cut)) as grid:
            for _, variant in group:
                name = f"{cut} {variant}"
                seen[name] = straight(grid, parallel_of(cut), variant, home / name)
    for cut, group in groupby(
        sorted(names, key=lambda name: parts(name)[1]), key=lambda name: parts(name)[1]
    ):
        with tiny_grid(parallel_of(cut)) as grid:
            for name in group:
                saved, _, variant = parts(name)
                seen[name] = going_on(
                    grid, parallel_of(cut), variant, home / name, home / f"{saved} {variant}"
                )
    return seen


def tensors(folder, step):
    return Checkpoint.open(folder / f"step-{step:08d}").read_alone("")


def check_pair(name, home, ranks):
    saved, cut, variant = parts(name)
    before, whole, moved = home / f"{saved} {variant}", home / f"{cut} {variant}", home / name
    written, loaded = tensors(before, HALF), tensors(moved, HALF)
    assert {key.split("/")[0] for key in written} == {"weights", "optimizer", "routing"}
    assert written.keys() == loaded.keys()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in written.items()), "it loads what was saved"
    expected, found = tensors(whole, STEPS), tensors(moved, STEPS)
    if saved == cut:
        assert all(rank[name] == rank[f"{cut} {variant}"] for rank in ranks)
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
        return
    for rank in ranks:
        for mine, theirs in zip(rank[name], rank[f"{cut} {variant}"], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-5)
    averaged = ("margins", "trend")
    comparable = {key: tensor for key, tensor in expected.items() if not key.endswith(averaged)}
    check_gradients({key: found[key] for key in comparable}, comparable, 1e-4)


@pytest.fixture(scope="module")
def selection(tmp_path_factory):
    home = tmp_path_factory.mktemp("selection")
    return home, run_world(train_all, 4, SELECTION, str(home), limit=240)


@pytest.mark.parametrize("name", names_of(SELECTION))
def test_resharded(name, selection):
    check_pair(name, *selection)


@pytest.fixture(scope="module")
def every_pair(tmp_path_factory):
    home = tmp_path_factory.mktemp("every_pair")
    return home, run_world(train_all, 4, MORE, str(home), limit=800)


@pytest.mark.every_grid
@pytest.mark.timeout(1000)
@pytest.mark.parametrize("name", names_of(MORE))
def test_every_pair_resharded(name, every_pair):
    check_pair(name, *every_pair)
