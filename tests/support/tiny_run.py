"""A tiny run of the real thing: Python source, a tokenizer, prepared data and a configuration file."""

import asyncio
import email
import io
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch.distributed as dist
import yaml

from skipmega.config import load_config
from skipmega.data.corpora.python_corpus import python_documents, write_python_corpus
from skipmega.data.corpora.readers import Corpus
from skipmega.data.tokenizer import train_tokenizer
from skipmega.data.tokenizing.prepare import prepare_dataset
from skipmega.launch.cli import quiet_libraries
from skipmega.launch.environment import discover_process
from skipmega.parallel.process import ProcessInfo
from support.worlds import ROOT

STEPS, HALF = 8, 4
# Runs by name: what they override. Routers whose thresholds or penalties are remembered from step to step are
# among them. The density penalty is that of a micro-batch over all data ranks, hence smaller micro-batches
# where there are two.
_REMEMBERS_QUANTILES = ["routing.router=quantile", "routing.quantile_from=running"]
_REMEMBERS_COEFFICIENT = ["routing.density_control=coefficient", "routing.coefficient_rate=0.5"]
RUNS_OF_1 = {
    "adamw": _REMEMBERS_QUANTILES,
    "adafactor": ["optimizer.name=adafactor", "optimizer.gradient_clip=0.0"],
}
RUNS_OF_2 = {
    "DP2": ["training.micro_batch_size=2", *_REMEMBERS_COEFFICIENT],
    "TP2": ["parallel.tensor_parallel=2", "parallel.sequence_parallel=true", *_REMEMBERS_COEFFICIENT],
    "PP2": ["parallel.pipeline_parallel=2", "parallel.chunks_per_stage=2", *_REMEMBERS_QUANTILES],
    "CP2": ["parallel.context_parallel=2", *_REMEMBERS_QUANTILES],
}
# The last, since DeepSpeed then replaces torch's linear for good
RUNS_OF_2["zero3"] = ["parallel.zero_stage=3", *RUNS_OF_2["DP2"]]
TORCHRUN_2 = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def write_tiny_run(folder: Path) -> Path:
    """Make data in ``folder`` and return a configuration that trains on it; ``run_dir`` is to be overridden.

    ``tokenizer.model``, the pairs ``data`` and ``data-valid`` and ``tiny.yaml`` come of it.
    """
    corpus = folder / "corpus.jsonl"
    write_python_corpus(corpus, 200_000, {"asyncio": Path(str(asyncio.__file__)).parent})
    documents = Corpus([corpus])
    tokenizer = train_tokenizer((item.text for item in documents), folder / "tokenizer.model", 512)
    prepare_dataset(documents, folder / "data", tokenizer, valid_fraction=0.25)
    values = {
        "model": {
            "num_layers": 4,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "ffn_hidden_size": 64,
            "init_std": 0.2,  # large enough that a wrong weight shows in the logits
        },
        "routing": {"router": "gumbel", "density_loss_weight": 1.0, "group_size": 16},
        "data": {
            "tokenizer": str(folder / "tokenizer.model"),
            "train": [{"path": str(folder / "data")}],
            "valid": [{"path": str(folder / "data-valid")}],
            "sequence_length": 64,
            "num_workers": 0,
        },
        # Adam divides a gradient of nearly zero by nearly zero: a larger epsilon tames the rounding
        "optimizer": {"epsilon": 1e-5},
        "schedule": {"warmup_steps": 2},
        "training": {
            "steps": STEPS,
            "micro_batch_size": 4,
            "global_batch_size": 8,
            "eval_interval": HALF,
            "eval_sequences": 8,
        },
        "checkpoint": {"interval": 0},
        "logging": {"interval": 1},
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def unseen_documents() -> list[str]:
    """Text that the tiny run is not trained on."""
    return [item.text for item in python_documents({"email": Path(str(email.__file__)).parent})]


def pretrain_each(config: Path, runs: Sequence[Sequence[str]]) -> None:
    """For ``run_world``: train one run after the other, each ``config`` with its own overrides.

    The processes meet anew for every run, in a file beside the configuration.
    """
    from skipmega.launch.run import pretrain

    process = discover_process()
    for number, overrides in enumerate(runs):
        meet_again(config.with_name(f"meeting-{os.environ['MASTER_PORT']}-{number}"), process)
        pretrain(load_config(config, list(overrides)), process)


def use_tools(folder: Path, commands: Sequence[Sequence[str | Path]]) -> list[str]:
    """For ``run_world``: call the ``main`` of one script after the other, each with its own arguments;
    returns what this process printed, by script. The processes meet anew for each, in ``folder``."""
    quiet_libraries()
    process, printed = discover_process(), []
    for number, (script, *arguments) in enumerate(commands):
        meet_again(folder / f"meeting-{os.environ['MASTER_PORT']}-{number}", process)
        sys.argv = [str(script), *map(str, arguments)]
        with redirect_stdout(io.StringIO()) as out:
            runpy.run_path(str(ROOT / script), run_name="tool")["main"]()
        printed.append(out.getvalue())
    return printed


def meet_again(meeting: Path, process: ProcessInfo) -> None:
    """At one port, a quick process would find the store of the run before."""
    dist.init_process_group("gloo", f"file://{meeting}", rank=process.rank, world_size=process.world_size)


def run_command(*arguments: str | Path, limit: float = 120, **variables: str) -> str:
    """Run the interpreter on ``arguments`` in the repository's root; returns what it printed.

    A failure, or more than ``limit`` seconds, is an error that shows the output; ``variables`` are added to
    the environment.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **variables}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        check=False, cwd=ROOT, env=environment, timeout=limit, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, f"exit {done.returncode}:\n{done.stdout}"
    return done.stdout


def records(run: Path, kind: str) -> dict[int, dict[str, Any]]:
    """The records of one kind in a run's ``metrics.jsonl``, by step; a step written twice is an error."""
    found: dict[int, dict[str, Any]] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["kind"] == kind:
            assert record["step"] not in found, f"step {record['step']} was recorded twice in {run}"
            found[record["step"]] = record
    return found
