"""The routing section: which layers are routed, at which density, and what it refuses."""

from typing import Any

import pytest

from skipmega.config import DensityRamp, RunConfig, build_config, dump_config, load_config
from skipmega.errors import ConfigError

CONTROLLED = ("gumbel", "sigmoid", "fixed_input")
OTHERS = ("quantile", "topk", "random", "highway", "always", "never")


def make_config(layers: int = 12, **routing: Any) -> RunConfig:
    return build_config({"model": {"num_layers": layers}, "routing": routing}, source="test")


@pytest.mark.parametrize(
    ("layers", "routing", "expected"),
    [
        (12, {}, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
        (6, {"dense_first": 0, "dense_last": 0}, [0, 1, 2, 3, 4, 5]),
        (6, {"dense_first": 2, "dense_last": 1}, [2, 3, 4]),
        (6, {"dense_first": 1, "dense_last": 0, "every": 2}, [1, 3, 5]),
        (6, {"dense_first": 0, "dense_last": 0, "every": 2}, [0, 2, 4]),
        (8, {"dense_first": 1, "dense_last": 2, "every": 3}, [1, 4]),
        (6, {"dense_first": 1, "every": 9}, [1]),
        (6, {"router": "highway"}, [1, 2, 3, 4]),
        (6, {"router": "never"}, [1, 2, 3, 4]),
        (6, {"router": "always"}, []),
        (6, {"router": "always", "dense_first": 20, "every": 3}, []),
    ],
)
def test_every_so_many_th_layer_between_the_dense_ends_is_routed(
    layers: int, routing: dict[str, Any], expected: list[int]
) -> None:
    config = make_config(layers, **routing)
    assert config.routed_layers == expected
    assert [layer for layer in range(layers) if config.layer_is_routed(layer)] == expected


@pytest.mark.parametrize(
    ("density", "expected"),
    [
        (0.25, [0.25] * 4),
        (1, [1] * 4),
        ([0.1, 0.2, 0.3, 1.0], [0.1, 0.2, 0.3, 1.0]),
        ({"first": 0.2, "last": 0.8}, [0.2, 0.4, 0.6, 0.8]),
        ({"first": 1.0, "last": 0.25}, [1.0, 0.75, 0.5, 0.25]),
    ],
)
def test_a_density_is_a_number_a_list_or_a_ramp(density: Any, expected: list[float]) -> None:
    config = make_config(6, density=density, eval_density=density)
    assert list(config.densities) == [1, 2, 3, 4]
    assert list(config.densities.values()) == pytest.approx(expected, abs=1e-12)
    assert config.eval_densities == config.densities


def test_a_ramp_over_every_other_layer_and_over_one() -> None:
    ramp = {"first": 0.2, "last": 0.6}
    config = make_config(7, density=ramp, every=2)
    assert config.densities == pytest.approx({1: 0.2, 3: 0.4, 5: 0.6})
    assert make_config(3, density=ramp).densities == {1: 0.2}


def test_without_an_eval_density_evaluation_is_as_trained() -> None:
    assert make_config(density=[0.1] * 10).eval_densities is None


@pytest.mark.parametrize("density", [0.5, [0.25, 0.5, 0.75, 1.0], {"first": 0.1, "last": 0.9}])
def test_highway_runs_everybody_never_nobody_and_always_has_no_router(density: Any) -> None:
    routed = [1, 2, 3, 4]
    assert make_config(6, router="highway", density=density).densities == dict.fromkeys(routed, 1.0)
    assert make_config(6, router="never", density=density).densities == dict.fromkeys(routed, 0.0)
    if not isinstance(density, list):
        assert make_config(6, router="always", density=density).densities == {}


def test_densities_come_from_files_and_the_command_line_and_survive_a_dump(tmp_path: Any) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: {num_layers: 4}\nrouting: {density: {first: 0.25, last: 0.5}}")
    config = load_config(path, ["routing.eval_density=[0.5, 1]"])
    assert config.routing.density == DensityRamp(first=0.25, last=0.5)
    assert config.densities == {1: 0.25, 2: 0.5}
    assert config.eval_densities == {1: 0.5, 2: 1}
    path.write_text(dump_config(config))
    assert load_config(path) == config


@pytest.mark.parametrize("field", ["density", "eval_density"])
@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("0", "0 is no density"),
        ("-0.5", "-0.5 is no density"),
        ("1.5", "1.5 is no density"),
        (".nan", "nan is no density"),
        ("true", "True is no density"),
        ("half", "'half' is no density"),
        ("[]", "[] is no density"),
        ("[0.5, 0]", "[0.5, 0] is no density"),
        ("{first: 0.5}", "{'first': 0.5} is no density"),
        ("{first: 0.5, last: 2}", "{'first': 0.5, 'last': 2} is no density"),
        ("{first: 0.5, last: 1, middle: 1}", "is no density"),
    ],
)
def test_what_is_no_density_is_refused(field: str, value: str, shown: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(None, [f"routing.{field}={value}"])
    told = str(refused.value)
    for part in (f"routing.{field}: ", shown, "greater than 0 and less than or equal to 1", "{first: ...,"):
        assert part in told
    assert len(told.splitlines()) == 2, "one problem, told once"


@pytest.mark.parametrize("field", ["density", "eval_density"])
def test_a_list_names_each_routed_layer(field: str) -> None:
    shares = [0.5, 0.5, 0.5]
    with pytest.raises(ConfigError) as refused:
        make_config(6, **{field: shares})
    for part in (f"routing.{field} lists 3 shares", "4 layers are routed ([1, 2, 3, 4])", "one number"):
        assert part in str(refused.value)
    assert make_config(5, **{field: shares}).routed_layers == [1, 2, 3]
    assert make_config(7, every=2, **{field: shares}).routed_layers == [1, 3, 5]


@pytest.mark.parametrize(
    ("routing", "parts"),
    [
        *(
            (
                {"router": router, "density_control": control},
                [
                    f"density_control={control} has nothing to do for router={router}", "leave it out",
                    "gumbel, sigmoid, fixed_input",
                ],
            )
            for router in OTHERS
            for control in ("penalty", "coefficient", "bias")
        ),
        *(
            (
                {"router": router, "eval_density": 0.5},
                [f"eval_density has no meaning for router={router}", "leave it out"],
            )
            for router in ("highway", "always", "never")
        ),
        *(
            (
                {"router": router, "update_weight": weight},
                [f"update_weight={weight} needs a score, and router={router} has none", "leave it out"],
            )
            for router in ("random", "always", "never", "fixed_input")
            for weight in ("score", "twice_score")
        ),
        *(
            (
                {"router": "highway", "update_weight": weight},
                ["router=highway weights updates by its score", f"update_weight={weight} is another method"],
            )
            for weight in ("straight_through", "twice_score")
        ),
        (
            {"keys_values": "executed", "wrap": "mlp"},
            ["keys_values=executed skips attention, wrap=mlp does not", "wrap=layer or wrap=attention"],
        ),
        (
            {"keys_values": "executed", "group_size": 64},
            ["keys_values=executed packs whole sequences", "leave group_size out"],
        ),
        (
            {"keys_values": "executed", "gradient": "dense"},
            ["keys_values=executed packs whole sequences", "gradient=packed"],
        ),
        (
            {"keys_values": "executed", "router": "highway"},
            ["keys_values=executed packs whole sequences", "a router other than highway"],
        ),
        (
            {"dispatch": "balanced", "capacity_factor": 1.25},
            ["dispatch=balanced has nothing to balance", "capacity_factor=1.25", "leave dispatch out"],
        ),
        *(
            (
                {"dispatch": "balanced", "capacity_factor": None} | unpacked,
                ["dispatch=balanced moves tokens", "use wrap=layer or wrap=mlp, gradient=packed"],
            )
            for unpacked in ({"wrap": "attention"}, {"gradient": "dense"}, {"router": "always"})
        ),
        (
            {"router": "fixed_input", "density_control": "bias"},
            ["density_control=bias", "router=fixed_input", "use penalty or coefficient"],
        ),
        *(
            ({"router": router, "router_bias": True}, ["router_bias=true", f"router={router}", "leave it"])
            for router in ("random", "always", "never")
        ),
        (
            {"wrap": "mlp", "router_input": "raw"},
            ["router_input=raw is the layer's input", "wrap=mlp does not see", "use normed"],
        ),
    ],
)  # fmt: skip
def test_fields_that_do_not_fit_together_are_refused(routing: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        make_config(**routing)
    for part in ("routing: ", *parts):
        assert part in str(refused.value)


@pytest.mark.parametrize(
    "routing",
    [
        *({"router": router, "density_control": control}
          for router in CONTROLLED for control in ("penalty", "coefficient", "bias", "none")
          if (router, control) != ("fixed_input", "bias")),
        *({"router": router, "density_control": "none"} for router in OTHERS),
        *({"router": router, "eval_density": 0.5}
          for router in ("gumbel", "sigmoid", "quantile", "topk", "random", "fixed_input")),
        *({"router": router, "update_weight": "straight_through"}
          for router in ("random", "always", "never", "fixed_input")),
        *({"router": router, "update_weight": weight}
          for router in ("gumbel", "sigmoid", "quantile", "topk")
          for weight in ("straight_through", "score", "twice_score")),
        {"router": "highway", "update_weight": "score"},
        *({"keys_values": "executed", "wrap": wrap} for wrap in ("layer", "attention")),
        *({"router_input": "raw", "wrap": wrap} for wrap in ("layer", "attention")),
        {"wrap": "mlp", "group_size": 64, "gradient": "dense"},
    ],
)  # fmt: skip
def test_fields_that_fit_together_are_taken(routing: dict[str, Any]) -> None:
    config = make_config(**routing).routing
    assert {name: getattr(config, name) for name in routing} == routing


@pytest.mark.parametrize("router", [*CONTROLLED, *OTHERS])
def test_what_is_left_out_is_what_the_router_s_authors_use(router: str) -> None:
    routing = make_config(router=router).routing
    assert routing.control == ("penalty" if router in CONTROLLED else "none")
    weights = {"topk": "score", "highway": "score", "quantile": "twice_score"}
    assert routing.weight_of_updates == weights.get(router, "straight_through")
    assert routing.scores_tokens == (router in ("gumbel", "sigmoid", "quantile", "topk", "highway"))
    assert routing.draws_in_evaluation == (router in ("random", "fixed_input"))
    assert routing.computes_all == (router == "highway")
    assert make_config(router=router, gradient="dense").routing.computes_all


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (
            ["routing.density_warmup_steps=1001"],
            ["routing.density_warmup_steps=1001", "training.steps=1000", "lower it"],
        ),
        (
            ["routing.eval_capacity_factor=1.5"],
            ["routing.eval_capacity_factor=1.5", "routing.group_size", "leave eval_capacity_factor out"],
        ),
        (
            ["training.compile=true", "routing.capacity_factor=null"],
            ["training.compile=true", "routing.capacity_factor=null", "training.compile=false"],
        ),
        (
            ["routing.dense_first=6", "routing.dense_last=6"],
            ["routing.dense_first=6", "routing.dense_last=6", "model.num_layers=12", "routing.router=always"],
        ),
        (["routing.every=0"], ["routing.every=0", "greater than or equal to 1"]),
        (["routing.router=mixture"], ["routing.router='mixture'", "'gumbel'", "'topk'"]),
        (["routing.running_rate=0"], ["routing.running_rate=0", "greater than 0"]),
        (["routing.router_learning_rate=0"], ["routing.router_learning_rate=0", "greater than 0"]),
        (["routing.densty=0.5"], ["routing.densty: no such field", "did you mean routing.density?"]),
    ],
)
def test_what_spans_sections_is_refused_by_name(overrides: list[str], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(None, overrides)
    for part in parts:
        assert part in str(refused.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["routing.density_warmup_steps=1000"],
        ["routing.eval_capacity_factor=1.5", "routing.group_size=64"],
        ["training.compile=true", "routing.capacity_factor=null", "routing.router=always"],
        ["training.compile=true", "routing.capacity_factor=null", "routing.router=highway"],
        ["training.compile=true", "routing.capacity_factor=null", "routing.gradient=dense"],
        ["routing.dense_first=6", "routing.dense_last=5"],
        ["routing.dense_first=6", "routing.dense_last=6", "routing.router=always"],
    ],
)
def test_the_edges_of_those_rules_are_allowed(overrides: list[str]) -> None:
    assert isinstance(load_config(None, overrides), RunConfig)
