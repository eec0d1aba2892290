"""A SLURM cluster of three nodes, started once, whose nodes tests may break."""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from skipmega.launch.slurm.client import LIVE_STATES, show_job

SCRIPT = Path(__file__).with_name("cluster.sh")
INSTALL = "apt-get install slurmctld slurmd slurm-client munge iproute2"
NODES = 3


class Cluster:
    """The running cluster; its clients (sbatch and so on) are on PATH while tests run."""

    def __init__(self, base: Path) -> None:
        self.base = base

    def do(self, verb: str, *arguments: str) -> None:
        """kill-node, kill-slurmd, cut-node, hide (each of a node), repair, reconfigure."""
        self._run("bash", str(SCRIPT), verb, str(self.base), *arguments)

    def command(self, *command: str) -> str:
        """Run one of SLURM's commands; returns what it printed."""
        return self._run(*command)

    def wait(self, job: int, until: Callable[[dict[str, str]], bool], limit: float = 60) -> dict[str, str]:
        """Poll a job until the condition on scontrol's fields holds; a miss shows the controller's log."""
        end = time.monotonic() + limit
        while not until(shown := show_job(job)):
            if time.monotonic() > end:
                log = (self.base / "log" / "slurmctld").read_text()[-3000:]
                pytest.fail(f"job {job}: not in {limit:.0f} s; last seen {shown}\n{log}")
            time.sleep(0.2)
        return shown

    def wait_for_end(self, job: int, limit: float = 60) -> dict[str, str]:
        """Poll a job until it neither runs nor comes back."""
        return self.wait(job, lambda shown: shown["JobState"] not in LIVE_STATES, limit)

    def _run(self, *command: str) -> str:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, (
            f"{' '.join(command)}: exit {done.returncode}\n{done.stdout}{done.stderr}"
        )
        return done.stdout


@pytest.fixture(scope="session")
def _cluster() -> Iterator[Cluster]:
    checked = subprocess.run(["bash", SCRIPT, "check"], capture_output=True, text=True, check=False)
    if checked.returncode == 77:
        reason = f"no SLURM to test on: {checked.stderr.strip()}; {INSTALL}"
        if os.environ.get("REQUIRE_SLURM"):
            pytest.fail(reason)
        pytest.skip(reason)
    # munge refuses a socket under a private folder, and one with a long path
    base = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    base.chmod(0o755)
    before = dict(os.environ)
    try:
        environment = {**os.environ, "OWNER": str(os.getpid())}
        start = ["bash", str(SCRIPT), "start", str(base), str(NODES)]
        with (base / "start.log").open("w") as log:
            # a file, not a pipe: the daemons keep it open
            code = subprocess.run(
                start, stdout=log, stderr=log, env=environment, timeout=90, check=False
            ).returncode
        assert code == 0, (base / "start.log").read_text()
        os.environ.update(SLURM_CONF=f"{base}/slurm.conf", PATH=f"{base}/bin:{os.environ['PATH']}")
        yield Cluster(base)
    finally:
        for name in ("SLURM_CONF", "PATH"):
            os.environ.pop(name, None)
        os.environ.update(before)
        subprocess.run(["bash", SCRIPT, "stop", base], capture_output=True, timeout=60, check=False)
        shutil.rmtree(base, ignore_errors=True)


@pytest.fixture
def cluster(_cluster: Cluster) -> Iterator[Cluster]:
    """The cluster with an empty queue and all nodes up, before as after."""
    yield _cluster
    _cluster.command("scancel", "--user=root")
    _cluster.do("repair")
