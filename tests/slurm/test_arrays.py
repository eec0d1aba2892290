"""Several runs as one job array: each comes back by itself, and none takes another with it."""

import json
import re
from pathlib import Path

import yaml
from slurm_cluster import Cluster
from stand_in_runs import StandInRun
from submitting import refused_by_submit, script

from skipmega.launch.slurm.client import show_job
from skipmega.launch.slurm.jobs import Submission
from skipmega.launch.slurm.status import read_status

LENGTHS = {"1": 40, "2": 120, "3": 40}
PLAN = {"interval": 5, "exits": {}}


def test_each_run_of_an_array_comes_back_by_itself(
    cluster: Cluster, repository: Path, quickstart: list[str], site: Path, tmp_path: Path
) -> None:
    """One is undisturbed, one warned, one crashes: the last, whose job has the number of the whole array."""
    plans = {f"training.seed={seed}": {**PLAN, "steps": steps} for seed, steps in LENGTHS.items()}
    plans["training.seed=3"]["exits"] = {"0": (7, 1)}
    one_process = yaml.safe_load(site.read_text()) | {"gpu_option": "none"}
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(one_process))
    folder = tmp_path / "sweep"
    arguments = [
        *quickstart, f"run_dir={folder}", "--array", "training.seed=1,2,3", "--at-once", "2", "--time", "10",
        "--no-preflight", "--profile", str(tmp_path / "site.yaml"), "--env", f"PLANS={json.dumps(plans)}",
    ]  # fmt: skip
    printed = script(repository / "slurm" / "submit.py", *arguments)
    number = re.search(r"^job array (\d+) of 3 runs$", printed, re.MULTILINE)
    assert number, printed
    runs = [
        StandInRun(folder / name, f"{number[1]}_{task}", Submission(folder / name / "slurm" / "001"))
        for task, name in enumerate(plans)
    ]
    undisturbed, warned, crashed = runs
    assert show_job(crashed.job)["ArrayTaskThrottle"] == "2"
    warned.wait_for_steps(5)
    cluster.command("scancel", "--batch", "--signal=USR1", str(warned.job))
    assert re.search(rf"job {number[1]}_\d of run_dir.* is still in the queue", refused_by_submit(*arguments))
    for run, events in (
        (undisturbed, ["start", "done"]),
        (warned, ["start", "saved", "start", "done"]),
        (crashed, ["start", "failed", "start", "done"]),
    ):
        ended = cluster.wait_for_end(run.job)
        assert (ended["JobState"], run.events) == ("COMPLETED", events), run.log
        assert int(ended["Restarts"]) == events.count("start") - 1
        run.assert_complete(LENGTHS[run.folder.name[-1]])
        assert read_status(run.folder).is_done
        assert "the run is complete" in run.log
    assert (folder / "slurm" / "001" / "log-1").read_text() == warned.log
    shown = script(repository / "slurm" / "status.py", str(folder), "--attempts")
    assert re.findall(r"seed=(\d): job \S+  done .* attempt (\d)", shown) == [
        ("1", "1"),
        ("2", "2"),
        ("3", "2"),
    ], shown
