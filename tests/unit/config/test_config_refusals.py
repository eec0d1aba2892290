"""What cannot run is refused with the field, the value found, what is allowed and the mend."""

from typing import Any

import pytest

from skipmega.config import RunConfig, build_config, load_config, resolve_grid, resolve_vocabulary
from skipmega.errors import ConfigError


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("modle.num_layers=2", ["modle: no such field", "did you mean model?", "known here: run_dir, model"]),
        (
            "model.num_layer=2",
            ["model.num_layer: no such field", "did you mean model.num_layers?", "head_dim"],
        ),
        (
            "data.train=[{path: a, wieght: 2}]",
            [
                "data.train.0.wieght: no such field",
                "did you mean data.train.0.weight?",
                "known here: path, weight",
            ],
        ),
        ("model.num_layers=2.5", ["model.num_layers=2.5", "valid integer"]),
        ("model.num_layers=0", ["model.num_layers=0", "greater than or equal to 1"]),
        ("model.hidden_size='768'", ["model.hidden_size='768'", "valid integer"]),
        ("training.compile=1", ["training.compile=1", "valid boolean"]),
        (
            "training.attention=flash",
            ["training.attention=flash", "precision=fp32", "precision=bf16, or leave"],
        ),
        ("optimizer.learning_rate=fast", ["optimizer.learning_rate='fast'", "valid number"]),
        ("optimizer.beta2=1.0", ["optimizer.beta2=1.0", "less than 1"]),
        ("model.activation=relu", ["model.activation='relu'", "'gelu' or 'swiglu'"]),
        ("parallel.zero_stage=4", ["parallel.zero_stage=4", "0, 1, 2 or 3"]),
        ("model=3", ["model=3", "valid dictionary"]),
        ("data.split=[1]", ["data.split=[1]", "at least 2 items"]),
        ("data.split=[1, 2, 3]", ["data.split=[1, 2, 3]", "at most 2 items"]),
        ("data.split=[0, 0]", ["data.split=[0.0, 0.0]", "two weights >= 0 with a positive sum"]),
        ("data.split=[-1, 2]", ["data.split=[-1.0, 2.0]", "two weights >= 0 with a positive sum"]),
        (
            "model.num_attention_heads=5",
            ["model: hidden_size=768", "not divisible by num_attention_heads=5", "give head_dim"],
        ),
        (
            "model.num_key_value_heads=5",
            ["num_attention_heads=12", "num_key_value_heads=5", "choose a divisor"],
        ),
        ("model.num_key_value_heads=24", ["num_attention_heads=12", "num_key_value_heads=24"]),
        ("model.head_dim=63", ["head_dim=63 is odd", "even head_dim"]),
        (
            "routing.dense_first=11",
            [
                "routing.dense_first=11",
                "routing.dense_last=1",
                "model.num_layers=12",
                "routing.router=always",
            ],
        ),
        (
            "routing.group_size=768",
            ["routing.group_size=768", "data.sequence_length=1024", "choose a divisor"],
        ),
        ("routing.group_size=2048", ["routing.group_size=2048", "data.sequence_length=1024"]),
        ("training.stop_after=1001", ["training.stop_after=1001", "training.steps=1000", "lower it"]),
        (
            "parallel.sequence_parallel=true",
            [
                "parallel: sequence_parallel=true",
                "tensor_parallel=1",
                "raise tensor_parallel, or leave sequence_parallel out",
            ],
        ),
        (
            "parallel.chunks_per_stage=2",
            [
                "parallel: chunks_per_stage=2",
                "pipeline_parallel=1",
                "raise pipeline_parallel, or leave chunks_per_stage out",
            ],
        ),
        ("parallel.chunks_per_stage=0", ["parallel.chunks_per_stage=0", "greater than or equal to 1"]),
        ("parallel.context_parallel=0", ["parallel.context_parallel=0", "greater than or equal to 1"]),
        ("parallel.sequence_parallel=1", ["parallel.sequence_parallel=1", "valid boolean"]),
    ],
)
def test_a_refusal_names_field_value_and_what_is_allowed(override: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(None, [override])
    for part in parts:
        assert part in str(refused.value)


def test_every_problem_is_reported_at_once() -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(None, ["model.num_layers=0", "training.step=3", "optimizer.name=sgd"])
    heading, *problems = str(refused.value).splitlines()
    assert "not a valid configuration" in heading
    assert [problem.split("=")[0].split(":")[0].strip() for problem in problems] == [
        "model.num_layers",
        "optimizer.name",
        "training.step",
    ]


def test_a_name_like_none_is_not_guessed() -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(None, ["model.zzzzzz=1"])
    assert "did you mean" not in str(refused.value)


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("routing", "dense_first", 10),
        ("routing", "group_size", 1024),
        ("training", "stop_after", 1000),
        ("model", "num_key_value_heads", 12),
    ],
)
def test_the_edge_of_each_rule_is_allowed(section: str, field: str, value: int) -> None:
    config = load_config(None, [f"{section}.{field}={value}"])
    assert getattr(getattr(config, section), field) == value


def test_a_dense_model_needs_no_layer_to_route() -> None:
    config = load_config(None, ["routing.router=always", "routing.dense_first=20"])
    assert not any(config.layer_is_routed(layer) for layer in range(12))


def test_the_layers_between_the_dense_ends_are_routed() -> None:
    config = load_config(None, ["model.num_layers=6", "routing.dense_first=2", "routing.dense_last=1"])
    assert [config.layer_is_routed(layer) for layer in range(6)] == [False, False, True, True, True, False]


@pytest.mark.parametrize(("hidden", "expected"), [(768, 2048), (64, 192), (96, 256), (24, 64)])
def test_swiglu_s_width_is_eight_thirds_rounded_up_to_64(hidden: int, expected: int) -> None:
    sizes = {"hidden_size": hidden, "num_attention_heads": 2, "activation": "swiglu"}
    config = build_config({"model": sizes}, source="test")
    assert config.model.ffn_size == expected
    assert build_config({"model": sizes | {"activation": "gelu"}}, source="test").model.ffn_size == 8 * hidden


def runnable(**sections: dict[str, Any]) -> RunConfig:
    """A configuration that fits on any grid of 2 x 3 and its multiples, changed by ``sections``."""
    values: dict[str, dict[str, Any]] = {
        "model": {
            "num_layers": 6,
            "hidden_size": 24,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "ffn_hidden_size": 48,
            "vocab_size": 128,
        },
        "parallel": {"tensor_parallel": 2, "pipeline_parallel": 3},
        "training": {"micro_batch_size": 2, "global_batch_size": 8, "eval_sequences": 4},
    }
    for section, fields in sections.items():
        values[section] = values.get(section, {}) | fields
    return build_config(values, source="test")


def test_the_grid_is_completed_with_the_number_of_replicas() -> None:
    config = resolve_grid(runnable(), 12)
    assert config.parallel.data_parallel == 2
    assert config.micro_batches == 2
    assert resolve_grid(config, 12) == config
    assert resolve_grid(runnable(), 6).micro_batches == 4


@pytest.mark.parametrize(
    ("sections", "world_size", "parts"),
    [
        ({}, 8, ["8 processes", "tensor_parallel=2", "pipeline_parallel=3", "a multiple of 6"]),
        ({}, 3, ["3 processes", "a multiple of 6"]),
        (
            {"parallel": {"data_parallel": 2}},
            6,
            ["parallel.data_parallel=2", "is 12 processes", "6 were started"],
        ),
        (
            {"model": {"num_attention_heads": 3, "num_key_value_heads": 1}},
            6,
            ["model.num_attention_heads=3", "parallel.tensor_parallel=2"],
        ),
        (
            {"model": {"num_key_value_heads": 1}},
            6,
            ["model.num_key_value_heads=1", "parallel.tensor_parallel=2"],
        ),
        ({"model": {"ffn_hidden_size": 49}}, 6, ["model.ffn_hidden_size=49", "parallel.tensor_parallel=2"]),
        ({"model": {"vocab_size": 127}}, 6, ["model.vocab_size=127", "parallel.tensor_parallel=2"]),
        (
            {"training": {"global_batch_size": 6}},
            12,
            ["training.global_batch_size=6", "training.micro_batch_size=2 x 2", "a multiple of 4"],
        ),
        (
            {"training": {"eval_sequences": 6}},
            12,
            ["training.eval_sequences=6", "training.micro_batch_size=2 x 2", "a multiple of 4"],
        ),
        ({"parallel": {"zero_stage": 0}}, 6, ["parallel.zero_stage=0", "use 1"]),
        (
            {"parallel": {"zero_stage": 3, "pipeline_parallel": 3}},
            6,
            ["parallel.zero_stage=3", "parallel.pipeline_parallel=3", "forever", "use zero_stage 1 or 2"],
        ),
        (
            {"parallel": {"zero_stage": 3, "pipeline_parallel": 1}, "optimizer": {"name": "adafactor"}},
            6,
            ["parallel.zero_stage=3", "optimizer.name=adafactor", "or optimizer.name=adamw"],
        ),
        (
            {"parallel": {"zero_stage": 3, "pipeline_parallel": 1}, "training": {"compile": True}},
            6,
            ["parallel.zero_stage=3", "training.compile=true", "or training.compile=false"],
        ),
        (
            {"parallel": {"zero_stage": 3, "pipeline_parallel": 1}, "evaluation": {"interval": 5}},
            6,
            ["evaluation.interval=5", "parallel.zero_stage=3", "tools/evaluate.py"],
        ),
        (
            {"evaluation": {"interval": 5}, "routing": {"dispatch": "balanced", "capacity_factor": None}},
            6,
            ["evaluation.interval=5", "routing.dispatch=balanced", "interval=0"],
        ),
    ],
)
def test_what_does_not_fit_the_grid_is_refused(
    sections: dict[str, dict[str, Any]], world_size: int, parts: list[str]
) -> None:
    config = runnable(**sections)
    with pytest.raises(ConfigError) as refused:
        resolve_grid(config, world_size)
    for part in parts:
        assert part in str(refused.value)


CONTEXT = {"tensor_parallel": 1, "context_parallel": 2, "pipeline_parallel": 1}
SEQUENCE = {"tensor_parallel": 2, "sequence_parallel": True, "pipeline_parallel": 1}
DROPLESS = {"capacity_factor": None}


def on_cut_sequences(
    parallel: dict[str, Any], routing: dict[str, Any] | None = None, length: int = 64
) -> RunConfig:
    """The configuration on two processes (or four, or six) that share each sequence."""
    config = runnable(
        model={"num_attention_heads": 6, "num_key_value_heads": 6, "vocab_size": 384},
        parallel=parallel,
        routing=routing or {},
        data={"sequence_length": length},
    )
    return resolve_grid(config, config.parallel.processes_per_replica)


@pytest.mark.parametrize(
    ("sections", "world_size", "parts"),
    [
        (
            {"parallel": {"context_parallel": 2}},
            18,
            ["18 processes", "parallel.tensor_parallel=2 x parallel.context_parallel=2 x "
             "parallel.pipeline_parallel=3", "a multiple of 12"],
        ),
        (
            {"parallel": CONTEXT},
            3,
            ["3 processes", "parallel.tensor_parallel=1 x parallel.context_parallel=2:", "a multiple of 2"],
        ),
        (
            {"parallel": {**CONTEXT, "data_parallel": 4}},
            4,
            ["parallel.data_parallel=4 x", "parallel.context_parallel=2 is 8 processes", "4 were started",
             "leave parallel.data_parallel out"],
        ),
        (
            {"parallel": CONTEXT, "training": {"global_batch_size": 6}},
            4,
            ["training.global_batch_size=6", "training.micro_batch_size=2 x 2 data", "a multiple of 4"],
        ),
    ],
)  # fmt: skip
def test_context_ranks_are_no_replicas(
    sections: dict[str, dict[str, Any]], world_size: int, parts: list[str]
) -> None:
    config = runnable(routing=DROPLESS, **sections)
    with pytest.raises(ConfigError) as refused:
        resolve_grid(config, world_size)
    for part in parts:
        assert part in str(refused.value)


def test_context_ranks_share_their_batch() -> None:
    config = resolve_grid(runnable(routing=DROPLESS, parallel=CONTEXT), 4)
    assert (config.parallel.data_parallel, config.micro_batches) == (2, 2)


@pytest.mark.parametrize(
    ("parallel", "parts", "cutters"),
    [
        (CONTEXT, 4, ["parallel.context_parallel=2"]),
        ({**CONTEXT, "tensor_parallel": 2}, 4, ["parallel.context_parallel=2"]),
        ({**CONTEXT, "context_parallel": 3}, 6, ["parallel.context_parallel=3"]),
        (SEQUENCE, 2, ["parallel.sequence_parallel=true with tensor_parallel=2"]),
        (
            {**SEQUENCE, "context_parallel": 2},
            4,
            ["parallel.context_parallel=2", "parallel.sequence_parallel=true with tensor_parallel=2"],
        ),
        (
            {**SEQUENCE, "context_parallel": 2, "tensor_parallel": 3},
            12,
            ["parallel.context_parallel=2", "parallel.sequence_parallel=true with tensor_parallel=3"],
        ),
    ],
)
def test_a_sequence_is_cut_into_equal_parts(parallel: dict[str, Any], parts: int, cutters: list[str]) -> None:
    for length in (parts * 5, parts * 6):
        on_cut_sequences(parallel, DROPLESS, length)
    for length in (parts * 5 + 1, parts * 5 + parts // 2):
        with pytest.raises(ConfigError) as refused:
            on_cut_sequences(parallel, DROPLESS, length)
        for part in (
            f"data.sequence_length={length}",
            f"cut into {parts} parts",
            f"multiple of {parts}",
            *cutters,
        ):
            assert part in str(refused.value)


@pytest.mark.parametrize(
    ("parallel", "part"),
    [
        (CONTEXT, 16),
        (SEQUENCE, 32),
        ({**SEQUENCE, "context_parallel": 2}, 16),
        ({**SEQUENCE, "context_parallel": 2, "tensor_parallel": 3}, 16),
    ],
)
@pytest.mark.parametrize(
    "routing", [{}, {"router": "topk"}, {"router": "topk", "capacity_factor": None}, {"gradient": "dense"}]
)
def test_no_cut_goes_through_tokens_that_share_slots(
    parallel: dict[str, Any], part: int, routing: dict[str, Any]
) -> None:
    length = 192 if parallel["tensor_parallel"] == 3 else 64
    for group in (part, part // 2, 1):
        on_cut_sequences(parallel, {**routing, "group_size": group}, length)
    for group, named in ((None, "routing.group_size is left out"), (2 * part, f"group_size={2 * part},")):
        with pytest.raises(ConfigError) as refused:
            on_cut_sequences(parallel, {**routing, "group_size": group}, length)
        told = str(refused.value)
        assert named in told
        assert f"parts of {part} by" in told
        assert f"set routing.group_size to a divisor of {part}" in told
        may_be_dropless = "router" not in routing
        assert ("with routing.capacity_factor=null" in told) == may_be_dropless, "top-k ranks within groups"


@pytest.mark.parametrize("parallel", [CONTEXT, SEQUENCE, {**SEQUENCE, "context_parallel": 2}])
@pytest.mark.parametrize(
    "routing",
    [
        DROPLESS,
        {**DROPLESS, "router": "gumbel"},
        {"router": "always"},
        {"router": "always", "keys_values": "executed"},
        {"router": "highway"},
        {"router": "never"},
        {**DROPLESS, "gradient": "dense"},
    ],
)
def test_tokens_that_share_no_slots_need_no_groups(parallel: dict[str, Any], routing: dict[str, Any]) -> None:
    assert on_cut_sequences(parallel, routing).parallel.data_parallel == 1


@pytest.mark.parametrize("parallel", [CONTEXT, SEQUENCE])
@pytest.mark.parametrize(
    "routing", [DROPLESS, {**DROPLESS, "eval_capacity_factor": 1.0}, {"router": "highway"}]
)
def test_no_cut_goes_through_a_group_that_is_given(parallel: dict[str, Any], routing: dict[str, Any]) -> None:
    """Evaluation may deal slots in it, and it is reported on."""
    with pytest.raises(ConfigError, match=r"routing\.group_size=64, which is cut"):
        on_cut_sequences(parallel, {**routing, "group_size": 64})


@pytest.mark.parametrize(
    ("parallel", "cutter"),
    [(CONTEXT, "parallel.context_parallel=2"), (SEQUENCE, "parallel.sequence_parallel=true")],
)
@pytest.mark.parametrize("routing", [{}, DROPLESS, {"router": "topk"}])
def test_executed_keys_need_whole_sequences(
    parallel: dict[str, Any], cutter: str, routing: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError) as refused:
        on_cut_sequences(parallel, {**routing, "keys_values": "executed"})
    for part in ("routing.keys_values=executed", cutter, "use keys_values=all, or another grid"):
        assert part in str(refused.value)
    tensor_alone = {"tensor_parallel": 2, "pipeline_parallel": 1}
    on_cut_sequences(tensor_alone, {**routing, "keys_values": "executed"})


@pytest.mark.parametrize("field", ["global_batch_size", "eval_sequences"])
def test_interleaved_micro_batches_come_by_the_number_of_stages(field: str) -> None:
    """Two sequences a micro-batch, two replicas, three stages: 12, 24, ..."""
    chunks, enough = {"chunks_per_stage": 2}, {"global_batch_size": 24, "eval_sequences": 12}
    assert resolve_grid(runnable(parallel=chunks, training=enough), 12).micro_batches == 6
    short = enough | {field: 16}
    with pytest.raises(ConfigError) as refused:
        resolve_grid(runnable(parallel=chunks, training=short), 12)
    for part in (
        f"training.{field}=16 makes 4 micro-batches",
        "parallel.chunks_per_stage=2",
        "by 3 (parallel.pipeline_parallel)",
        "use a multiple of 12, or chunks_per_stage=1",
    ):
        assert part in str(refused.value)
    resolve_grid(runnable(training=short), 12)


@pytest.mark.parametrize(
    ("given", "tokenizer_size", "expected"),
    [(None, 1000, 1024), (None, 1024, 1024), (None, 1025, 1152), (2000, 1000, 2048), (128, None, 128)],
)
def test_the_vocabulary_is_padded_to_its_multiple(
    given: int | None, tokenizer_size: int | None, expected: int
) -> None:
    config = build_config({"model": {"vocab_size": given}}, source="test")
    assert resolve_vocabulary(config, tokenizer_size).vocab_size == expected


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused_even_if_padding_would_do() -> None:
    config = build_config({"model": {"vocab_size": 1000}, "data": {"tokenizer": "t.model"}}, source="test")
    with pytest.raises(ConfigError, match=r"model\.vocab_size=1000 .*1001 ids \(t\.model\): raise it"):
        resolve_vocabulary(config, 1001)


def test_no_vocabulary_at_all_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.vocab_size is not set.*data\.tokenizer"):
        resolve_vocabulary(RunConfig(), None)
    with pytest.raises(ConfigError, match=r"model\.vocab_size is not set"):
        _ = RunConfig().vocab_size


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("data.split=[.nan, 1]", "data.split"),
        ("optimizer.learning_rate=.inf", "optimizer.learning_rate"),
        ("routing.eval_capacity_factor=1.5", "routing.group_size"),
        ("routing.capacity_factor=null", "training.compile"),
    ],
)
def test_numbers_that_are_none_and_shapes_that_are_not_fixed_are_refused(override: str, field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        load_config(None, ["training.compile=true", override])
