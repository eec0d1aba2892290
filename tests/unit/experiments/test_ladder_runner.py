"""Running a ladder: what is missing, several at a time, resumably; and the table it ends in."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from skipmega.errors import TrainingError
from skipmega.experiments.plan import LadderPlan, Trial
from skipmega.experiments.report import draw, markdown_table, summarise_rows
from skipmega.experiments.runner import LadderRunner, TrialResult, read_results

# what stands in for pretrain.py: its loss is least at rate 2, row "bad" diverges at 4, "broken" cannot start
TRAINER = """
import json, os, sys
from pathlib import Path
from skipmega.config import dump_config, load_config
config = load_config(sys.argv[1], sys.argv[2:])
folder, rate = Path(config.run_dir), config.optimizer.learning_rate
print("threads", os.environ.get("OMP_NUM_THREADS"), "GPU", os.environ.get("CUDA_VISIBLE_DEVICES"))
if config.model.num_layers == 5:
    sys.exit("error: there is no such data")
folder.mkdir(parents=True)
(folder / "config.yaml").write_text(dump_config(config))
(folder / "checkpoints").mkdir()
routing = {"routed_layers": config.routed_layers, "density": [0.5] * len(config.routed_layers)}
routing |= {"dropped": [0.1] * len(config.routed_layers)}
diverges = config.model.num_layers == 6 and rate == 4
with open(folder / "metrics.jsonl", "w") as out:
    for step in range(1, 3 if diverges else 5):
        seconds = 9.0 if step == 1 else 0.5
        seen = {"step": step, "tokens": 64 * step, "loss": 4 - step / 4, "seconds_per_step": seconds}
        print(json.dumps({"kind": "train", **seen, **routing}), file=out)
    if diverges:
        sys.exit(78)
    if config.model.num_layers == 7:
        sys.exit("error: the device fell off")
    loss = 3 + (rate - 2) ** 2 / 10 + config.training.seed / 100
    print(json.dumps({"kind": "eval", "step": 4, "loss": loss, **routing}), file=out)
"""
BASE = "model: {num_layers: 4, vocab_size: 128}\nrouting: {router: always}\ntraining: {steps: 4}\n"
ROWS = {"dense": ["model.num_layers=4"], "gumbel": ["routing.router=gumbel"], "bad": ["model.num_layers=6"]}


def make_plan(**changes: object) -> LadderPlan:
    values = {
        "base": "base.yaml",
        "reference": "dense",
        "rates": [1.0, 2.0, 4.0],
        "seeds": [1, 3],
        "rows": ROWS,
    }
    return LadderPlan.model_validate({**values, **changes})


def make_runner(
    folder: Path,
    plan: LadderPlan,
    deadline: float | None = None,
    at_once: int = 1,
    devices: Sequence[int] = (),
) -> LadderRunner:
    (folder / "base.yaml").write_text(BASE)
    (folder / "train.py").write_text(TRAINER)
    return LadderRunner(
        folder / "plan.yaml",
        plan,
        folder / "out",
        list(devices),
        at_once,
        deadline,
        script=folder / "train.py",
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ladder")
    plan = make_plan()
    make_runner(folder, plan).run(list(plan.rows))
    return folder


def test_trials_share_the_cores_of_a_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 6)
    make_runner(tmp_path, make_plan(rates=[1.0], extensions=0), at_once=2).run(["dense"])
    log = tmp_path / "out" / f"{Trial('dense', 1.0, 1).name}.log"
    assert log.read_text() == "threads 3 GPU None\n"


@pytest.mark.parametrize(("visible", "expected"), [(None, "1"), ("3,5", "5")])
def test_devices_are_those_that_are_visible(
    visible: str | None, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    make_runner(tmp_path, make_plan(rates=[1.0], extensions=0, seeds=[1]), devices=[1]).run(["dense"])
    log = tmp_path / "out" / f"{Trial('dense', 1.0, 1).name}.log"
    assert log.read_text().endswith(f"GPU {expected}\n")


def test_every_row_is_swept_and_its_best_repeated(finished: Path) -> None:
    results = read_results(finished / "out")
    for row in ("dense", "gumbel"):
        assert sorted((t.rate, t.seed) for t in results if t.row == row) == [(1, 1), (2, 1), (2, 3), (4, 1)]
    best = results[Trial("gumbel", 2.0, 1)]
    assert best.loss == pytest.approx(3.01)
    assert best.seconds_per_step == 0.5
    assert best.dropped == pytest.approx(0.1)
    assert best.held_out_density == [0.5, 0.5]
    assert best.flops < results[Trial("dense", 2.0, 1)].flops
    assert not list((finished / "out").glob("*/checkpoints"))


def test_divergence_is_a_result(finished: Path) -> None:
    assert read_results(finished / "out")[Trial("bad", 4.0, 1)].loss == float("inf")


def test_what_is_finished_is_not_repeated(finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (finished / "out").glob("*/metrics.jsonl")}
    make_runner(finished, make_plan()).run(["dense", "gumbel", "bad"])
    assert before == {path: path.stat().st_mtime_ns for path in (finished / "out").glob("*/metrics.jsonl")}


def test_nothing_starts_after_the_deadline(tmp_path: Path) -> None:
    runner = make_runner(tmp_path, make_plan(), deadline=0.0)
    runner.run(["dense"])
    assert not runner.results


def test_a_row_that_cannot_start_is_named_with_its_last_words_after_all_others(tmp_path: Path) -> None:
    plan = make_plan(rows={"broken": ["model.num_layers=5"], "breaks": ["model.num_layers=7"], **ROWS})
    runner = make_runner(tmp_path, plan)
    with pytest.raises(TrainingError) as caught:
        runner.run(["broken", "breaks", "dense"])
    row, other = str(caught.value).split("; ")
    assert re.search(r"row broken: .* status 1: .*no such data \(all of it: .*broken-1-1\.log\)", row)
    assert re.search(r"row breaks: .*the device fell off", other), "not a divergence"
    assert {trial.row for trial in runner.results} == {"dense"}


def result(row: str, rate: float, seed: int, loss: float, flops: float, held_out: list[float]) -> TrialResult:
    return TrialResult(row, rate, seed, loss, flops, held_out, held_out, 0.0, 0.1)


def test_the_table_tells_every_row_at_its_best(tmp_path: Path) -> None:
    plan = make_plan(rows={"dense": [], "skip": ["dense"]})
    results = [result("dense", r, 1, x, 100.0, []) for r, x in ((1.0, 3.2), (2.0, 3.0), (4.0, 3.4))]
    results += [result("skip", r, 1, x, 50.0, [0.5, 0.45]) for r, x in ((1.0, 3.5), (2.0, 3.3), (4.0, 3.1))]
    results.append(result("dense", 2.0, 3, 3.1, 100.0, []))
    rows = summarise_rows(plan, results, {"dense": [], "skip": [0.5, 0.5]}, {"dense": 0.2, "skip": 0.15})
    dense, skip = rows
    assert (dense.row, dense.seeds, dense.best.rate, dense.rate_inside) == ("dense", 2, 2.0, True)
    assert dense.loss == pytest.approx(3.05)
    assert dense.spread == pytest.approx(0.05)
    assert (skip.best.rate, skip.rate_inside, skip.flops) == (4.0, False, 0.5)
    assert skip.step_time == pytest.approx(0.75)
    assert skip.density_error == pytest.approx(0.05)
    table = markdown_table(rows, "dense")
    assert (
        "| dense | 3.050 ± 0.050 (2 seeds) | +0.000 | 2 (1: 3.200, 2: 3.000, 4: 3.400) | 1.000 | 1.00 |"
        in table
    )
    assert "4, at the end of its range" in table
    draw(rows, "dense", tmp_path)
    for name in ("loss_by_flops.png", "loss_by_time.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_curves_are_drawn_of_the_runs_that_are_there(finished: Path, tmp_path: Path) -> None:
    plan, results = make_plan(), list(read_results(finished / "out").values())
    rows = summarise_rows(plan, results, {row: [] for row in ROWS}, {})
    out = tmp_path / "out"
    shutil.copytree(finished / "out", out)
    draw(rows, "dense", out)
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_results_survive_a_round_trip(finished: Path) -> None:
    stored = json.loads((finished / "out" / "results.json").read_text())
    assert len(stored) == len(read_results(finished / "out"))
