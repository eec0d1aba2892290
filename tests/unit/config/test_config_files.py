"""From files and overrides to a configuration and back."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skipmega.config import RunConfig, build_config, dump_config, load_config, parse_override
from skipmega.errors import ConfigError


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_no_file_means_the_defaults() -> None:
    assert load_config(None) == RunConfig() == build_config({}, source="nothing")


def test_an_empty_file_means_the_defaults(tmp_path: Path) -> None:
    assert load_config(write(tmp_path / "empty.yaml", "# nothing yet\n")) == RunConfig()


def test_later_files_win_then_the_file_itself_then_the_command_line(tmp_path: Path) -> None:
    """Each of the four layers sets one field more than the next, so each field shows who won."""
    write(
        tmp_path / "base" / "deep.yaml",
        "training: {steps: 1, seed: 1, micro_batch_size: 1, eval_interval: 1}",
    )
    write(tmp_path / "base" / "first.yaml", "defaults: [deep.yaml]\nmodel: {hidden_size: 24}")
    write(tmp_path / "second.yaml", "training: {steps: 2, seed: 2, micro_batch_size: 2}")
    top = write(
        tmp_path / "top.yaml", "defaults: [base/first.yaml, second.yaml]\ntraining: {steps: 3, seed: 3}"
    )
    config = load_config(top, ["training.steps=4"])
    training = config.training
    assert (training.steps, training.seed, training.micro_batch_size, training.eval_interval) == (4, 3, 2, 1)
    assert config.model.hidden_size == 24
    assert config.model.num_layers == RunConfig().model.num_layers


def test_lists_replace_and_do_not_merge(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "data: {train: [{path: a}, {path: b}], sequence_length: 64}")
    config = load_config(write(tmp_path / "top.yaml", "defaults: [base.yaml]\ndata: {train: [{path: c}]}"))
    assert [source.path for source in config.data.train] == ["c"]
    assert config.data.sequence_length == 64


def test_the_same_file_may_be_named_twice_when_there_is_no_circle(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "training: {seed: 5}")
    write(tmp_path / "left.yaml", "defaults: [base.yaml]")
    write(tmp_path / "right.yaml", "defaults: [base.yaml]")
    assert load_config(write(tmp_path / "top.yaml", "defaults: [left.yaml, right.yaml]")).training.seed == 5


def test_a_circle_of_defaults_is_shown(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "defaults: [b.yaml]")
    write(tmp_path / "b.yaml", "defaults: [a.yaml]")
    with pytest.raises(ConfigError, match=r"circle: .*a\.yaml -> .*b\.yaml -> .*a\.yaml$"):
        load_config(tmp_path / "a.yaml")


def test_a_missing_file_is_named_together_with_who_asked_for_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read config file .*top\.yaml: No such file"):
        load_config(tmp_path / "top.yaml")
    write(tmp_path / "top.yaml", "defaults: [gone.yaml]")
    with pytest.raises(ConfigError, match=r"gone\.yaml \(named by .*top\.yaml\): No such file"):
        load_config(tmp_path / "top.yaml")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("model: {num_layers: 2", "is not valid YAML"),
        ("- model", "must hold a mapping of sections, found list"),
        ("defaults: base.yaml", "defaults must be a list of file names, found 'base.yaml'"),
        ("defaults: [1]", r"defaults must be a list of file names, found \[1\]"),
    ],
)
def test_a_file_of_another_shape_is_refused_by_name(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=rf"wrong\.yaml.*{complaint}"):
        load_config(write(tmp_path / "wrong.yaml", text))


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("a.b=1", 1),
        ("a.b=1e-3", 1e-3),
        ("a.b=-2.5E+4", -2.5e4),
        ("a.b=1e3", 1000.0),
        ("a.b= null", None),
        ("a.b=", None),
        ("a.b=true", True),
        ("a.b='1e-3'", "1e-3"),
        ("a.b=[1, x]", [1, "x"]),
        ("a.b={c: 2}", {"c": 2}),
        ("a.b=x=y", "x=y"),
        (" a.b =runs/e1", "runs/e1"),
    ],
)
def test_an_override_s_value_is_yaml(override: str, value: object) -> None:
    parsed = parse_override(override)
    assert parsed == {"a": {"b": value}}
    assert type(parsed["a"]["b"]) is type(value)


@pytest.mark.parametrize(
    "override", ["model.num_layers", "=3", "model.=3", ".num_layers=3", "model..x=3", ""]
)
def test_a_malformed_override_is_quoted_with_the_right_form(override: str) -> None:
    with pytest.raises(ConfigError, match=r"is not of the form section\.field=value") as refused:
        parse_override(override)
    assert repr(override) in str(refused.value)


def test_an_override_that_is_not_yaml_is_quoted() -> None:
    with pytest.raises(ConfigError, match=r"override 'data.train=\[1': the value is not valid YAML"):
        parse_override("data.train=[1")


def test_overrides_apply_in_order_and_merge_into_sections() -> None:
    config = load_config(
        None, ["optimizer={name: adafactor, beta2: 0.99}", "optimizer.beta2=0.9", "run_dir=there"]
    )
    assert (config.optimizer.name, config.optimizer.beta2, config.run_dir) == ("adafactor", 0.9, "there")


RATES = st.floats(min_value=1e-12, max_value=1e6, allow_nan=False)
NAMES = st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "S", "Zs"]), min_size=1, max_size=12)


@settings(deadline=None, max_examples=60)
@given(
    rate=RATES,
    run_dir=NAMES.map(lambda name: f"runs/{name}"),
    sources=st.lists(
        st.fixed_dictionaries({"path": NAMES.map(lambda n: f"d/{n}"), "weight": RATES}), max_size=3
    ),
    group=st.sampled_from([None, 1, 64, 1024]),
    capacity=st.none() | RATES,
    tie=st.booleans(),
    seed=st.integers(0, 2**63),
)
def test_a_dumped_configuration_loads_back_equal(
    tmp_path_factory: pytest.TempPathFactory,
    rate: float,
    run_dir: str,
    sources: list[dict[str, object]],
    group: int | None,
    capacity: float | None,
    tie: bool,
    seed: int,
) -> None:
    config = build_config(
        {
            "run_dir": run_dir,
            "optimizer": {"learning_rate": rate},
            "data": {"train": sources},
            "routing": {"group_size": group, "capacity_factor": capacity},
            "model": {"tie_embeddings": tie},
            "training": {"seed": seed},
        },
        source="hypothesis",
    )
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    assert load_config(write(path, dump_config(config))) == config


@pytest.mark.parametrize("name", ["1e5", "1e-3", "3E8", "null", "1"])
def test_names_that_look_like_numbers_survive_a_dump(tmp_path: Path, name: str) -> None:
    config = build_config({"run_dir": name}, source="test")
    (tmp_path / "dumped.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "dumped.yaml") == config


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"binary\.yaml"):
        load_config(tmp_path / "binary.yaml")
