#!/usr/bin/env python3
"""Submits a pre-training run to SLURM; the job continues itself over time limits, preemption and dead nodes.

    python slurm/submit.py pretrain/configs/h100_300m.yaml --nodes 4 --gpus-per-node 8 --time 24:00:00 \\
        --profile slurm/profiles/site.yaml parallel.tensor_parallel=2

Configuration, grid, memory and data are checked before anything is queued. Code and configuration are copied
into RUN_DIR/slurm/NNN, where the log and a list of the attempts appear too. docs/cluster.md tells the rest.
"""

import argparse
from pathlib import Path

from skipmega.launch.cli import run_script

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Check, show or submit, as the arguments say."""
    arguments = _parse_arguments()

    # behind the arguments: torch and megatron-core take seconds to import
    from skipmega.config import load_config
    from skipmega.errors import LaunchError
    from skipmega.launch.estimate import describe, table
    from skipmega.launch.slurm import arrays, client, containers, jobs, profile, scripts, status

    site = profile.load_profile(arguments.profile).model_copy(
        update={name: getattr(arguments, name) for name in _SITE if getattr(arguments, name) is not None}
    )
    config = load_config(arguments.config, arguments.overrides)
    run = Path(config.run_dir).absolute()
    job = jobs.Job(
        name=arguments.name or run.name,
        environment=jobs.parse_environment(arguments.env),
        **{name: getattr(arguments, name) for name in _JOB},
    )
    configs = [config]
    if arguments.array:
        own = arrays.read_array(arguments.array)
        configs = arrays.load_runs(arguments.config, arguments.overrides, own)
    costs = [jobs.check_job(config, job, site) for config in configs]
    print(table(costs) if arguments.array else describe(costs[0]))
    tasks = [str(Path(config.run_dir).absolute()) for config in configs] if arguments.array else []
    submission = jobs.Submission(run / "slurm" / "001")
    if not arguments.dry_run:
        containers.check_pyxis(job.container, site)
        submission = jobs.next_submission(run, tasks)
    script = scripts.render_job(job, site, submission, ROOT / "slurm", tasks)
    if arguments.dry_run:
        print(script)
    elif arguments.test_only:
        print(client.ask_whether_it_could_run(script))
    elif arguments.array:
        number = arrays.submit_array(configs, job, script, submission, ROOT)
        print(f"job array {number} of {len(tasks)} runs\nstate: python slurm/status.py {config.run_dir}")
    else:
        number = jobs.submit_job(config, job, script, submission, ROOT)
        print(
            f"job {number}\nlog {submission.log}\nstate: python slurm/status.py {config.run_dir}", flush=True
        )
        if arguments.follow and not (end := status.follow(run)).is_done:
            raise LaunchError(f"the run is not complete: {end.describe()}; see {submission.log}")


# arguments that overrule the site profile, and those that are a job's own
_SITE = ("partition", "account", "qos", "constraint")
_JOB = (
    *("nodes", "gpus_per_node", "time", "launcher", "container", "after", "exclude", "at_once"),
    *("warning_seconds", "max_failures", "max_stalled", "preflight", "avoid_nodes", "node_indices"),
)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("config", help="YAML file of the run")
    add("overrides", nargs="*", help="section.field=value, values in YAML")
    add("--nodes", type=int, default=1, help="(1)")
    add("--gpus-per-node", type=int, default=1, help="processes of a node, one on each GPU (1)")
    add("--time", required=True, help="limit of one attempt, as sbatch reads it; the job continues itself")
    add("--profile", help="YAML file of the site: partition, account, modules, variables (slurm/profiles/)")
    for name in _SITE:
        add(f"--{name}", help="overrules the profile")
    add("--launcher", choices=("srun", "torchrun", "mpirun"), default="srun")
    add("--container", metavar="IMAGE", help="run the processes in it")
    add("--env", action="append", default=[], metavar="NAME=VALUE", help="a variable of every process")
    add("--after", type=int, metavar="JOB", help="start when that job has ended well")
    add(
        "--array",
        metavar="RUNS",
        help="several runs as one job array, each in its own folder in run_dir: FIELD=VALUE,VALUE,... or a "
        "file with the overrides of one run in a line",
    )
    add("--at-once", type=int, metavar="N", help="runs of the array that may run at the same time (all)")
    add("--exclude", metavar="NODES", help="nodes to keep away from")
    add("--name", help="of the job (the run folder's)")
    add("--warning-seconds", type=int, default=300, help="from saving to the time limit (300)")
    add("--max-failures", type=int, default=20, help="failures after which the job gives up (20)")
    add(
        "--max-stalled",
        type=int,
        default=3,
        help="attempts without a newer checkpoint after which it does (3)",
    )
    add("--no-preflight", dest="preflight", action="store_false", help="start without tools/doctor.py")
    add(
        "--avoid-nodes",
        action="store_true",
        help="exclude nodes that the preflight names from the next attempt",
    )
    add(
        "--node-indices",
        action="store_true",
        help="build sample indices once on every node, in data.index_cache on its own disk",
    )
    add("--dry-run", action="store_true", help="show the batch script; SLURM is not needed")
    add("--test-only", action="store_true", help="ask SLURM whether and when it could run; queues nothing")
    add("--follow", action="store_true", help="show progress until the run is complete or gives up")
    arguments = parser.parse_intermixed_args()
    if arguments.array and arguments.follow:
        parser.error("--follow shows one run: python slurm/status.py RUN_DIR shows those of an array")
    if arguments.at_once is not None and not (arguments.array and arguments.at_once > 0):
        parser.error("--at-once limits an --array, to 1 or more runs")
    return arguments


if __name__ == "__main__":
    run_script(main)
