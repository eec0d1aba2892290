"""A SLURM cluster of three nodes, started once, whose nodes tests may break."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_cluster import SCRIPT, Cluster

INSTALL = "apt-get install slurmctld slurmd slurm-client munge iproute2"
NODES = 3


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
