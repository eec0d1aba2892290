"""Seconds, joules and depths of batches, with a clock and a meter that tell what they are told to."""

import pytest
import torch

from skipmega.evaluation.effort import Batch, EffortMeter, summarize
from skipmega.inference.work import Work


class Dial:
    """Something that is read, and grows when it is told to."""

    def __init__(self) -> None:
        self.value = 100.0

    def __call__(self) -> float:
        return self.value


def test_a_batch_is_what_passed_between_its_ends() -> None:
    clock, joules = Dial(), Dial()
    meter = EffortMeter("score", joules, clock)
    for seconds, spent in ((2.0, 5.0), (1.0, 7.0)):
        meter.begin()
        clock.value += seconds
        joules.value += spent
        meter.end(4, Work(tokens=10, executed=[10, 5, 10]))
        clock.value += 50
        joules.value += 500
    assert meter.batches == [Batch(4, 10, 2.0, 2.5), Batch(4, 10, 1.0, 2.5)]
    assert meter.joules == 12
    effort = summarize("score", [meter.batches], meter.joules)
    assert effort is not None
    assert (effort.inputs, effort.tokens, effort.seconds, effort.joules_per_token) == (8, 20, 3.0, 0.6)
    assert effort.latency.p50 == 1500
    assert effort.depth == 2.5
    assert effort.depth_correlation is None, "the depth is the same everywhere"
    assert effort.by_depth == []


def test_time_that_follows_depth_is_seen() -> None:
    batches = [Batch(1, 10, 0.001 * depth, float(depth)) for depth in range(1, 101)]
    effort = summarize("generate", [batches[::2], batches[1::2]], None)
    assert effort is not None
    assert effort.joules_per_token is None
    assert effort.seconds == pytest.approx(sum(range(2, 101, 2)) / 1000), "of the slower replica"
    assert (effort.latency.p50, effort.latency.p90) == (pytest.approx(50.5), pytest.approx(90.1))
    assert effort.depth == pytest.approx(50.5)
    assert effort.depth_correlation == pytest.approx(1)
    assert effort.depth_correlation_per_token == pytest.approx(1)
    assert [part.depth for part in effort.by_depth] == pytest.approx([13, 38, 63, 88])
    assert [part.latency.p50 for part in effort.by_depth] == pytest.approx([13, 38, 63, 88])
    assert [part.milliseconds_per_token for part in effort.by_depth] == pytest.approx([1.3, 3.8, 6.3, 8.8])
    lines = "\n".join(effort.describe())
    assert "joules per token not available" in lines
    assert "p50 50.5, p90 90.1, p99 99.01" in lines
    assert "with ms +1.00" in lines


def test_inputs_of_a_large_batch_weigh_more() -> None:
    effort = summarize("score", [[Batch(99, 10, 1.0, None), Batch(1, 10, 3.0, None)]], 40.0)
    assert effort is not None
    assert effort.latency.p90 == 1000
    assert (effort.depth, effort.by_depth, effort.joules_per_token) == (None, [], 2.0)
    assert "layers per token" not in "\n".join(effort.describe())


def test_few_batches_tell_no_correlation() -> None:
    few = [Batch(1, 10, 0.001 * depth, float(depth)) for depth in range(1, 8)]
    effort = summarize("score", [few], None)
    assert effort is not None
    assert (effort.depth_correlation, effort.depth_correlation_per_token) == (None, None)
    assert "with ms unknown" in "\n".join(effort.describe())
    assert "score/depth_correlation" not in effort.numbers()


def test_no_requests_no_effort() -> None:
    assert summarize("rolling", [[], []], 3.0) is None


def test_padding_is_not_counted() -> None:
    work = Work()
    executed = torch.tensor([[[1, 0, 1], [1, 1, 1]], [[0, 0, 1], [1, 0, 1]]], dtype=torch.bool)
    work.add([2, 3], executed)
    work.add([1, 1], executed)
    found = work.on_host()
    assert (found.tokens, found.executed) == (7, [1 + 3 + 1 + 1, 0 + 2 + 0 + 1])


def test_joules_and_latencies_come_with_the_scores(
    make_history, byte_tokenizer, tmp_path, monkeypatch
) -> None:
    """Of an evaluation whose device has a meter, and in the table and the JSON file."""
    pytest.importorskip("lm_eval")
    import json

    import datasets

    from skipmega.evaluation import adapter, evaluate_tasks, write_benchmark_tasks

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    spent = Dial()
    monkeypatch.setattr(adapter, "energy_source", lambda device: spent)

    class Metered(type(make_history())):
        def take_work(self):
            spent.value += 8
            return Work(tokens=16, executed=[16, 8])

    asked = [{"query": f"Question: {n}?", "choices": ["a", "bc"], "gold": n % 2} for n in range(6)]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    tasks = write_benchmark_tasks(tmp_path, tmp_path / "tasks")
    result = evaluate_tasks(
        Metered(200), byte_tokenizer, tasks, num_fewshot=1, include_paths=[tmp_path / "tasks"], batch_size=2
    )
    (effort,) = result.efforts
    assert (effort.kind, effort.inputs, effort.joules_per_token) == ("score", 6, 0.5)
    assert effort.depth == 1.5
    assert "joules per token 0.5" in result.table()
    result.write_json(tmp_path / "result.json")
    (written,) = json.loads((tmp_path / "result.json").read_text())["efforts"]
    assert written["latency"].keys() == {"p50", "p90", "p99"}
    assert written["joules_per_token"] == 0.5
