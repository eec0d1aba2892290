"""Chains of data jobs: every task of every stage, each stage after the one before."""

import subprocess
from pathlib import Path

from skipmega.launch.slurm.data_jobs import DataJob, Step, cleaning, preparation, render_data_jobs
from skipmega.launch.slurm.profile import load_profile
from support.worlds import ROOT

OUTPUT = Path("/data/clean")


def scripts_of(steps: list[Step], workers: int = 1) -> list[str]:
    scripts = render_data_jobs(DataJob(OUTPUT, steps, workers, "10"), load_profile(None), ROOT)
    for script in scripts:
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    return scripts


def test_a_cleaning_is_an_array_for_each_stage_and_a_report() -> None:
    stages = [("filter", 3), ("match", 5), ("sift", 3)]
    *arrays, report = scripts_of(cleaning(["/data/c.yaml", "shards=3"], stages))
    command = '"$PYTHON" "$CODE/tools/clean_data.py" /data/c.yaml shards=3 '
    for script, (stage, tasks) in zip(arrays, stages, strict=True):
        assert f"#SBATCH --array=0-{tasks - 1}\n" in script
        assert f'{command}--stage {stage} --task "$SLURM_ARRAY_TASK_ID"\n' in script
        assert f"#SBATCH --output=/data/clean.log-{stage}-%a\n" in script
    assert f"{command}--report" in report
    assert "--array" not in report


def test_a_preparation_is_an_array_of_shards_and_a_merge() -> None:
    array, merge = scripts_of(preparation(OUTPUT, ["/data/raw", "--tokenizer", "t.model"], 4, 3), workers=3)
    command = '"$PYTHON" "$CODE/tools/prepare_data.py" /data/raw --tokenizer t.model --output /data/clean '
    assert f'{command}--workers 3 --shard "$SLURM_ARRAY_TASK_ID"/4\n' in array
    assert "#SBATCH --cpus-per-task=3\n" in array
    assert f"{command}--merge 4" in merge
