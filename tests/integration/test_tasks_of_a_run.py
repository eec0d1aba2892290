"""Tasks that are asked while a run trains, and by a job that follows its checkpoints: the same scores."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from skipmega.checkpoint.store import Checkpoint
from skipmega.config import ParallelConfig
from skipmega.data.tokenizer import Tokenizer
from skipmega.evaluation import EvaluationResult, evaluate_tasks
from skipmega.evaluation.suite import SUITES_DIR
from skipmega.launch.environment import discover_process
from support.tiny_run import pretrain_each, records
from support.worlds import run_world

pytestmark = pytest.mark.timeout(900)

LIMIT = 400.0
GRIDS = {"DP2": [], "TP2": ["parallel.tensor_parallel=2"], "PP2": ["parallel.pipeline_parallel=2"]}
BATCHES = ["training.micro_batch_size=2", "training.global_batch_size=8"]
LENGTH = ["training.steps=4", "training.eval_interval=4", "checkpoint.interval=2", "checkpoint.keep=0"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a suite of three tasks, of which two have a set."""
    home = tmp_path_factory.mktemp("tasks_of_a_run")
    suite = yaml.safe_load((SUITES_DIR / "skiplayer24.yaml").read_text())
    suite |= {"name": "own", "tasks": {name: suite["tasks"][name] for name in ("triviaqa", "copa", "cb")}}
    (home / "own.yaml").write_text(yaml.safe_dump(suite))
    asked = [{"query": f"if x is {n}", "choices": [f"y{n}", "return"], "gold": n % 2} for n in range(9)]
    told = [{"context": f"def f{n}(", "answer": "self", "aliases": ["x"]} for n in range(9)]
    for name, rows in (("copa", asked), ("triviaqa", told)):
        (home / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return home


@pytest.fixture(scope="module")
def runs(home: Path, tiny_config: Path) -> Path:
    asks = [f"evaluation.tasks=[{home / 'own.yaml'}]", f"evaluation.data_dir={home}", "evaluation.limit=7"]
    plain = [f"run_dir={home / 'plain'}", *BATCHES, *LENGTH]
    each = [
        [f"run_dir={home / name}", "evaluation.interval=2", *asks, *grid, *BATCHES, *LENGTH]
        for name, grid in GRIDS.items()
    ]
    run_world(
        pretrain_each, 2, tiny_config, [plain, *each], limit=LIMIT, variables={"HF_HOME": str(home / "hf")}
    )
    return home


@pytest.fixture(scope="module")
def followed(runs: Path) -> list[str]:
    """The checkpoints that a job found, in order; it is started twice."""
    (found,) = run_world(follow, 1, runs, limit=LIMIT, variables={"HF_HOME": str(runs / "hf")})
    return found


def follow(home: Path) -> list[str]:
    from skipmega.inference.native import NativeModel
    from skipmega.launch.follow import follow_checkpoints
    from skipmega.parallel.grid import create_grid

    grid = create_grid(discover_process(), ParallelConfig())

    def evaluate(checkpoint: Checkpoint) -> EvaluationResult:
        tokenizer = Tokenizer.load(str(checkpoint.config.data.tokenizer))
        return evaluate_tasks(
            NativeModel.load(checkpoint, grid), tokenizer, [str(home / "own.yaml")],
            num_fewshot=1, data_dir=home, limit=7, model_name=f"{checkpoint.path}",
        )  # fmt: skip

    return [
        result.model for name in (*GRIDS, "DP2") for result in follow_checkpoints(home / name, evaluate, grid)
    ]


def test_every_checkpoint_is_evaluated_once_and_in_order(followed: list[str], runs: Path) -> None:
    steps = ("step-00000002", "step-00000004")
    assert followed == [str(runs / name / "checkpoints" / step) for name in GRIDS for step in steps]


@pytest.mark.parametrize("name", GRIDS)
def test_the_run_records_what_a_job_finds_in_its_checkpoints(
    name: str, followed: list[str], runs: Path
) -> None:
    told = records(runs / name, "tasks")
    assert list(told) == [2, 4]
    for step, record in told.items():
        result = json.loads((runs / name / "evaluations" / f"step-{step:08d}.json").read_text())
        scores = scores_of(result)
        assert {task for task, _ in (key.split("/") for key in scores)} == {"own_copa", "own_triviaqa"}
        assert {key: record[key] for key in scores} == pytest.approx(scores, rel=1e-6)
        assert "own/understanding" not in record, "cb is missing"
        assert record["own/generation"] == record["own_triviaqa/exact_match"]
        assert record["missing"] == "own_cb"
        assert 1 < record["generate/layers_per_token"] < 4
        assert record["generate/ms_p50"] <= record["generate/ms_p99"]
        assert "generate/joules_per_token" not in record, "no device here tells"


def test_asking_does_not_touch_the_training(runs: Path) -> None:
    plain, asked = records(runs / "plain", "train"), records(runs / "DP2", "train")
    for step, record in plain.items():
        assert (asked[step]["loss"], asked[step]["grad_norm"]) == (record["loss"], record["grad_norm"])


def scores_of(result: dict[str, Any]) -> dict[str, float]:
    return {
        f"{task['name']}/{metric['name']}": metric["value"]
        for task in result["tasks"]
        for metric in task["metrics"]
    }
