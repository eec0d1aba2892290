"""A SLURM cluster of three nodes, started once, whose nodes tests may break."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from slurm_cluster import SCRIPT, Cluster
from stand_in_runs import StandInRun, submit_stand_in
from submitting import STEPS

from support.tiny_run import write_tiny_run
from support.worlds import ROOT

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


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The quickstart's configuration, cut short, on data that takes a second to make."""
    folder = tmp_path_factory.mktemp("data")
    write_tiny_run(folder)
    return [
        str(ROOT / "pretrain" / "configs" / "quickstart.yaml"),
        f"data.tokenizer={folder}/tokenizer.model",
        f"data.train=[{{path: {folder}/data}}]",
        f"data.valid=[{{path: {folder}/data-valid}}]",
        "data.sequence_length=64",
        "data.num_workers=0",
        "schedule.warmup_steps=2",
        f"training.steps={STEPS}",
        "training.micro_batch_size=2",
        "training.global_batch_size=8",
        "training.eval_interval=0",
        "training.eval_sequences=8",
        "logging.interval=1",
        "optimizer.epsilon=1.0e-5",
        "optimizer.learning_rate=1.0e-3",
    ]


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The profile of the throw-away cluster."""
    path = tmp_path_factory.mktemp("site") / "site.yaml"
    variables = {
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "GLOO_SOCKET_IFNAME": "eth0",
    }
    path.write_text(yaml.safe_dump({"partition": "low", "python": sys.executable, "environment": variables}))
    return path


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """The batch script's files, with the stand-in where pretrain.py is."""
    root = tmp_path / "repository"
    for name in ("skipmega", "tools", "pretrain"):
        (root / name).mkdir(parents=True)
    shutil.copytree(ROOT / "slurm", root / "slurm")
    shutil.copy(Path(__file__).with_name("stand_in.py"), root / "pretrain" / "pretrain.py")
    return root


@pytest.fixture
def start(cluster: Cluster, repository: Path, tmp_path: Path) -> Callable[..., StandInRun]:
    """Submit a run of the stand-in: its name, its plan and what its job is to be."""

    def submit(name: str, plan: dict[str, Any] | None = None, **wanted: Any) -> StandInRun:
        folder = tmp_path / name
        folder.mkdir()
        values = {"steps": 30, "interval": 5, "exits": {}, **(plan or {})}
        (folder / "plan.json").write_text(json.dumps(values))
        return submit_stand_in(folder, repository, **wanted)

    return submit
