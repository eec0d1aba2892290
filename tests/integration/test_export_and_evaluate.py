"""One checkpoint is the same model natively on every grid and as an export, in its logits and its scores."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from skipmega.checkpoint.store import Checkpoint
from skipmega.config import ParallelConfig
from skipmega.data.tokenizer import Tokenizer
from skipmega.evaluation import (
    EvaluationResult,
    evaluate_export,
    evaluate_tasks,
    write_benchmark_tasks,
    write_continuation_task,
)
from skipmega.evaluation.suite import find_suite, write_suite_tasks
from skipmega.launch.environment import discover_process
from support.real_sets import (
    as_summed,
    plain_lm_eval,
    write_own_suite,
    write_sets,
    written_scores,
)
from support.tiny_run import STEPS, run_command, unseen_documents
from support.worlds import run_world

# Sets whose answers fit into a model of 64 tokens. The one of SQuAD's kind is there for its F1, and made of
# another one's questions.
SUITE = ("triviaqa", "squadv2", "copa", "winogrande", "winograd", "openbookqa", "arc_easy", "lambada")
QUESTIONS = 12
DIAL = {None: 0.5, 0.2: 0.2, 0.8: 0.8}  # densities asked for in evaluation, and what should come of them
DIALLED = {"TP1": "quantile", "zero3": "gumbel"}  # whose checkpoints, and their routers
TOKENS = torch.randint(0, 512, (2, 64), generator=torch.Generator().manual_seed(0))
GRIDS_OF_2 = {"DP2": (1, 1), "TP2": (2, 1), "PP2": (1, 2)}
EVALUATED = "TP2"  # whose checkpoint every grid and the export evaluate

WITHOUT_SKIPMEGA = """
import sys
sys.modules["skipmega"] = None  # importing it would fail
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
prompt = AutoTokenizer.from_pretrained(folder)("def main(", return_tensors="pt").input_ids
settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
cached = model.generate(prompt, use_cache=True, **settings)
plain = model.generate(prompt, use_cache=False, **settings)
calls = []
count = lambda model, args, given: calls.append(given["input_ids"].shape[1])
model.register_forward_pre_hook(count, with_kwargs=True)
model.generate(prompt, use_cache=True, **settings)
torch.save({"cached": cached, "plain": plain, "lengths": calls, "prompt": prompt}, out)
"""  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("export_and_evaluate")


@pytest.fixture(scope="module")
def tasks(home: Path) -> list[str]:
    """Task files in ``home/tasks``: text of the corpus' kind, and benchmarks where there are any."""
    names = write_continuation_task(
        unseen_documents(), home / "tasks", "unseen",
        max_questions=12, num_examples=4, context_chars=80, continuation_chars=30, rolling_chars=300,
    )  # fmt: skip
    write_sets(home / "finished", ["boolq", "copa"], 40)
    names += write_benchmark_tasks(home / "finished", home / "tasks", ["boolq", "copa"])
    names.append(str(write_own_suite(home / "own.yaml", SUITE, longest_answer=16)))
    write_sets(home / "sets", [name for name in SUITE if name != "squadv2"], QUESTIONS)
    write_squad(home / "sets")
    return names


def write_squad(sets: Path) -> None:
    """A set with the columns of SQuAD v2, of the questions of TriviaQA; every third has no answer."""
    asked = [json.loads(line) for line in (sets / "triviaqa.jsonl").read_text().splitlines()]
    rows = [
        {
            "title": "trivia",
            "context": row["answer"],
            "question": row["context"][-40:],
            "answers": {"text": row["aliases"] if number % 3 else []},
        }
        for number, row in enumerate(asked)
    ]
    (sets / "squadv2").mkdir()
    for split in ("train", "validation"):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (sets / "squadv2" / f"{split}.jsonl").write_text(lines)


@pytest.fixture(scope="module")
def checkpoints(runs_of_1: Path, runs_of_2: Path) -> dict[str, Path]:
    """By the grid that wrote them."""
    runs = {"TP1": runs_of_1 / "adamw", "TP2": runs_of_2 / "TP2", "PP2": runs_of_2 / "PP2"}
    runs["zero3"] = runs_of_2 / "zero3"
    return {grid: run / "checkpoints" / f"step-{STEPS:08d}" for grid, run in runs.items()}


@pytest.fixture(scope="module")
def alone(home: Path, checkpoints: dict[str, Path], tasks: list[str]) -> dict[str, Any]:
    """What one process made of them; exports are in ``home/exports/GRID``."""
    variables = {"HF_HOME": str(home / "hf-home-1")}
    (found,) = run_world(examine_alone, 1, home, checkpoints, tasks, variables=variables)
    return found


@pytest.fixture(scope="module")
def cut(home: Path, checkpoints: dict[str, Path], tasks: list[str]) -> list[dict[str, Any]]:
    """What two processes made of one checkpoint, by rank and grid."""
    variables = {"HF_HOME": str(home / "hf-home-2")}
    return run_world(examine_cut, 2, home, checkpoints, tasks, variables=variables)


def examine_alone(home: Path, checkpoints: dict[str, Path], tasks: list[str]) -> dict[str, Any]:
    from skipmega.hf.from_checkpoint import export_checkpoint

    differences = {
        grid: export_checkpoint(Checkpoint.open(path), home / "exports" / grid, "fp32", tolerance=1e-4)
        for grid, path in checkpoints.items()
    }
    return {
        "differences": differences,
        **examine(home, checkpoints, tasks, 1, 1),
        "export": scores(evaluate_export(home / "exports" / EVALUATED, tasks, **settings(home))),
    }


def examine_cut(home: Path, checkpoints: dict[str, Path], tasks: list[str]) -> dict[str, Any]:
    return {grid: examine(home, checkpoints, tasks, *sizes) for grid, sizes in GRIDS_OF_2.items()}


def examine(
    home: Path, checkpoints: dict[str, Path], tasks: list[str], tensor: int, pipeline: int
) -> dict[str, Any]:
    """Logits and scores of the native model on this world, and who executes at which density."""
    from skipmega.inference.native import NativeModel
    from skipmega.parallel.grid import create_grid, release_grid

    parallel = ParallelConfig(tensor_parallel=tensor, pipeline_parallel=pipeline)
    grid = create_grid(discover_process(), parallel)
    checkpoint = Checkpoint.open(checkpoints[EVALUATED])
    model = NativeModel.load(checkpoint, grid)
    tokenizer = Tokenizer.load(str(checkpoint.config.data.tokenizer))
    result = evaluate_tasks(model, tokenizer, tasks, **settings(home))
    found = {"logits": model.logits(TOKENS), "native": scores(result), "shares": {}}
    text = torch.tensor(tokenizer.encode("\n".join(unseen_documents()))[: 16 * 64]).view(16, 64)
    for written_by in DIALLED:
        dialled = Checkpoint.open(checkpoints[written_by])
        for density in DIAL:
            model = NativeModel.load(dialled, grid, eval_density=density)
            found["shares"][written_by, density] = executed_shares(model, text)
    release_grid()
    return found


def executed_shares(model: Any, tokens: Tensor) -> dict[int, float]:
    """The share of tokens that execute, by routed layer."""
    model.take_work()
    model.logits(tokens)
    work = model.take_work()
    return {layer: work.executed[layer] / work.tokens for layer in model.config.routed_layers}


def settings(home: Path) -> dict[str, Any]:
    return {
        "num_fewshot": 1,
        "include_paths": [home / "tasks"],
        "data_dir": home / "sets",
        "limit": 40,
    }


def scores(result: EvaluationResult) -> dict[tuple[str, str], float]:
    return {(task.name, metric.name): metric.value for task in result.tasks for metric in task.metrics}


def test_exports_of_every_grid_have_the_native_logits(alone: dict[str, Any]) -> None:
    assert alone["differences"].keys() == {"TP1", "TP2", "PP2", "zero3"}
    assert all(difference < 1e-4 for difference in alone["differences"].values())


@pytest.mark.parametrize("grid", GRIDS_OF_2)
def test_logits_do_not_depend_on_the_grid(grid: str, alone: dict[str, Any], cut: list[Any]) -> None:
    expected: Tensor = alone["logits"]
    assert expected.std() > 0.1
    for found in cut:
        torch.testing.assert_close(found[grid]["logits"], expected, rtol=0, atol=1e-5)


def test_scores_of_the_export_are_the_native_ones(alone: dict[str, Any]) -> None:
    check_scores(alone["export"], alone["native"])
    assert alone["native"]["unseen_bits", "bits_per_byte"] > 1


@pytest.mark.parametrize("written_by", DIALLED)
def test_the_share_executed_follows_the_dial(written_by: str, alone: dict[str, Any]) -> None:
    for asked, expected in DIAL.items():
        shares = alone["shares"][written_by, asked]
        assert shares == {layer: pytest.approx(expected, abs=0.15) for layer in (1, 2)}


@pytest.mark.parametrize("grid", GRIDS_OF_2)
def test_the_share_executed_does_not_depend_on_the_grid(
    grid: str, alone: dict[str, Any], cut: list[Any]
) -> None:
    for key, expected in alone["shares"].items():
        for found in cut:
            shares = found[grid]["shares"][key]
            assert shares == {layer: pytest.approx(expected[layer], abs=0.005) for layer in (1, 2)}


@pytest.mark.parametrize("grid", GRIDS_OF_2)
def test_scores_do_not_depend_on_the_grid(grid: str, alone: dict[str, Any], cut: list[Any]) -> None:
    for found in cut:
        check_scores(found[grid]["native"], alone["native"])


def test_benchmarks_were_among_the_scores(alone: dict[str, Any]) -> None:
    found = {task for task, _ in alone["export"]}
    suite = {f"own_{name}" for name in SUITE}
    assert found == {"unseen", "unseen_bits", "local_boolq", "local_copa"} | suite


def test_scores_of_plain_lm_eval_are_the_native_ones(home: Path, alone: dict[str, Any]) -> None:
    """Generation (exact match and F1) and ranking, on seven sets and one made for F1."""
    tasks = write_suite_tasks(find_suite(str(home / "own.yaml")), home / "sets", home / "plain-tasks").tasks
    assert len(tasks) == len(SUITE)
    found = plain_lm_eval(home / "exports" / EVALUATED, home / "plain-tasks", tasks, home / "plain")
    native = {key: value for key, value in alone["native"].items() if key[0].startswith("own_")}
    assert {("own_squadv2", "f1"), ("own_triviaqa", "exact_match")} <= native.keys()
    check_scores(found, native)


def test_the_export_generates_without_skipmega(home: Path, alone: dict[str, Any]) -> None:
    program, out = home / "without_skipmega.py", home / "generated.pt"
    program.write_text(WITHOUT_SKIPMEGA)
    run_command(program, home / "exports" / "PP2", out, HF_HOME=str(home / "hf-home-3"))
    found = torch.load(out)
    assert torch.equal(found["cached"], found["plain"])
    prompt = found["prompt"].shape[1]
    assert found["cached"].shape[1] == prompt + 12
    assert found["lengths"] == [prompt] + [1] * 11, "with a cache, each call gets the new token alone"


def test_the_tools_export_and_evaluate(home: Path, runs_of_2: Path, tasks: list[str]) -> None:
    out, report = home / "by-tool", home / "evaluation.json"
    dial, home_3 = ("--eval-density", "0.3"), str(home / "hf-home-3")
    printed = run_command("tools/export_hf.py", runs_of_2 / "PP2", out, *dial, HF_HOME=home_3)
    assert f"step-{STEPS:08d} -> {out}, largest logit difference " in printed
    options = ["--tasks", ",".join(tasks[:2]), "--include-path", home / "tasks", "--output", report]
    printed = run_command("tools/evaluate.py", out, *options, HF_HOME=home_3)
    written = json.loads(report.read_text())
    assert [task["name"] for task in written["tasks"]] == tasks[:2]
    assert written["settings"]["num_fewshot"] == 1
    rows = [line.split() for line in printed.splitlines()]
    table = {(row[0], row[4]): float(row[6]) for row in rows if row and row[0] in tasks}
    values = written_scores(report)
    assert table == pytest.approx(values, rel=1e-4, abs=1e-4)
    natively = {}
    for name, density in (("dialled", dial), ("trained", ())):
        options = [*options[:-1], home / f"{name}.json"]
        run_command("tools/evaluate.py", runs_of_2 / "PP2", *options, *density, HF_HOME=home_3)
        natively[name] = written_scores(home / f"{name}.json")
    check_scores(values, natively["dialled"])
    assert natively["trained"] != pytest.approx(values, rel=1e-4), "the density does make a difference"


def check_scores(found: dict[tuple[str, str], float], expected: dict[tuple[str, str], float]) -> None:
    assert as_summed(found) == pytest.approx(as_summed(expected), rel=1e-6)
