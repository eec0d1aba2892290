"""Training through submit.py on a real SLURM: the quickstart's model, on every launcher, and refusals."""

import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from slurm_cluster import Cluster
from submitting import START, STEPS, losses, refused_by_submit, script, shape, submit

from skipmega.launch.slurm.status import read_status
from support.worlds import ROOT

pytestmark = pytest.mark.timeout(600)  # starting four processes is slow where the cores are busy
NODES = ("node1", "node2", "node3")


@pytest.fixture(scope="session")
def alone(quickstart: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of one process on this machine."""
    run = tmp_path_factory.mktemp("alone") / "run"
    script(ROOT / "pretrain" / "pretrain.py", *quickstart, f"run_dir={run}")
    return losses(run)


@pytest.fixture
def own_disk(cluster: Cluster, tmp_path: Path) -> Iterator[Path]:
    """A folder behind which every node has a file system of its own."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    for node in NODES:
        cluster.do("hide", node, str(folder))
    yield folder
    for node in NODES:
        cluster.do("show", node, str(folder))


@pytest.mark.parametrize("launcher", ["srun", "torchrun", "mpirun"])
def test_two_nodes_train_as_one_process_does(
    cluster: Cluster,
    quickstart: list[str],
    alone: list[float],
    site: Path,
    tmp_path: Path,
    own_disk: Path,
    launcher: str,
) -> None:
    """With torchrun also from sample indices that lie on each node's own disk."""
    if launcher == "mpirun":
        pytest.importorskip("mpi4py", reason="pip install 'skipmega[mpi]'", exc_type=ImportError)
        if shutil.which("mpirun") is None and "REQUIRE_SLURM" not in os.environ:
            pytest.skip("mpirun is not on PATH: apt-get install openmpi-bin")
    run = tmp_path / "run"
    more = [f"run_dir={run}", "parallel.tensor_parallel=2"]
    if launcher == "torchrun":
        more += [f"data.index_cache={own_disk}", "--node-indices"]
    printed = submit(*quickstart, *more, *shape(site, launcher), "--follow")
    log = read_status(run).submission.log.read_text()
    assert log.count(f"held-out samples in {own_disk}") == (2 if launcher == "torchrun" else 0), log
    assert "4 processes: tensor 2" in log, log
    assert losses(run) == pytest.approx(alone, rel=1e-5)
    assert re.search(rf"done .* step {STEPS}/{STEPS}  loss", printed), printed
    assert f"step {STEPS}/{STEPS}" in script(ROOT / "slurm" / "status.py", str(run), "--attempts")


def test_the_deepspeed_launcher(
    cluster: Cluster, quickstart: list[str], alone: list[float], site: Path, tmp_path: Path
) -> None:
    """With a hostfile: over two nodes through its SLURM runner, and on one as it starts processes itself."""
    deepspeed = Path(sys.executable).with_name("deepspeed")
    config, *overrides = quickstart
    jobs = []
    for name, hosts, options in (
        (
            "nodes",
            "node1 slots=1\nnode2 slots=1\n",
            "--no_ssh_check --master_addr node1 --launcher slurm --launcher_args='--ntasks-per-node=1'",
        ),
        ("node", "localhost slots=2\n", "--no_ssh_check --master_addr 127.0.0.1"),
    ):
        hostfile, batch = tmp_path / f"{name}.hosts", tmp_path / f"{name}.sh"
        hostfile.write_text(hosts)
        train = f"{options} {ROOT}/pretrain/pretrain.py {config}"
        command = f"{sys.executable} {deepspeed} --hostfile {hostfile} {train}"
        quoted = shlex.join([*overrides, f"run_dir={tmp_path / name}", "parallel.tensor_parallel=2"])
        batch.write_text(
            f"#!/bin/bash\nexport PYTHONPATH={ROOT}:$PYTHONPATH OMP_NUM_THREADS=1\n{command} {quoted}\n"
        )
        size = ["--nodes=2", "--ntasks-per-node=1"] if name == "nodes" else ["--nodes=1", "--ntasks=2"]
        queued = cluster.command("sbatch", "--parsable", *size, f"--output={tmp_path / name}.log", str(batch))
        jobs.append((name, int(queued)))
        cluster.wait_for_end(jobs[-1][1], START)
    for name, job in jobs:
        log = (tmp_path / f"{name}.log").read_text()
        assert cluster.wait_for_end(job)["JobState"] == "COMPLETED", log
        assert losses(tmp_path / name) == pytest.approx(alone, rel=1e-5), log


def test_what_cannot_run_is_refused_and_nothing_is_queued(
    cluster: Cluster, quickstart: list[str], site: Path, tmp_path: Path
) -> None:
    """Each with its mend; the folder of the run is left as it was."""
    run = tmp_path / "run"
    (tmp_path / "file").write_text("")
    base = [*quickstart, f"run_dir={run}", "--profile", str(site), "--time", "10"]
    for arguments, message in (
        (["--nodes", "1", "--gpus-per-node", "4"], r"nothing was queued.*fewer --nodes or --gpus-per-node"),
        (["--nodes", "4", "--gpus-per-node", "1"], r"nothing was queued.*fewer --nodes or --gpus-per-node"),
        (["--partition", "gpu"], r"nothing was queued.*partitions here: low, spot, high; give --partition"),
        (["--gpus-per-node", "2", "parallel.tensor_parallel=4"], r"2 processes cannot hold"),
        (["--gpus-per-node", "2", "training.global_batch_size=6"], r"use a multiple of 4"),
        ([f"run_dir={tmp_path}/file/run"], r"cannot write run_dir=.*/file/run .* nothing was queued"),
        (["--time", "2-00:00:00"], r"nothing was queued.*limits of the partitions: low \(1:00:00\)"),
        (["--container", "image"], r"this cluster's srun has no --container-image, which is pyxis's"),
        (["--array", "training.seed=1,two"], r"run 1 of --array \(training.seed=two\): .* valid integer"),
        (["--node-indices"], r"--node-indices needs data.index_cache"),
        (["--env", "1=2"], r"--env '1=2' is not of the form NAME=VALUE"),
    ):
        printed = refused_by_submit(*base, *arguments)
        assert re.search(message, printed.replace("\n", " ")), f"{arguments}:\n{printed}"
    assert "start at" in submit(*base, "--gpus-per-node", "2", "--test-only")
    assert cluster.command("squeue", "--noheader") == ""
    assert not run.exists()


def test_a_run_that_is_in_the_queue_is_not_submitted_twice(
    cluster: Cluster, quickstart: list[str], site: Path, tmp_path: Path
) -> None:
    held = tmp_path / "held.yaml"
    held.write_text(yaml.safe_dump({**yaml.safe_load(site.read_text()), "sbatch": ["--hold"]}))
    arguments = [*quickstart, f"run_dir={tmp_path / 'run'}", *shape(held, nodes=1)]
    job = re.search(r"^job (\d+)$", submit(*arguments), re.MULTILINE)
    assert job
    assert f"job {job[1]} of run_dir" in refused_by_submit(*arguments)
    asked = json.loads((tmp_path / "run" / "slurm" / "001" / "job.json").read_text())
    assert (asked["job"], asked["gpus_per_node"]) == (int(job[1]), 2)
    assert "PENDING" in script(ROOT / "slurm" / "status.py", str(tmp_path / "run"))


def test_a_bad_node_is_named_and_avoided(
    cluster: Cluster, quickstart: list[str], alone: list[float], site: Path, tmp_path: Path
) -> None:
    """The preflight of a node that has lost the data's folder."""
    data = Path(quickstart[1].partition("=")[2]).parent
    cluster.do("hide", "node1", str(data))
    run = tmp_path / "run"
    where = [item for item in shape(site) if item != "--no-preflight"]
    submit(*quickstart, f"run_dir={run}", *where, "--avoid-nodes", "--follow")
    status = read_status(run)
    log = status.submission.log.read_text()
    assert f"BAD NODE node1: {data}/tokenizer.model cannot be seen from here" in log
    assert [event.kind for event in status.events] == ["start", "failed", "start", "done"], log
    assert [event.detail for event in status.events][2] == "node[2-3]"
    assert "all-reduce over replicas (4)" in log
    assert "doctor: 4 processes are fit to train" in log
    assert losses(run) == pytest.approx(alone, rel=1e-5)
    cluster.do("show", "node1", str(data))
