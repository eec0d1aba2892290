"""Chains of data jobs: every task of every stage, each stage after the one before."""

import subprocess
import sys
from pathlib import Path

from support.worlds import ROOT


def dry_run(*arguments: str | Path) -> list[str]:
    command = [sys.executable, *map(str, arguments), "--time", "10", "--dry-run"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    scripts = ["#!/bin/bash" + script for script in done.stdout.split("#!/bin/bash")[1:]]
    for script in scripts:
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    return scripts


def test_a_cleaning_is_an_array_for_each_stage_and_a_report(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text("some text")
    config, clean = tmp_path / "c.yaml", tmp_path.with_name(f"{tmp_path.name}-clean")
    config.write_text(f"input: [{tmp_path}]\noutput: {clean}\nshards: 3\n")
    scripts = dry_run("slurm/clean_data.py", config, "deduplicate.partitions=5")
    assert len(scripts) == 4
    command = f'"$PYTHON" "$CODE/tools/clean_data.py" {config} deduplicate.partitions=5 '
    for script, stage, tasks in zip(scripts, ("filter", "match", "sift"), (3, 5, 3), strict=False):
        assert f"#SBATCH --array=0-{tasks - 1}\n" in script
        assert f'{command}--stage {stage} --task "$SLURM_ARRAY_TASK_ID"\n' in script
        assert f"#SBATCH --output={clean}.log-{stage}-%a\n" in script
    assert f"{command}--report" in scripts[3]
    assert "--array" not in scripts[3]


def test_a_preparation_is_an_array_of_shards_and_a_merge(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text")
    output = tmp_path / "data"
    where = ("--tokenizer", "t.model", "--output", output, "--shards", "1", "--workers", "3")
    array, merge = dry_run("slurm/prepare_data.py", tmp_path / "a.txt", *where)
    assert f'--output {output} --workers 3 --shard "$SLURM_ARRAY_TASK_ID"/1\n' in array
    assert "#SBATCH --cpus-per-task=3\n" in array
    assert f"--output {output} --merge 1" in merge
