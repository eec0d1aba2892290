"""Texts that begin alike are read once up to there; what is scored and generated stays the same."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skipmega.evaluation.sharing import ENOUGH_TOKENS, SHORTEST_PREFIX, Room, cluster_texts

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance

from skipmega.evaluation.adapter import SkipmegaLM

EXAMPLE = "Question: which one of them is it? Answer: this one.\n"
CHOICES = (" a", " b", " something longer", " some other thing")
PAIRS = [(f"{EXAMPLE}Question: {'why ' * n}?", choice) for n in range(9) for choice in CHOICES]
PAIRS += [("alone", " x"), ("", "nothing before"), (EXAMPLE * 3, " cut"), (EXAMPLE * 3, " cut from the left")]


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=each, idx=0, metadata=("test", index, 1))
        for index, each in enumerate(arguments)
    ]


@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=40).map(tuple), unique=True))
def test_clusters_hold_every_text_once_and_all_begin_with_their_prefix(texts: list[tuple[int, ...]]) -> None:
    clusters = cluster_texts(texts)
    assert sorted(text for cluster in clusters for text in cluster.texts) == sorted(texts)
    for cluster in clusters:
        assert not cluster.prefix or len(cluster.prefix) >= SHORTEST_PREFIX
        assert all(len(text) > len(cluster.prefix) for text in cluster.texts)
        assert all(text[: len(cluster.prefix)] == cluster.prefix for text in cluster.texts)


def test_two_tasks_are_two_clusters() -> None:
    first, second = tuple(range(30)), tuple(range(50, 90))
    texts = [(*first, 7, n) for n in range(5)] + [(*second, n) for n in range(4)] + [(1,)]
    found = {cluster.prefix: len(cluster.texts) for cluster in cluster_texts(texts)}
    assert found == {(*first, 7): 5, second: 4, (): 1}


@given(
    st.lists(st.integers(1, 900), max_size=60), st.integers(1, 8), st.integers(0, 9000), st.integers(1, 40)
)
def test_batches_hold_every_text_once_and_no_more_than_there_is_room_for(
    lengths: list[int], texts: int, tokens: int, most: int
) -> None:
    room, prefix = Room(texts, tokens, most), 30
    batches = room.batches(lengths, length=lambda n: n, remembered=lambda n: prefix + n)
    assert [length for batch in batches for length in batch] == sorted(lengths, reverse=True)
    for number, batch in enumerate(batches):
        if len(batch) > texts:
            assert len(batch) <= most
            assert len(batch) * (prefix + batch[0]) <= tokens
            assert len(batch) * batch[0] <= ENOUGH_TOKENS
            assert 2 * batch[-1] >= batch[0], "less than half is padding"
        if number < len(batches) - 1:
            assert len(batch) >= texts


def test_short_texts_go_more_at_a_time_but_not_if_one_at_a_time_was_asked() -> None:
    def sizes(texts: int, tokens: int, most: int) -> list[int]:
        return [len(batch) for batch in Room(texts, tokens, most).batches([10] * 40, int, int)]

    assert sizes(4, 4 * 100, 40) == [40]
    assert sizes(4, 4 * 50, 40) == [20, 20]
    assert sizes(4, 4 * 100, 20) == [20, 20], "another replica has work too"
    assert sizes(1, 0, 40) == [1] * 40


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_scores_and_generations_do_not_depend_on_sharing(make_history, byte_tokenizer, batch_size) -> None:
    results = []
    for reads_on in (True, False):
        adapter = SkipmegaLM(make_history(150, reads_on), byte_tokenizer, batch_size, show_progress=False)
        prompts = [(context, {"until": ["e"], "max_gen_toks": 20}) for context, _ in PAIRS]
        scores = adapter.loglikelihood(requests("loglikelihood", PAIRS))
        texts = adapter.generate_until(requests("generate_until", prompts))
        rolling = adapter.loglikelihood_rolling(requests("loglikelihood_rolling", [(EXAMPLE * 4,), ("x",)]))
        results.append((scores, texts, rolling))
    (scores, texts, rolling), (expected_scores, expected_texts, expected_rolling) = results
    assert [score for score, _ in scores] == pytest.approx([score for score, _ in expected_scores], rel=1e-5)
    assert [greedy for _, greedy in scores] == [greedy for _, greedy in expected_scores]
    assert texts == expected_texts
    assert len(set(texts)) > 5
    assert rolling == pytest.approx(expected_rolling, rel=1e-5)


def test_the_example_and_each_question_are_read_once(make_history, byte_tokenizer) -> None:
    read = {}
    for reads_on in (True, False):
        model = make_history(150, reads_on)
        SkipmegaLM(model, byte_tokenizer, 4, show_progress=False).loglikelihood(
            requests("loglikelihood", PAIRS[:36])
        )
        read[reads_on] = sum(rows * columns for rows, columns in model.batches)
    assert read[True] < read[False] / 4


class Replica:
    """One of several copies, which answer for each other once all have worked."""

    def __init__(self, model: Any, replica: int, found: list[Any]) -> None:
        self._model, self.replica, self.replicas, self.found = model, replica, 3, found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def exchange(self, found: Any) -> list[Any]:
        self.found[self.replica] = found
        return [part for part in self.found if part is not None]


def test_replicas_share_the_work(make_history, byte_tokenizer) -> None:
    alone = make_history(150)
    expected = SkipmegaLM(alone, byte_tokenizer, 2, show_progress=False).loglikelihood(
        requests("loglikelihood", PAIRS)
    )
    found: list[Any] = [None] * 3
    models = [make_history(150) for _ in range(3)]
    for replica in (0, 1):  # whose own part is all they know yet
        adapter = SkipmegaLM(Replica(models[replica], replica, found), byte_tokenizer, 2, show_progress=False)
        with pytest.raises(KeyError):
            adapter.loglikelihood(requests("loglikelihood", PAIRS))
    adapter = SkipmegaLM(Replica(models[2], 2, found), byte_tokenizer, 2, show_progress=False)
    assert adapter.loglikelihood(requests("loglikelihood", PAIRS)) == expected
    assert all(0 < len(part) < len(PAIRS) for part in found)
    assert sum(len(part) for part in found) == len(PAIRS)
    assert all(len(model.batches) < len(alone.batches) / 2 for model in models)
