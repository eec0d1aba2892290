"""Ranks that should hold the same are compared: what is wrong is named, and nothing else."""

import pytest
import torch

from skipmega.config import resolve_grid, resolve_vocabulary
from skipmega.training.replicas import ReplicaCheck
from skipmega.training.state import hold, renew_copies
from skipmega.training.sums import StepSums
from support.parity import names_of, on_each_grid
from support.steps import make_engine, tiny_batches, tiny_config
from support.worlds import run_world

OVERRIDES = {
    "fp32": {},
    "bf16": {"training": {"precision": "bf16"}},
    "adafactor": {"optimizer": {"name": "adafactor", "gradient_clip": 0.0}},
}
GRIDS = """
DP4 bf16, DP4-Z2 adafactor, DP4-Z3 bf16, CP4 fp32, TP2-SP-DP2 fp32, TP2-SP-DP2-Z3 fp32, PP2-DP2 fp32,
TP2-PP2 bf16
"""
NORM = "final_norm.weight"  # whole on every tensor rank
ROUTING = "layers.1.margins"


def flip(tensor):
    """A bit of its first number, high enough to matter."""
    bits = tensor.detach().view(torch.int16 if tensor.element_size() == 2 else torch.int32)
    bits.view(-1)[0] ^= 1 << (8 * tensor.element_size() - 4)


def spoil_each(grid, parallel, variant):
    """What is found in a sound engine, and after each fault, which is planted on one rank and mended; and by
    fault this rank, if it was the one."""
    config = tiny_config({**OVERRIDES[variant], "parallel": parallel})
    size = config.training.model_copy(update={"micro_batch_size": 4 // grid.data.size})
    config = config.model_copy(update={"training": size})
    config = resolve_grid(resolve_vocabulary(config, None), grid.world_size)
    engine = make_engine(config, grid)
    batches = tiny_batches(config, grid)
    for step in range(2):
        engine.train_step(batches, step, 0.01, StepSums.zeros(config, grid))
    check = ReplicaCheck(engine)
    found, planted = {"nothing": check.find()}, {}

    def plant(fault, tensor, mend=None):
        if tensor is not None:
            flip(tensor)
            planted[fault] = grid.rank
        found[fault] = check.find()
        if mend is not None:
            mend(engine)
        elif tensor is not None:
            flip(tensor)

    of_norm = dict(engine.stage.named_parameters()).get(NORM)
    held = None if of_norm is None else hold(engine, of_norm)
    cut = parallel.get("zero_stage") == 3
    owns = held is not None and held.piece.numel() > 0 and grid.tensor.rank == 0
    owns = owns and (grid.replicas.rank == 0 if cut else held.piece.data_ptr() == held.copy.data_ptr())
    plant("copy", held.copy if grid.rank == 3 else None, None if cut else renew_copies)
    plant("master", held.master if owns else None)
    plant("moment", next(iter(held.moments.values()), None) if owns else None)
    plant("routing", engine.routing_tensors().get(ROUTING) if grid.rank == 0 else None)
    found["in the end"] = check.find()
    engine.close()
    return found, planted


def on_all():
    return on_each_grid(GRIDS, spoil_each)


@pytest.fixture(scope="module")
def findings():
    """By grid: what all ranks agree was found, and on which rank each fault was planted."""
    ranks = run_world(on_all, 4, limit=200)
    for name, (found, _) in ranks[0].items():
        assert all(other[name][0] == found for other in ranks), name
    return {
        name: (found, {fault: rank for other in ranks for fault, rank in other[name][1].items()})
        for name, (found, _) in ranks[0].items()
    }


@pytest.mark.parametrize("name", names_of(GRIDS))
def test_what_differs_is_named(name, findings):
    found, planted = findings[name]
    assert found["nothing"] is None
    assert found["in the end"] is None, "every fault was mended"
    replicas = 4 // (2 if "TP2" in name else 1) // (2 if "PP2" in name else 1)
    for fault in ("copy", "master"):
        culprit = f"{NORM} on rank {planted[fault]} (host "
        assert culprit in found[fault].describe(), fault
        assert found[fault].renewable == (fault == "copy" and replicas > 1 and "Z3" not in name), fault
    if "TP2" in name:
        assert f"{NORM}'s exp_avg on rank {planted['moment']} (host " in found["moment"].describe()
        assert not found["moment"].renewable
    else:
        assert found["moment"] is None, "only its owner has it"
    if replicas > 1:
        assert f"routing's {ROUTING} on rank {planted['routing']} (host " in found["routing"].describe()
        assert (len(found["routing"].findings) == 1) == (replicas > 2), "one of two may be right"
