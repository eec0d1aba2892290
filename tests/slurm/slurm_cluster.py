"""The throw-away SLURM cluster as tests see it."""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from skipmega.launch.slurm.client import has_ended, show_job

SCRIPT = Path(__file__).with_name("cluster.sh")


class Cluster:
    """The running cluster; its clients (sbatch and so on) are on PATH while tests run."""

    def __init__(self, base: Path) -> None:
        self.base = base

    def do(self, verb: str, *arguments: str) -> None:
        """kill-node, kill-slurmd, cut-node, hide, show (each of a node), repair, reconfigure."""
        self._run("bash", str(SCRIPT), verb, str(self.base), *arguments)

    def command(self, *command: str) -> str:
        """Run one of SLURM's commands; returns what it printed."""
        return self._run(*command)

    def wait(
        self, job: int | str, until: Callable[[dict[str, str]], bool], limit: float = 60
    ) -> dict[str, str]:
        """Poll a job until the condition on scontrol's fields holds; a miss shows the controller's log."""
        end = time.monotonic() + limit
        while not until(shown := show_job(job)):
            if time.monotonic() > end:
                log = (self.base / "log" / "slurmctld").read_text()[-3000:]
                pytest.fail(f"job {job}: not in {limit:.0f} s; last seen {shown}\n{log}")
            time.sleep(0.2)
        return shown

    def wait_for_end(self, job: int | str, limit: float = 60) -> dict[str, str]:
        """Poll a job until it neither runs nor comes back."""
        return self.wait(job, lambda shown: has_ended(shown["JobState"]), limit)

    def _run(self, *command: str) -> str:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, (
            f"{' '.join(command)}: exit {done.returncode}\n{done.stdout}{done.stderr}"
        )
        return done.stdout
