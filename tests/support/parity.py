"""Names of grids, and whether what :func:`support.steps.train_tiny` did on one is what it did on another."""

from itertools import groupby

import pytest
import torch

from support.steps import tiny_grid


def names_of(grids):
    """Names in a list: what is cut (TP, CP, PP, DP with sizes, SP; Vn: chunks a stage, Zn: ZeRO's stage),
    then the variant."""
    return [" ".join(name.split()) for name in grids.split(",")]


def parallel_of(name):
    """The section that a name says."""
    found = {}
    for part in name.split("-"):
        letters, number = part.rstrip("0123456789"), part.lstrip("TCDPSVZ")
        field = {
            "TP": "tensor_parallel", "CP": "context_parallel", "PP": "pipeline_parallel",
            "DP": "data_parallel", "V": "chunks_per_stage", "SP": "sequence_parallel", "Z": "zero_stage",
        }[letters]  # fmt: skip
        found[field] = int(number) if number else True
    return found


def on_each_grid(grids, train):
    """What ``train(grid, parallel section, variant)`` returns for every name; a grid is made once."""
    results = {}
    for cut, names in groupby(sorted(names_of(grids)), key=lambda name: name.split()[0]):
        parallel = parallel_of(cut)
        with tiny_grid(parallel) as grid:
            for name in names:
                results[name] = train(grid, parallel, name.split()[1])
    return results


def check_gradients(found, expected, tolerance):
    """Every one is equal up to ``tolerance`` times its norm."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        error, norm = (found[name] - gradient).norm(), gradient.norm()
        assert error <= tolerance * norm, f"gradient of {name}, of norm {norm:.1e}, is off by {error:.1e}"


def check_tensors(found, expected):
    for name, tensor in expected.items():
        # a trend is a difference of several steps' margins, and has the errors of all of them
        atol = 1e-4 if name.endswith("trend") else 2e-5
        torch.testing.assert_close(
            found[name], tensor, rtol=1e-4, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


def check_seen(found, expected, same_rows):
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    numbers = ["density", "executed", "entropy", "fullest_group", "router_gradient"]
    for name in numbers + ["computed"] * same_rows:
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-4, abs=1e-6), name


def check_equal(found, expected):
    """Losses, norms, gradients, weights, what was seen and what is remembered, in fp32."""
    torch.testing.assert_close(found["losses"], expected["losses"], rtol=1e-5, atol=0)
    torch.testing.assert_close(found["norms"], expected["norms"], rtol=1e-5, atol=0)
    for pair in zip(
        found["seen"] + [found["held_out"]], expected["seen"] + [expected["held_out"]], strict=True
    ):
        check_seen(*pair, found["same_rows"])
    check_gradients(found["gradients"], expected["gradients"], 1e-4)
    check_tensors(found["weights"], expected["weights"])
    assert found["state"].keys() == expected["state"].keys()
    comparable = {
        name: tensor
        for name, tensor in expected["state"].items()
        if found["same_micro_batches"] or not name.endswith(("margins", "trend"))
    }
    check_tensors(found["state"], comparable)


def check_near(found, expected, still):
    """The same in bf16, whose roundings (2^-9) differ between grids, those of partial sums over tensor ranks
    most; norms are compared while weights are equal: in the first step, and in every one of weights that
    are ``still``."""
    torch.testing.assert_close(found["losses"], expected["losses"], rtol=1e-3, atol=0)
    same = slice(None) if still else slice(1)
    torch.testing.assert_close(found["norms"][same], expected["norms"][same], rtol=2e-3, atol=0)
    check_gradients(found["gradients"], expected["gradients"], 4e-2)
    for mine, theirs in zip(found["seen"], expected["seen"], strict=True):
        assert mine.executed == pytest.approx(theirs.executed, abs=1e-6)
