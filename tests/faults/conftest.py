"""The run that is disturbed, and what it comes to when it is not."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from skipmega.checkpoint.store import Checkpoint
from support.forked import Attempt
from support.tiny_run import STEPS, records, write_tiny_run

REPEATABLE = ("loss", "grad_norm", "learning_rate", "density", "tokens")
OVERRIDES = ["training.micro_batch_size=2", "checkpoint.interval=1", "checkpoint.retries=0"]


@dataclass(frozen=True)
class Disturbed:
    """Starts attempts at runs of one configuration on two processes and compares their ends."""

    config: Path
    folder: Path
    grid: tuple[str, ...] = ()

    def on(self, name, *grid):
        """The same on another grid, in a folder of its own."""
        folder = self.folder / name
        folder.mkdir()
        return Disturbed(self.config, folder, grid).begun()

    def begun(self):
        """This, once the undisturbed run is there."""
        assert self.attempt("undisturbed").join() == [0, 0], self.said("undisturbed")
        return self

    def attempt(self, name, *overrides, spoil=None):
        output = self.folder / f"{name}.output"
        everything = [f"run_dir={self.folder / name}", *OVERRIDES, *self.grid, *overrides]
        return Attempt(self.config, everything, 2, output, spoil)

    def finish(self, name):
        """One more attempt, undisturbed; then everything is as if there had been no other."""
        assert self.attempt(name).join() == [0, 0], self.said(name)
        self.check(name)

    def said(self, name):
        return (self.folder / f"{name}.output").read_text()

    def check(self, name):
        """Records, weights, moments and routing's memory are those of the undisturbed run, bit by bit."""
        run, whole = self.folder / name, self.folder / "undisturbed"
        found, expected = records(run, "train"), records(whole, "train")
        assert list(found) == list(expected) == list(range(1, STEPS + 1))
        for step, record in expected.items():
            assert {key: found[step][key] for key in REPEATABLE} == {key: record[key] for key in REPEATABLE}
        assert records(run, "eval") == records(whole, "eval")
        tensors, final = Checkpoint.open(run).read_alone(""), Checkpoint.open(whole).read_alone("")
        assert tensors.keys() == final.keys()
        for key, tensor in final.items():
            assert torch.equal(tensors[key], tensor), key


@pytest.fixture(scope="session")
def disturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    return Disturbed(write_tiny_run(folder), folder).begun()
