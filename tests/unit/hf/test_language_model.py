"""Hugging Face models that read on give what they give of whole texts; exports tell who executed."""

from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from skipmega.errors import CheckpointError
from skipmega.hf.configuration_skipmega import SkipmegaConfig
from skipmega.hf.language_model import HuggingFaceModel, HuggingFaceTokenizer
from skipmega.hf.modeling_skipmega import SkipmegaForCausalLM

VOCABULARY = 48
SHAPE = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}


def make_skipmega() -> Any:
    config = SkipmegaConfig(
        **SHAPE, intermediate_size=48, num_key_value_heads=2, routed_layers=[1], initializer_range=0.4
    )
    return SkipmegaForCausalLM(config)


def make_llama() -> Any:
    """In float64: with weights this large float32 alone makes logits of pieces differ by 3e-5."""
    config = transformers.LlamaConfig(**SHAPE, intermediate_size=48, initializer_range=0.4)
    return transformers.LlamaForCausalLM(config).double()


def make_gpt2() -> Any:
    """In float64 too; whose positions are a table of 64."""
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.4
        )
    ).double()


@pytest.fixture(scope="module", params=[make_skipmega, make_llama, make_gpt2])
def model(request: pytest.FixtureRequest) -> HuggingFaceModel:
    torch.manual_seed(3)
    torch.set_num_threads(1)
    return HuggingFaceModel(request.param(), 64)


def padded(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=1)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(*[st.integers(1, 9)] * 3), min_size=1, max_size=4), st.integers(0, 99))
def test_texts_read_in_pieces_have_the_logits_of_whole_ones(
    model: HuggingFaceModel, pieces: list[tuple[int, int, int]], seed: int
) -> None:
    """Rows of unequal length, padded anew in each piece, and dealt anew before the last."""
    assert model.reads_on
    generator = torch.Generator().manual_seed(seed)
    whole = [torch.randint(0, VOCABULARY, (sum(row),), generator=generator) for row in pieces]
    rows = list(range(len(pieces)))
    cache, done = model.new_cache(len(pieces)), [0] * len(pieces)
    for number in range(3):
        if number == 2:
            rows = [*rows[::-1], rows[0]]
            cache = cache.take(rows)
        counts = [pieces[row][number] for row in rows]
        begins = [sum(pieces[row][:number]) for row in rows]
        tokens = padded(
            [whole[row][at : at + count] for row, at, count in zip(rows, begins, counts, strict=True)]
        )
        at = torch.arange(tokens.shape[1]).expand(len(rows), -1)
        found = model.read(cache, tokens, counts, at)
        for place, (row, begin, count) in enumerate(zip(rows, begins, counts, strict=True)):
            text = whole[row].unsqueeze(0)
            expected = model.logits(text, torch.arange(text.shape[1]).unsqueeze(0))[0, begin : begin + count]
            torch.testing.assert_close(found[place, :count], expected, rtol=0, atol=3e-5)
        done = [begin + count for begin, count in zip(begins, counts, strict=True)]
    assert cache.lengths.tolist() == done
    model.take_work()


def test_places_differ_from_row_to_row(model: HuggingFaceModel) -> None:
    tokens = torch.randint(0, VOCABULARY, (2, 7))
    every = model.logits(tokens, torch.arange(7).expand(2, -1))
    found = model.logits(tokens, torch.tensor([[5, 2], [6, 6]]))
    torch.testing.assert_close(found, torch.stack([every[0, [5, 2]], every[1, [6, 6]]]))


def test_an_export_tells_who_executed() -> None:
    torch.manual_seed(3)
    ours = make_skipmega()
    model = HuggingFaceModel(ours, 64)
    tokens = torch.randint(0, VOCABULARY, (2, 9))
    model.read(model.new_cache(2), tokens, [9, 4], torch.tensor([[8], [3]]))
    work = model.take_work()
    executed = ours(tokens, output_execution=True).executed
    assert work.tokens == 13
    assert work.executed == [int(each[0].sum() + each[1, :4].sum()) for each in executed]
    assert 0 < work.executed[1] < 13
    assert model.take_work().tokens == 0


def test_other_models_do_not() -> None:
    model = HuggingFaceModel(make_llama(), 64)
    model.logits(torch.zeros(2, 5, dtype=torch.int64), torch.tensor([[4], [2]]))
    assert model.take_work().executed == []


def test_caches_that_forget_are_not_read_on() -> None:
    config = transformers.MistralConfig(**SHAPE, intermediate_size=48, sliding_window=8)
    assert not HuggingFaceModel(transformers.MistralForCausalLM(config), 64).reads_on


def test_a_text_has_one_beginning() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {"<s>": 0, "</s>": 1, "a": 2, "b": 3}
    backend = Tokenizer(models.WordLevel(words, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = HuggingFaceTokenizer(
        transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    )
    assert (tokenizer.begin_id, tokenizer.eod_id) == (0, 1)
    assert tokenizer.encode("a b") == tokenizer.encode("<s> a b") == [0, 2, 3]
    assert tokenizer.decode([2, 3, 1]) == "a b"
    with pytest.raises(CheckpointError, match="no eos_token"):
        HuggingFaceTokenizer(transformers.PreTrainedTokenizerFast(tokenizer_object=backend))
