"""``tools/evaluate.py`` on a native checkpoint: one process or a cut model, the same scores, printed once."""

import json
from pathlib import Path
from typing import Any

import pytest

from skipmega.evaluation import write_continuation_task
from support.tiny_run import TORCHRUN_2, run_command, unseen_documents

LAUNCHES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "alone": ((), ()),
    "tensor": (TORCHRUN_2, ("--tensor-parallel", "2")),
    "pipeline": (TORCHRUN_2, ("--pipeline-parallel", "2")),
}

Scores = dict[tuple[str, str], Any]


@pytest.fixture(scope="module")
def evaluated(runs_of_2: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, Scores]]:
    """What each launch printed and wrote of one run folder."""
    home = tmp_path_factory.mktemp("evaluate_natively")
    tasks = write_continuation_task(
        unseen_documents(), home / "tasks", "unseen",
        max_questions=8, num_examples=4, context_chars=80, continuation_chars=30, rolling_chars=300,
    )  # fmt: skip
    options = ["--tasks", ",".join(tasks), "--include-path", home / "tasks", "--limit", "6"]
    found = {}
    for name, (launcher, grid) in LAUNCHES.items():
        report = home / f"{name}.json"
        command = ["tools/evaluate.py", runs_of_2 / "TP2", *options, "--output", report, *grid]
        found[name] = (run_command(*launcher, *command, HF_HOME=str(home / "hf-home")), read_scores(report))
    return found


def read_scores(report: Path) -> Scores:
    tasks = json.loads(report.read_text())["tasks"]
    assert [(task["num_fewshot"], task["num_samples"]) for task in tasks] == [(1, 6), (0, 6)]
    return {(task["name"], metric["name"]): metric["value"] for task in tasks for metric in task["metrics"]}


@pytest.mark.parametrize("name", ["tensor", "pipeline"])
def test_a_cut_model_has_the_scores_of_one_process(
    evaluated: dict[str, tuple[str, Scores]], name: str
) -> None:
    assert evaluated["alone"][1]["unseen_bits", "bits_per_byte"] > 1
    assert evaluated[name][1] == pytest.approx(evaluated["alone"][1], rel=1e-6)


@pytest.mark.parametrize("name", LAUNCHES)
def test_the_table_is_printed_once(evaluated: dict[str, tuple[str, Scores]], name: str) -> None:
    printed, scores = evaluated[name]
    rows = [line.split() for line in printed.splitlines() if line.startswith("unseen")]
    assert [(row[0], row[4]) for row in rows] == list(scores)
    assert [float(row[6]) for row in rows] == pytest.approx(list(scores.values()), rel=1e-4, abs=1e-4)
