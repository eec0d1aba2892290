"""Batch scripts from their templates."""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from skipmega.launch.slurm.containers import container_command, container_options
from skipmega.launch.slurm.jobs import Job, Submission
from skipmega.launch.slurm.profile import Profile


def render_job(
    job: Job, profile: Profile, submission: Submission, templates: Path, runs: Sequence[str] = ()
) -> str:
    """The batch script's text.

    Args:
        job: what is asked of the cluster.
        profile: what the cluster is like.
        submission: the run's, or the array's.
        templates: the folder of them.
        runs: folders of an array's runs, by task.
    """
    command = shlex.join(container_command(job.container, profile))
    options = {
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        "constraint": profile.constraint,
        "mem": profile.memory_per_node,
        "cpus-per-task": profile.cpus_per_process,
        "exclude": job.exclude,
        "dependency": job.after and f"afterok:{job.after}",
        "kill-on-invalid-dep": job.after and "yes",
        "array": runs and f"0-{len(runs) - 1}{f'%{job.at_once}' if job.at_once else ''}",
    }
    return render(
        "pretrain.sbatch.j2",
        templates,
        job=job,
        profile=profile,
        processes_per_node=job.gpus_per_node,
        runs=runs,
        run_dir=str(submission.path.parents[1]),
        number=submission.path.name,
        code=str(submission.code),
        log=f"{submission.log}-%a" if runs else str(submission.log),
        here=os.getcwd(),
        sbatch_options=[(name, value) for name, value in options.items() if value],
        environment={**profile.environment, **job.environment},
        srun_processes=_srun(job, profile, job.gpus_per_node),
        srun_nodes=_srun(job, profile, 1),
        container=command + " " if command else "",
    )


def render(template: str, templates: Path, **values: Any) -> str:
    """Fill in a template of the folder ``templates``; a name that it misses is an error."""
    environment = Environment(
        loader=FileSystemLoader(templates),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["quote"] = shlex.quote
    return environment.get_template(template).render(**values)


def _srun(job: Job, profile: Profile, tasks_per_node: int) -> str:
    """The start of a command that runs that many tasks on every node, with all of the node's CPUs."""
    options = [
        f"--nodes={job.nodes}",
        f"--ntasks={job.nodes * tasks_per_node}",
        f"--ntasks-per-node={tasks_per_node}",
    ]
    if profile.cpus_per_process is not None:  # since SLURM 22.05 srun does not take it from the job
        options.append(f"--cpus-per-task={profile.cpus_per_process * job.gpus_per_node // tasks_per_node}")
    return shlex.join(["srun", *options, *profile.srun_options, *container_options(job.container, profile)])
