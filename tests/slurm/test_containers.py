"""Processes in containers, with stand-ins for the runtimes: a folder that only a container's mounts show."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from slurm_cluster import Cluster
from stand_in_runs import StandInRun

# takes what `apptainer exec` takes, and runs the command with its mounts in a mount namespace
APPTAINER = """#!/bin/bash
[ "$1 $2" = "exec --nv" ] || { echo "unknown: $1 $2" >&2; exit 64; }
shift 2
[ "$1" = --bind ] && bind=$2 && shift 2
[ -e "$1" ] || { echo "no image $1" >&2; exit 65; }
export CONTAINER=$1 FROM=${bind%%:*} TO=${bind##*:}
shift
exec unshare --mount bash -c 'mount --bind "$FROM" "$TO" && exec "$@"' container "$@"
"""
# srun with what pyxis adds to it
SRUN = """#!/bin/bash
[ "$1" = --help ] && { echo "    --container-image=[USER@][REGISTRY#]IMAGE[:TAG]|PATH"; exit; }
options=()
while [[ $1 == -* ]]; do
  case $1 in
    --container-image=*) image=${1#*=} ;;
    --container-mounts=*) mounts=${1#*=} ;;
    *) options+=("$1") ;;
  esac
  shift
done
exec REAL "${options[@]}" APPTAINER exec --nv --bind "$mounts" "$image" "$@"
"""


@pytest.mark.parametrize("runtime", ["apptainer", "pyxis"])
def test_processes_run_in_the_container(
    cluster: Cluster,
    start: Callable[..., StandInRun],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    runtime: str,
) -> None:
    binaries, outside, inside = (tmp_path / name for name in ("bin", "outside", "inside"))
    for folder in (binaries, outside, inside):
        folder.mkdir()
    apptainer, srun, python = binaries / "apptainer", binaries / "srun", outside / "python"
    apptainer.write_text(APPTAINER)
    if runtime == "pyxis":
        srun.write_text(SRUN.replace("REAL", f"{cluster.base}/bin/srun").replace("APPTAINER", str(apptainer)))
        srun.chmod(0o755)
    python.write_text(f'#!/bin/bash\necho "python in $CONTAINER"\nexec {sys.executable} "$@"\n')
    for program in (apptainer, python):
        program.chmod(0o755)
    image = tmp_path / "image.sif"
    image.touch()
    monkeypatch.setenv("PATH", str(binaries), prepend=":")
    site = {
        "python": str(inside / "python"),
        "containers": runtime,
        "container_mounts": [f"{outside}:{inside}"],
    }
    run = start("contained", {"steps": 10}, site=site, container=str(image))
    assert cluster.wait_for_end(run.job)["JobState"] == "COMPLETED", run.log
    run.assert_complete()
    assert run.log.count(f"python in {image}") == 4, run.log
