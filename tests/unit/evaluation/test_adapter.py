"""Likelihoods and generations against direct computation and against lm-eval's ``hf`` model."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from skipmega.errors import ConfigError, DataError

pytest.importorskip("lm_eval")

import itertools

from lm_eval.api.instance import Instance

from skipmega.evaluation.adapter import SkipmegaLM

GREEDY = {"until": ["\n"], "do_sample": False, "max_gen_toks": 12}


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=each, idx=0, metadata=("test", index, 1))
        for index, each in enumerate(arguments)
    ]


def direct_log_likelihood(model: Any, ids: list[int], first: int) -> float:
    """Sum of log p(ids[i] | ids[:i]) for i >= first, in double precision."""
    places = torch.arange(len(ids) - 1).unsqueeze(0)
    logits = model.logits(torch.tensor([ids[:-1]]), places)[0].double()
    log_probs = logits - logits.logsumexp(dim=-1, keepdim=True)
    return sum(float(log_probs[place - 1, ids[place]]) for place in range(first, len(ids)))


def test_log_likelihood_is_the_sum_over_the_continuation(make_bigram, byte_tokenizer):
    model = make_bigram()
    adapter = SkipmegaLM(model, byte_tokenizer, 2, show_progress=False)
    pairs = [("one two", " three"), ("", "four"), ("a ", "b"), ("a much longer context", " x")]
    expected = [
        direct_log_likelihood(model, list(b"one two three"), 7),
        direct_log_likelihood(model, [256, *b"four"], 1),
        direct_log_likelihood(model, list(b"a b"), 1),  # the space belongs to the continuation
        direct_log_likelihood(model, list(b"a much longer context x"), 21),
    ]
    scores = adapter.loglikelihood(requests("loglikelihood", pairs))
    assert [score for score, _ in scores] == pytest.approx(expected, rel=1e-5)


def test_greedy_flag_is_set_for_the_greedy_continuation_alone(make_bigram, byte_tokenizer):
    model = make_bigram()
    adapter = SkipmegaLM(model, byte_tokenizer, 4, show_progress=False)
    model.table[ord("a"), ord("b")] = 100.0
    model.table[ord("b"), ord("a")] = 100.0
    pairs = [("a", "b"), ("a", "c"), ("a", "bab"), ("x", "ab"), ("a", "bac")]
    scores = adapter.loglikelihood(requests("loglikelihood", pairs))
    assert [greedy for _, greedy in scores] == [True, False, True, False, False]


def test_choices_of_one_token_share_a_row(make_bigram, byte_tokenizer):
    model = make_bigram()
    adapter = SkipmegaLM(model, byte_tokenizer, 8, show_progress=False)
    adapter.loglikelihood(requests("loglikelihood", [("question?", "y"), ("question?", "n")]))
    assert model.batches == [(1, 9)]


def test_the_context_of_several_choices_is_encoded_once(make_bigram, byte_tokenizer, monkeypatch):
    encoded = []

    def encode(text):
        encoded.append(text)
        return list(text.encode())

    monkeypatch.setattr(byte_tokenizer, "encode", encode)
    adapter = SkipmegaLM(make_bigram(), byte_tokenizer, 4)
    choices = [("one", " a"), ("one", " b"), ("one", " c"), ("two", " a")]
    adapter.loglikelihood(requests("loglikelihood", choices))
    assert sorted(encoded) == ["one", "one a", "one b", "one c", "two", "two a"]
    adapter.tok_encode("two").append(0)
    assert adapter.tok_encode("two") == list(b"two"), "what is handed out is a copy"


def test_long_context_is_cut_from_the_left(make_bigram, byte_tokenizer, caplog):
    adapter = SkipmegaLM(make_bigram(8), byte_tokenizer, 1)
    long, cut = adapter.loglikelihood(
        requests("loglikelihood", [("0123456789abcdef", "xyz"), ("abcdef", "xyz")])
    )
    assert long == cut
    assert "1 of 2 requests lost their beginning" in caplog.text
    assert adapter.truncated == 1


def test_continuation_longer_than_the_model_is_refused(make_bigram, byte_tokenizer):
    adapter = SkipmegaLM(make_bigram(8), byte_tokenizer, 1, show_progress=False)
    with pytest.raises(DataError, match="continuation of 9 tokens"):
        adapter.loglikelihood(requests("loglikelihood", [("a", "123456789")]))


def test_rolling_predicts_every_token_once(make_bigram, byte_tokenizer):
    model = make_bigram(8)
    adapter = SkipmegaLM(model, byte_tokenizer, 3, show_progress=False)
    texts = ["", "short", "a text of more than one window", "12345678"]
    totals = adapter.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,) for text in texts]))
    # a bigram model does not see where windows begin, so each text is one chain from the document end
    table = model.table.double().log_softmax(dim=-1)
    for text, total in zip(texts, totals, strict=True):
        ids = [256, *text.encode()]
        chain = sum(float(table[a, b]) for a, b in itertools.pairwise(ids))
        assert total == pytest.approx(chain, rel=1e-5)


def test_generation_is_greedy_and_stops(make_bigram, byte_tokenizer):
    model = make_bigram()
    for here, there in ("ab", "bc", "ca"):
        model.table[ord(here), ord(there)] = 100.0
    adapter = SkipmegaLM(model, byte_tokenizer, 2, show_progress=False)
    model.table[ord("z"), 256] = 100.0
    model.table[ord("y"), 260] = 100.0  # padding of the vocabulary: no text
    model.table[260, 256] = 100.0
    arguments = [
        ("a", {"until": [], "max_gen_toks": 5}),
        ("xxxa", {"until": ["ca"], "max_gen_toks": 50}),
        ("z", {"until": ["\n"], "max_gen_toks": 20}),
        ("y", {"max_gen_toks": 3}),
    ]
    assert adapter.generate_until(requests("generate_until", arguments)) == ["bcabc", "b", "", ""]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"do_sample": True, "temperature": 0.7}, "sampling"),
        ({"temperature": 0.7}, "sampling"),
        ({"num_beams": 4}, "num_beams"),
        ({"max_gen_toks": 64}, "max_gen_toks=64"),
    ],
)
def test_what_greedy_decoding_cannot_do_is_refused(make_bigram, byte_tokenizer, options, message):
    adapter = SkipmegaLM(make_bigram(), byte_tokenizer, 2, show_progress=False)
    with pytest.raises(ConfigError, match=message):
        adapter.generate_until(requests("generate_until", [("a", {"max_gen_toks": 4} | options)]))


def test_batch_size_changes_nothing(native, documents):
    model, tokenizer = native
    pairs = [(text[: 40 + 7 * index], text[200:230]) for index, text in enumerate(documents[:12])]
    prompts = [(context, GREEDY) for context, _ in pairs]
    scores, texts = [], []
    for batch_size in (1, 5, 32):
        adapter = SkipmegaLM(model, tokenizer, batch_size, show_progress=False)
        scores.append(adapter.loglikelihood(requests("loglikelihood", pairs)))
        texts.append(adapter.generate_until(requests("generate_until", prompts)))
    for other in scores[1:]:
        assert [score for score, _ in other] == pytest.approx([score for score, _ in scores[0]], rel=1e-5)
    assert texts[0] == texts[1] == texts[2]


@pytest.fixture(scope="module")
def hf_adapter(export: Path, native: Any) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(
        pretrained=str(export),
        prefix_token_id=native[1].eod_id,
        dtype="float32",
        device="cpu",
        batch_size=4,
    )


def test_likelihoods_are_those_of_the_hf_model(native, hf_adapter, documents):
    adapter = SkipmegaLM(*native, 4, show_progress=False)
    pairs = [(text[: 20 + 31 * index], text[300:350]) for index, text in enumerate(documents[:14])]
    pairs += [("", documents[0][:50]), ("ends in spaces  ", "word"), ("same", " a"), ("same", " b")]
    assert len(native[1].encode(pairs[13][0])) > native[0].max_length  # truncation is exercised
    ours = adapter.loglikelihood(requests("loglikelihood", pairs))
    theirs = hf_adapter.loglikelihood(requests("loglikelihood", pairs))
    assert [score for score, _ in ours] == pytest.approx([score for score, _ in theirs], rel=1e-5)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


def test_rolling_likelihoods_are_those_of_the_hf_model(native, hf_adapter, documents):
    adapter = SkipmegaLM(*native, 4, show_progress=False)
    texts = [(text,) for text in documents[:6]]
    ours = adapter.loglikelihood_rolling(requests("loglikelihood_rolling", texts))
    theirs = hf_adapter.loglikelihood_rolling(requests("loglikelihood_rolling", texts))
    assert ours == pytest.approx(theirs, rel=1e-6)
    assert all(math.isfinite(total) for total in ours)


def test_generations_are_those_of_the_hf_model(native, hf_adapter, documents):
    adapter = SkipmegaLM(*native, 4, show_progress=False)
    stops = [["\n"], ["e", "qu"], [" "]]
    prompts = [
        (text[: 10 + 37 * index], GREEDY | {"until": stops[index % 3]})
        for index, text in enumerate(documents[:15])
    ]
    ours = adapter.generate_until(requests("generate_until", prompts))
    theirs = hf_adapter.generate_until(requests("generate_until", prompts))
    assert ours == theirs
    assert len(set(ours)) > 5
