"""Every configuration that is shipped can run, and the paper's rows cost what their comments say."""

import re
from pathlib import Path

import pytest
import yaml

from skipmega.config import RunConfig, load_config, resolve_grid, resolve_vocabulary
from skipmega.models.flops import forward_flops_per_token, target_shares

FOLDER = Path(__file__).resolve().parents[3] / "pretrain" / "configs"
PAPER = FOLDER / "paper"
RUNS = [
    path
    for path in sorted(FOLDER.rglob("*.yaml"))
    if "base" not in yaml.safe_load(path.read_text())  # a plan of many runs is no configuration of one
]
EFFECTIVE = (6, 12, 24)
DENSITIES = {"d500": 0.5, "d250": 0.25, "d125": 0.125}


def name_of(path: Path) -> str:
    return path.relative_to(FOLDER).with_suffix("").as_posix()


def load(path: Path, overrides: list[str] | None = None) -> RunConfig:
    return resolve_vocabulary(load_config(path, overrides), 32_000)


def row(name: str) -> RunConfig:
    return load(PAPER / f"{name}.yaml")


def flops(name: str) -> float:
    config = row(name)
    return forward_flops_per_token(config, target_shares(config))


def test_there_are_configurations() -> None:
    assert {"quickstart", "h100_300m", "paper/base", "paper/dense_6"} <= set(map(name_of, RUNS))


@pytest.mark.parametrize("path", RUNS, ids=name_of)
def test_it_runs_on_one_process_and_on_eight(path: Path) -> None:
    """On eight with smaller micro-batches where a step has too few sequences for its own; the paper's as
    they are."""
    assert resolve_grid(load(path), 1).parallel.data_parallel == 1
    config = load(path)
    size = min(config.training.micro_batch_size, config.training.global_batch_size // 8)
    if path.parent == PAPER:
        assert size == config.training.micro_batch_size
    assert resolve_grid(load(path, [f"training.micro_batch_size={size}"]), 8).parallel.data_parallel == 8


def test_every_run_has_a_folder_of_its_own() -> None:
    folders = [load(path).run_dir for path in RUNS]
    assert len(set(folders)) == len(folders)
    assert [row(path.stem).run_dir for path in sorted(PAPER.glob("*.yaml"))] == [
        f"runs/paper/{path.stem}" for path in sorted(PAPER.glob("*.yaml"))
    ]


@pytest.mark.parametrize("depth", EFFECTIVE)
@pytest.mark.parametrize("tag", DENSITIES)
def test_a_row_has_the_effective_depth_of_its_name(depth: int, tag: str) -> None:
    config = row(f"eff{depth}_{tag}")
    assert config.model.num_layers == len(config.routed_layers) == depth / DENSITIES[tag]
    assert sum(config.densities.values()) == depth
    assert (config.routing.router, config.routing.density) == ("gumbel", DENSITIES[tag])
    matched = row(f"matched_eff{depth}_{tag}")
    assert matched.model == config.model
    assert matched.routing.density < config.routing.density


MATCHED = {
    **{f"matched_eff{depth}_{tag}": f"dense_{depth}" for depth in EFFECTIVE for tag in DENSITIES},
    **{f"{kind}_eff6_{tag}": f"eff6_{tag}" for kind in ("wide_ffn", "random") for tag in DENSITIES},
    "highway_6": "dense_6",
    "matched_mod_10": "dense_6",
}


@pytest.mark.parametrize(("name", "baseline"), MATCHED.items())
def test_matched_rows_execute_the_operations_of_their_baseline(name: str, baseline: str) -> None:
    ratio = flops(name) / flops(baseline)
    assert ratio == pytest.approx(1.0, abs=0.01)
    for said in re.findall(r"\((\d\.\d+) times\)", (PAPER / f"{name}.yaml").read_text()):
        assert ratio == pytest.approx(float(said), abs=5e-4)


def test_every_row_but_the_dense_ones_is_compared_with_something() -> None:
    rows = {path.stem for path in PAPER.glob("*.yaml")} - {"base"} - {f"dense_{d}" for d in EFFECTIVE}
    unmatched = {f"eff{depth}_{tag}" for depth in EFFECTIVE for tag in DENSITIES} | {"mod_10"}
    assert rows == set(MATCHED) | unmatched


@pytest.mark.parametrize(
    ("name", "baseline"),
    [*((f"eff{depth}_{tag}", f"dense_{depth}") for depth in EFFECTIVE for tag in DENSITIES),
     ("mod_10", "dense_6")],
)  # fmt: skip
def test_the_comment_tells_what_a_row_costs(name: str, baseline: str) -> None:
    (said,) = re.findall(rf"(\d\.\d+) times the FLOPs of {baseline}\.", (PAPER / f"{name}.yaml").read_text())
    assert flops(name) / flops(baseline) == pytest.approx(float(said), abs=5e-4)


def test_wide_ffn_has_the_depth_of_the_dense_row_and_nothing_else_changes() -> None:
    dense = row("dense_6")
    for tag, width in {"d500": 9, "d250": 11, "d125": 15}.items():
        wide = row(f"wide_ffn_eff6_{tag}")
        model = dense.model.model_copy(update={"ffn_hidden_size": width * 1536})
        assert wide.model_copy(update={"run_dir": "", "model": dense.model}) == dense.model_copy(
            update={"run_dir": ""}
        )
        assert wide.model == model


def test_mixture_of_depths_routes_every_other_layer_among_executed_tokens() -> None:
    config = row("mod_10")
    assert config.routed_layers == [1, 3, 5, 7, 9]
    routing = config.routing
    assert (routing.router, routing.keys_values, routing.density) == ("topk", "executed", 0.125)


def test_all_rows_share_data_batch_optimizer_and_schedule() -> None:
    base = row("base")
    assert (base.data.sequence_length, base.training.global_batch_size) == (1024, 256)
    assert (base.optimizer.name, base.optimizer.beta2, base.optimizer.learning_rate) == (
        "adafactor",
        0.99,
        0.1,
    )
    assert (base.schedule.name, base.schedule.warmup_steps) == ("inverse_sqrt", 10_000)
    for path in PAPER.glob("*.yaml"):
        config = row(path.stem)
        for section in ("data", "optimizer", "schedule", "parallel", "checkpoint"):
            assert getattr(config, section) == getattr(base, section), f"{path.stem}: {section}"
        assert config.training.global_batch_size == 256
        assert (config.model.vocab_size, config.model.hidden_size) == (32_000, 1536)
