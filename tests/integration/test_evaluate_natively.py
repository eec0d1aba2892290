"""Native checkpoints, evaluated and gone on with: one process or a cut model, the same, printed once."""

import json
from pathlib import Path
from typing import Any

import pytest

from skipmega.evaluation import write_continuation_task
from support.tiny_run import records, run_command, unseen_documents, use_tools
from support.worlds import run_world

# options of two processes
CUTS: dict[str, list[str]] = {
    "tensor": ["--tensor-parallel", "2"],
    "pipeline": ["--pipeline-parallel", "2"],
    "data": [],
}

Scores = dict[tuple[str, str], Any]
Command = list[str | Path]


def launch(commands: dict[str, Command], home: Path) -> dict[str, str]:
    """What each printed, by name: ``alone`` as a command, the others by two processes."""
    hub = str(home / "hf-home")
    printed = {"alone": run_command(*commands["alone"], HF_HOME=hub)}
    cut = {name: command for name, command in commands.items() if name != "alone"}
    texts = run_world(use_tools, 2, home, list(cut.values()), limit=240, variables={"HF_HOME": hub})
    return printed | {name: "".join(of_all) for name, *of_all in zip(cut, *texts, strict=True)}


@pytest.fixture(scope="module")
def evaluated(runs_of_2: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, Scores]]:
    """What each launch printed and wrote of one run folder."""
    home = tmp_path_factory.mktemp("evaluate_natively")
    tasks = write_continuation_task(
        unseen_documents(), home / "tasks", "unseen",
        max_questions=8, num_examples=4, context_chars=80, continuation_chars=30, rolling_chars=300,
    )  # fmt: skip
    options = ["--tasks", ",".join(tasks), "--include-path", home / "tasks", "--limit", "6"]
    commands: dict[str, Command] = {
        name: ["tools/evaluate.py", runs_of_2 / "TP2", *options, "--output", home / f"{name}.json", *cut]
        for name, cut in {"alone": [], **CUTS}.items()
    }
    printed = launch(commands, home)
    return {name: (text, read_scores(home / f"{name}.json")) for name, text in printed.items()}


def read_scores(report: Path) -> Scores:
    tasks = json.loads(report.read_text())["tasks"]
    assert [(task["num_fewshot"], task["num_samples"]) for task in tasks] == [(1, 6), (0, 6)]
    return {(task["name"], metric["name"]): metric["value"] for task in tasks for metric in task["metrics"]}


@pytest.mark.parametrize("name", CUTS)
def test_a_cut_model_has_the_scores_of_one_process(
    evaluated: dict[str, tuple[str, Scores]], name: str
) -> None:
    assert evaluated["alone"][1]["unseen_bits", "bits_per_byte"] > 1
    assert evaluated[name][1] == pytest.approx(evaluated["alone"][1], rel=1e-6)


@pytest.mark.parametrize("name", ["alone", *CUTS])
def test_the_table_is_printed_once(evaluated: dict[str, tuple[str, Scores]], name: str) -> None:
    printed, scores = evaluated[name]
    rows = [line.split() for line in printed.splitlines() if line.startswith("unseen")]
    assert [(row[0], row[4]) for row in rows] == list(scores)
    assert [float(row[6]) for row in rows] == pytest.approx(list(scores.values()), rel=1e-4, abs=1e-4)


def test_a_cut_model_goes_on_as_one_process_does(runs_of_2: Path, tmp_path: Path) -> None:
    """The text is streamed in pieces, once, with what it took below it."""
    options = ["--prompt", "The quick", "--max-tokens", "12", "--temperature", "0.8", "--seed", "5"]
    cuts = {"alone": [], "tensor": CUTS["tensor"], "pipeline": CUTS["pipeline"]}
    commands: dict[str, Command] = {
        name: ["tools/generate.py", runs_of_2 / "TP2", *options, *cut] for name, cut in cuts.items()
    }
    said = {}
    for name, printed in launch(commands, tmp_path).items():
        text, work = printed.strip().rsplit("\n\n", 1)
        said[name] = text, work.split("; ")[1]
        assert text.startswith("The quick")
    assert said["tensor"] == said["pipeline"] == said["alone"]
    assert "layers a token" in said["alone"][1]


def test_the_speed_against_lm_eval_is_measured(runs_of_2: Path, tmp_path: Path) -> None:
    tasks = write_continuation_task(
        unseen_documents(), tmp_path / "tasks", "unseen",
        max_questions=6, num_examples=4, context_chars=80, continuation_chars=30, rolling_chars=300,
    )  # fmt: skip
    options = ["--tasks", ",".join(tasks), "--include-path", tmp_path / "tasks", "--limit", "3"]
    options += ["--repeats", "1", "--output", tmp_path / "out"]
    said = run_command("tools/bench_evaluation.py", runs_of_2 / "TP2", *options, HF_HOME=str(tmp_path / "hf"))
    assert (tmp_path / "out" / "evaluation.md").read_text() in said
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert len(found["seconds"]) == len(found["ratios"]) == 3
    assert found["documents"] == 6
    assert found["difference"] < 1e-5
    assert (tmp_path / "out" / "export" / "config.json").is_file()


DENSITIES = (0.2, 0.5, 0.8)  # the second is that of training


@pytest.fixture(scope="module")
def curves(runs_of_2: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What was written of one checkpoint at several densities, by launch."""
    home = tmp_path_factory.mktemp("curves")
    tasks = write_continuation_task(
        unseen_documents(), home / "tasks", "unseen",
        max_questions=6, num_examples=4, context_chars=80, continuation_chars=30, rolling_chars=300,
    )  # fmt: skip
    options = ["--tasks", ",".join(tasks), "--include-path", home / "tasks", "--limit", "4"]
    options += ["--eval-densities", ",".join(map(str, DENSITIES))]
    commands: dict[str, Command] = {}
    for name, cut in (("alone", []), ("pipeline", CUTS["pipeline"]), ("data", [])):
        files = ["--output", home / f"{name}.json", "--figure", home / f"{name}.png"]
        commands[name] = ["tools/evaluate.py", runs_of_2 / "PP2", *options, *files, *cut]
    found = {}
    for name, printed in launch(commands, home).items():
        found[name] = {"printed": printed, **json.loads((home / f"{name}.json").read_text())}
        assert (home / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    return found


def test_a_curve_has_a_point_for_each_density(curves: dict[str, Any], runs_of_2: Path) -> None:
    points = curves["alone"]["points"]
    assert [point["density"] for point in points] == list(DENSITIES)
    assert [point["executed"] for point in points] == pytest.approx(DENSITIES, abs=0.15)
    flops = [point["flops"] for point in points]
    assert flops == sorted(flops)
    assert flops[-1] < points[0]["dense_flops"]
    (_, last) = records(runs_of_2 / "PP2", "eval").values()
    assert points[1]["loss"] == pytest.approx(last["loss"], rel=1e-6), "the run's own held-out loss"
    assert points[1]["executed"] == pytest.approx(sum(last["density"]) / len(last["density"]), abs=1e-6)
    assert len({point["loss"] for point in points}) == 3
    assert points[0]["scores"].keys() == {"unseen, acc", "unseen_bits, word_perplexity"}
    rows = [line for line in curves["alone"]["printed"].splitlines() if line.startswith("|")]
    assert [row.split()[1] for row in rows[2:]] == ["0.2", "0.5", "0.8"]


@pytest.mark.parametrize("name", ["pipeline", "data"])
def test_the_curve_does_not_depend_on_the_grid(name: str, curves: dict[str, Any]) -> None:
    for found, expected in zip(curves[name]["points"], curves["alone"]["points"], strict=True):
        scores, others = found.pop("scores"), {**expected}
        assert scores == pytest.approx(others.pop("scores"), rel=1e-5)
        assert found == pytest.approx(others, rel=1e-5)


@pytest.mark.parametrize("name", ["alone", *CUTS])
def test_what_answering_took_is_reported(evaluated: dict[str, tuple[str, Scores]], name: str) -> None:
    printed, _ = evaluated[name]
    assert "joules per token not available" in printed, "no device here tells"
    depth = next(line for line in printed.splitlines() if line.startswith("  layers per token: "))
    assert 1 < float(depth.split()[3].rstrip(";")) < 4, "of four layers, two of them routed"
