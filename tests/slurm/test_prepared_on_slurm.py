"""A corpus cleaned and tokenized by arrays of jobs, one of which is killed."""

import json
import subprocess
import sys
from pathlib import Path

import yaml
from slurm_cluster import Cluster

from skipmega.data.tokenizer import train_tokenizer
from support.worlds import ROOT

SHARDS = 8
# of one shard the process is killed the first time, while it writes
KILLED_ONCE = """#!/bin/bash
if [ "$SLURM_ARRAY_TASK_ID" != 3 ] || [ -n "$SLURM_RESTART_COUNT" ]; then exec {python} "$@"; fi
{python} "$@" &
until compgen -G "{shards}/.0003*" || ! kill -0 $!; do sleep 0.02; done
kill -9 $!
exit 137
"""


def run(*command: str) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_an_array_with_a_killed_task_makes_the_files_of_one_process(cluster: Cluster, tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    texts = [path.read_text() for path in sorted(Path(json.__file__).parent.glob("*.py"))]
    for number in range(SHARDS + 3):
        lines = [json.dumps({"text": text[number:]}) for text in texts]
        (folder / f"{number:02d}.jsonl").write_text("\n".join(lines))
    train_tokenizer(texts, tmp_path / "tokenizer.model", 500)
    python = tmp_path / "python"
    python.write_text(KILLED_ONCE.format(python=sys.executable, shards=tmp_path / "many" / "data.shards"))
    python.chmod(0o755)
    site = tmp_path / "site.yaml"
    site.write_text(yaml.safe_dump({"python": str(python), "partition": "low"}))
    options = [str(folder), "--tokenizer", str(tmp_path / "tokenizer.model"), "--valid-fraction", "0.3"]

    run(sys.executable, "tools/prepare_data.py", *options, "--output", str(tmp_path / "one" / "data"))
    where = ["--output", str(tmp_path / "many" / "data"), "--shards", str(SHARDS), "--workers", "1"]
    printed = run(
        sys.executable, "slurm/prepare_data.py", *options, *where, "--time", "5", "--profile", str(site)
    )

    merge = int(printed.split("job ")[1].split()[0])
    ended = cluster.wait_for_end(merge, 240)
    logs = {path.name: path.read_text() for path in (tmp_path / "many").glob("data.log-*")}
    assert ended["JobState"] == "COMPLETED", logs
    assert "task 3: exit code 137, once more" in logs["data.log-3"]
    for path in (tmp_path / "one").iterdir():
        assert (tmp_path / "many" / path.name).read_bytes() == path.read_bytes(), path.name
    assert not (tmp_path / "many" / "data.shards").exists()


def test_a_cleaning_by_arrays_is_that_of_one_machine(cluster: Cluster, tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(3):
        lines = [json.dumps({"text": f"document {number * place}"}) for place in range(4)]
        (folder / f"{number}.jsonl").write_text("\n".join(lines))
    config, site = tmp_path / "c.yaml", tmp_path / "site.yaml"
    config.write_text(
        f"input: [{folder}]\nshards: 3\noutput: {tmp_path}/one\ndeduplicate: {{partitions: 2}}\n"
    )
    site.write_text(yaml.safe_dump({"python": sys.executable, "partition": "low"}))
    run(sys.executable, "tools/clean_data.py", str(config))
    options = [str(config), f"output={tmp_path}/many", "--time", "5", "--profile", str(site)]
    printed = run(sys.executable, "slurm/clean_data.py", *options)

    ended = cluster.wait_for_end(int(printed.split("; ")[1].split()[0]), 240)
    logs = {path.name: path.read_text() for path in tmp_path.glob("many.log-*")}
    assert ended["JobState"] == "COMPLETED", logs
    texts = sorted((tmp_path / "one" / "text").iterdir())
    assert len(texts) == 3
    for path in texts:
        assert (tmp_path / "many" / "text" / path.name).read_bytes() == path.read_bytes(), logs


def test_a_shuffle_by_an_array_is_that_of_one_machine(cluster: Cluster, tmp_path: Path) -> None:
    texts = [f"document {number}, " * (number % 9 + 1) for number in range(60)]
    train_tokenizer(texts, tmp_path / "t.model", 300)
    for pair in range(2):
        lines = [json.dumps({"text": text}) for text in texts[pair::2]]
        (tmp_path / f"{pair}.jsonl").write_text("\n".join(lines))
        prepared = ["--tokenizer", str(tmp_path / "t.model"), "--output", str(tmp_path / f"data-{pair}")]
        run(sys.executable, "tools/prepare_data.py", str(tmp_path / f"{pair}.jsonl"), *prepared)
    site = tmp_path / "site.yaml"
    site.write_text(yaml.safe_dump({"python": sys.executable, "partition": "low"}))
    options = ["--shards", "3", "--pack", "32"]
    run(sys.executable, "tools/data.py", "shuffle", f"{tmp_path}/data-*", f"{tmp_path}/one/web", *options)
    given = [f"{tmp_path}/data-*", f"{tmp_path}/many/web", *options, "--time", "5", "--profile", str(site)]
    printed = run(sys.executable, "slurm/shuffle_data.py", *given)

    ended = cluster.wait_for_end(int(printed.split("array ")[1].split()[0]), 240)
    logs = {path.name: path.read_text() for path in (tmp_path / "many").glob("web.log-*")}
    assert ended["JobState"] == "COMPLETED", logs
    files = sorted((tmp_path / "one").iterdir())
    assert len(files) == 9
    for path in files:
        assert (tmp_path / "many" / path.name).read_bytes() == path.read_bytes(), logs
