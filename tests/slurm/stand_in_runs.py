"""Submitted runs of which :mod:`stand_in` trains, so that the cluster is what takes the time."""

import hashlib
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skipmega.config import RunConfig
from skipmega.launch.slurm.jobs import Job, Submission, next_submission, submit_job
from skipmega.launch.slurm.profile import Profile
from skipmega.launch.slurm.scripts import render_job
from skipmega.launch.slurm.status import read_events


@dataclass
class StandInRun:
    """A submitted stand-in run."""

    folder: Path
    job: int | str
    submission: Submission

    @property
    def events(self) -> list[str]:
        return [event.kind for event in read_events(self.submission)]

    @property
    def exit_status(self) -> int:
        return int((self.submission.path / "exit_status").read_text())

    @property
    def log(self) -> str:
        return self.submission.log.read_text()

    def wait_for_steps(self, count: int) -> None:
        """Until a checkpoint of at least that step exists."""
        end = time.monotonic() + 60
        while not any(int(path.name[5:]) >= count for path in self.folder.glob("checkpoints/step-????????")):
            assert time.monotonic() < end, self.log
            time.sleep(0.1)

    def wait_for_start(self) -> None:
        """Until processes of the first attempt train."""
        end = time.monotonic() + 60
        while not (self.folder / "owner").exists():
            assert time.monotonic() < end
            time.sleep(0.1)

    def wait_for_second_attempt(self, event: str) -> None:
        """Until it starts; prints how long that took (`pytest -s`)."""
        began = time.monotonic()
        while self.events.count("start") < 2:
            assert time.monotonic() < began + 120, self.log
            time.sleep(0.1)
        print(f"\nfrom {event} to the next attempt: {time.monotonic() - began:.0f} s")

    def assert_complete(self, steps: int | None = None) -> None:
        """The last checkpoint is that of a run nobody disturbed, of as many ``steps`` as the plan says."""
        state, steps = "", steps or self.steps
        for step in range(steps):
            state = hashlib.sha256(f"{state} {step}".encode()).hexdigest()
        assert (self.folder / "checkpoints" / f"step-{steps:08d}" / "state").read_text() == state, self.log
        assert self.exit_status == 0

    @property
    def steps(self) -> int:
        return int(json.loads((self.folder / "plan.json").read_text())["steps"])


def submit_stand_in(
    folder: Path, repository: Path, site: dict[str, Any] | None = None, **wanted: Any
) -> StandInRun:
    """Submit a folder that has a plan; ``site`` and ``wanted`` are fields of the profile and the job."""
    config = RunConfig(run_dir=str(folder))
    profile = Profile(**{"python": sys.executable, "gpu_option": "none", "partition": "low", **(site or {})})
    job = Job(
        **{"name": folder.name, "nodes": 2, "gpus_per_node": 2, "time": "10", "preflight": False, **wanted}
    )
    submission = next_submission(folder)
    script = render_job(job, profile, submission, repository / "slurm")
    return StandInRun(folder, submit_job(config, job, script, submission, repository), submission)
