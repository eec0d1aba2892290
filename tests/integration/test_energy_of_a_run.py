"""From a device's counter to the records of a run: joules of training, scoring and generation apart."""

import json
from pathlib import Path

import pytest
import yaml

from skipmega.evaluation.suite import SUITES_DIR
from support.tiny_run import pretrain_each, records
from support.worlds import run_world

pytestmark = pytest.mark.timeout(300)

PROCESSES = 2
OF_A_STEP, OF_A_BATCH, OF_ANYTHING_ELSE = 3.0, 5.0, 1e6  # joules a process


def pretrain_metered(config: Path, overrides: list[str]) -> None:
    """As ``pretrain_each``, each process on a device whose counter grows by what is done."""
    import skipmega.evaluation.adapter
    import skipmega.training.loop
    from skipmega.inference.native import NativeModel
    from skipmega.inference.work import Work
    from skipmega.launch.live_tasks import LiveTasks
    from skipmega.training.engine import TrainingEngine
    from skipmega.training.guard import StepGuard

    spent = [7e9]

    def spend(owner: type, name: str, joules: float) -> None:
        done = getattr(owner, name)

        def spending(*arguments: object, **named: object) -> object:
            spent[0] += joules
            return done(*arguments, **named)

        setattr(owner, name, spending)

    spend(StepGuard, "step", OF_A_STEP)
    spend(NativeModel, "take_work", OF_A_BATCH)
    spend(LiveTasks, "ask", OF_ANYTHING_ELSE)
    spend(TrainingEngine, "evaluate", OF_ANYTHING_ELSE)
    for module in (skipmega.evaluation.adapter, skipmega.training.loop):
        module.energy_source = lambda device: lambda: spent[0]

    work = NativeModel.take_work

    def ten_tokens(model: NativeModel) -> Work:
        return Work(10, work(model).executed)

    NativeModel.take_work = ten_tokens
    pretrain_each(config, [overrides])


def test_records_tell_what_each_kind_of_work_consumes(tiny_config: Path, tmp_path: Path) -> None:
    suite = yaml.safe_load((SUITES_DIR / "skiplayer24.yaml").read_text())
    suite |= {"name": "own", "tasks": {name: suite["tasks"][name] for name in ("triviaqa", "copa")}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(suite))
    asked = [{"query": f"if x is {n}", "choices": ["y", "return"], "gold": n % 2} for n in range(4)]
    told = [{"context": f"def f{n}(", "answer": "self", "aliases": ["x"]} for n in range(4)]
    for name, rows in (("copa", asked), ("triviaqa", told)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = [
        f"run_dir={tmp_path / 'run'}", "training.micro_batch_size=2", "training.steps=4",
        "training.eval_interval=2", "logging.interval=4", "checkpoint.interval=2", "evaluation.interval=2",
        f"evaluation.tasks=[{tmp_path / 'own.yaml'}]", f"evaluation.data_dir={tmp_path}",
    ]  # fmt: skip
    variables = {"HF_HOME": str(tmp_path / "hf")}
    run_world(pretrain_metered, PROCESSES, tiny_config, overrides, limit=200, variables=variables)
    per_token = PROCESSES * OF_A_STEP / (8 * 64)
    trained, answered = (records(tmp_path / "run", kind) for kind in ("train", "tasks"))
    assert list(trained) == [4], "evaluations and a save lie inside of what the record is about"
    assert trained[4]["joules_per_token"] == pytest.approx(per_token)
    for step in (2, 4):
        for kind in ("score", "generate"):
            assert answered[step][f"{kind}/joules_per_token"] == pytest.approx(OF_A_BATCH / 10), kind
