"""A :class:`LanguageModel` as lm-eval sees it.

The scores are those of lm-eval's ``hf`` model on the same weights: contexts and continuations are split
into tokens by the same rule, an empty context and the start of a rolling text are the end-of-document
token, and what is too long is cut from the left.

This module needs lm-eval; :func:`skipmega.evaluation.evaluate_tasks` imports it once lm-eval is known to
be there.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeVar

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from skipmega.errors import ConfigError, DataError
from skipmega.evaluation.effort import Effort, EffortMeter, summarize
from skipmega.evaluation.interface import LanguageModel, TextTokenizer
from skipmega.evaluation.reading import Prefix, TextReader
from skipmega.evaluation.sharing import Cluster, Room, Tokens, cluster_texts
from skipmega.training.energy import energy_source, of_all_devices

T = TypeVar("T")

_LOGGER = logging.getLogger(__name__)

DEFAULT_GENERATED_TOKENS = 256
# What changes nothing when decoding is greedy; anything else in a task's generation_kwargs is refused.
_GREEDY_KEYS = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k"}


class SkipmegaLM(TemplateLM):
    """Likelihoods and greedy generation for lm-eval.

    Args:
        model: the model; on every process of its grid this class makes the same calls in the same order.
        tokenizer: the model's own.
        batch_size: texts of the model's length that are read at once, and short ones more at once; 1 is one
            at a time, of any length.
        show_progress: whether this process draws progress bars.

    ``truncated`` counts the requests so far that lost their beginning.
    """

    def __init__(
        self, model: LanguageModel, tokenizer: TextTokenizer, batch_size: int, show_progress: bool = True
    ) -> None:
        super().__init__()
        self._language_model = model
        self._text_tokenizer = tokenizer
        # lm-eval encodes context and choice, then the context, for one choice after the other
        self._encode = lru_cache(maxsize=2)(tokenizer.encode)
        self._batch_size = batch_size
        self._show_progress = show_progress
        self.truncated = 0
        self._joules = energy_source(model.device)
        self._meters: dict[str, EffortMeter] = {}

    def efforts(self) -> list[Effort]:
        """What the requests so far took, by kind; all processes call it together."""
        model, efforts = self._language_model, []
        for kind, meter in self._meters.items():
            joules = of_all_devices(meter.joules, model.device)
            effort = summarize(kind, model.exchange(meter.batches), joules)
            if effort is not None:
                efforts.append(effort)
        return efforts

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        return self._text_tokenizer.eod_id

    @property
    def prefix_token_id(self) -> int:
        """The id that a text without a context is conditioned on."""
        return self._text_tokenizer.begin_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The ids of ``string``."""
        return list(self._encode(string))

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """For each (context, continuation): the continuation's log-likelihood in nats, and whether
        greedy decoding would produce it."""
        # lm-eval's own bar, for splitting the texts into tokens, knows no ranks
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood in nats of each whole text, in windows of the model's length that predict
        every token once."""
        windows: list[tuple[list[int], list[int]]] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._language_model.max_length,
                context_len=1,
            )
            for window in rolling:
                windows.append(make_disjoint_window(window))
                owners.append(index)
        totals = [0.0] * len(requests)
        for owner, (log_likelihood, _) in zip(owners, self._score(windows, "rolling"), strict=True):
            totals[owner] += log_likelihood
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue each prompt greedily until a stop string, the end of the text or ``max_gen_toks``.

        Raises:
            ConfigError: a task wants sampling or beams, or more tokens than the model is long.
        """
        generations = [self._start_generation(*request.args) for request in requests]
        self._warn_of_cuts(sum(generation.was_cut for generation in generations), len(generations))
        prompts: dict[Tokens, list[int]] = {}
        for index, generation in enumerate(generations):
            prompts.setdefault(generation.prompt, []).append(index)

        def finish(batch: Sequence[Tokens], reader: TextReader) -> dict[int, list[int]]:
            running = [generations[index] for prompt in batch for index in prompts[prompt]]
            owners = [place for place, prompt in enumerate(batch) for _ in prompts[prompt]]
            self._generate(running, reader, owners)
            return {index: generations[index].generated for prompt in batch for index in prompts[prompt]}

        longest = max((generation.budget for generation in generations), default=0)
        found = self._share_out(list(prompts), finish, "generate", growth=longest)
        return [self._text(found[index], each.until) for index, each in enumerate(generations)]

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        return self._score([(context, continuation) for _, context, continuation in requests], "score")

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]], label: str) -> list[tuple[float, bool]]:
        """Log-likelihood (nats) and greediness of each (context, continuation) in ids, in their order.

        Pairs with one context, as the choices of a question are, read it once.
        """
        asked: dict[Tokens, list[int]] = {}
        for index, (context, continuation) in enumerate(pairs):
            asked.setdefault(self._context_of(context, continuation), []).append(index)
        longest = self._language_model.max_length + 1
        self._warn_of_cuts(sum(len(context) + len(rest) > longest for context, rest in pairs), len(pairs))

        def score(batch: Sequence[Tokens], reader: TextReader) -> dict[int, tuple[float, bool]]:
            indices = [index for context in batch for index in asked[context]]
            owners = [place for place, context in enumerate(batch) for _ in asked[context]]
            continuations = [pairs[index][1] for index in indices]
            return dict(zip(indices, reader.score(owners, continuations), strict=True))

        found = self._share_out(list(asked), score, label)
        return [found[index] for index in range(len(pairs))]

    def _share_out(
        self,
        texts: Sequence[Tokens],
        work: Callable[[Sequence[Tokens], "TextReader"], dict[int, T]],
        label: str,
        growth: int = 0,
    ) -> dict[int, T]:
        """Do ``work`` on all texts, which grow by ``growth`` tokens, in batches of about one length, each on
        one of the model's replicas; what it found by number of request, on every process."""
        model, found, number = self._language_model, {}, 0
        meter = self._meters.setdefault(label, EffortMeter(label, self._joules))
        with self._progress(len(texts), label) as progress:
            for cluster in cluster_texts(texts) if model.reads_on else [Cluster((), list(texts))]:
                prefix = Prefix(model, cluster.prefix)
                for batch in self._batches(cluster, growth):
                    if number % model.replicas == model.replica:
                        meter.begin()
                        reader = TextReader(model, prefix, batch, self._batch_size, self.eot_token_id)
                        found.update(work(batch, reader))
                        meter.end(len(batch), model.take_work())
                    number += 1
                    progress.update(len(batch))
        if model.replicas == 1:
            return found
        return {index: each for part in model.exchange(found) for index, each in part.items()}

    def _batches(self, cluster: Cluster, growth: int) -> list[list[Tokens]]:
        """Short texts go more at a time, as long as every replica has some."""
        size, model, known = self._batch_size, self._language_model, len(cluster.prefix)
        tokens = size * model.max_length if size > 1 else 0
        room = Room(size, tokens, most=-(-len(cluster.texts) // model.replicas))
        return room.batches(cluster.texts, lambda text: len(text) - known, lambda text: len(text) + growth)

    def _context_of(self, context: list[int], continuation: list[int]) -> Tokens:
        """What the model reads before ``continuation``: the context, cut from the left so that both fit."""
        length = self._language_model.max_length
        if not context or not continuation:
            raise DataError(
                f"a request has {len(context)} context and {len(continuation)} continuation tokens: both "
                "need one or more; look for an empty text or choice in the task's data"
            )
        if len(continuation) > length:
            raise DataError(
                f"a continuation of {len(continuation)} tokens cannot be scored by a model of {length}: "
                "shorten the choices, or make the task loglikelihood_rolling"
            )
        return tuple(context[-(length + 1 - len(continuation)) :])

    def _start_generation(self, prompt: str, options: dict[str, Any]) -> "_Generation":
        settings = dict(normalize_gen_kwargs(options, DEFAULT_GENERATED_TOKENS))
        if settings.get("do_sample"):
            raise ConfigError(
                f"generation_kwargs={options} ask for sampling, but decoding is greedy: set "
                "do_sample: false in the task, or run lm_eval on an export"
            )
        if unknown := sorted(set(settings) - _GREEDY_KEYS):
            raise ConfigError(
                f"generation_kwargs has {', '.join(unknown)}, which greedy decoding does not know: remove "
                f"it from the task (known: {', '.join(sorted(_GREEDY_KEYS))}), or run lm_eval on an export"
            )
        budget, length = settings["max_gen_toks"], self._language_model.max_length
        if not 0 < budget < length:
            raise ConfigError(
                f"max_gen_toks={budget} does not leave room for a prompt in a model of {length} tokens: "
                "lower max_gen_toks in the task's generation_kwargs"
            )
        prompt_ids = self.tok_encode(prompt) or [self.prefix_token_id]
        return _Generation(
            prompt=tuple(prompt_ids[budget - length :]),
            until=handle_stop_sequences(settings["until"], eos=None),
            budget=budget,
            was_cut=len(prompt_ids) > length - budget,
        )

    def _generate(self, generations: list["_Generation"], reader: TextReader, owners: list[int]) -> None:
        """Go on with the texts ``owners`` of ``reader``, until each is at its end."""
        tokens = reader.last_logits[owners].argmax(dim=-1).tolist()
        reader.keep(owners)
        while generations:
            for generation, token in zip(generations, tokens, strict=True):
                self._append(generation, token)
            going = [place for place, generation in enumerate(generations) if not generation.finished]
            if not going:
                return
            generations = [generations[place] for place in going]
            reader.keep(going)
            tokens = reader.append([tokens[place] for place in going]).argmax(dim=-1).tolist()

    def _append(self, generation: "_Generation", token: int) -> None:
        if token == self.eot_token_id:
            generation.finished = True
            return
        generation.generated.append(token)
        if len(generation.generated) == generation.budget:
            generation.finished = True
            return
        text = self._decode(generation.generated)
        generation.finished = any(stop in text for stop in generation.until if stop)

    def _text(self, generated: list[int], until: list[str]) -> str:
        return postprocess_generated_text(self._decode(generated), until, think_end_token=None)

    def _decode(self, ids: list[int]) -> str:
        # ids of the vocabulary's padding have no text, here as in a Hugging Face tokenizer
        size = self._text_tokenizer.size
        return self._text_tokenizer.decode([token for token in ids if token < size])

    def _warn_of_cuts(self, cut: int, total: int) -> None:
        self.truncated += cut
        if cut and self._show_progress:
            _LOGGER.warning(
                "%d of %d requests lost their beginning: they are longer than the model's %d tokens",
                cut,
                total,
                self._language_model.max_length,
            )

    def _progress(self, total: int, label: str) -> "tqdm[Any]":
        return tqdm(total=total, desc=label, unit=" requests", disable=not self._show_progress)


@dataclass
class _Generation:
    """One text being generated; ``was_cut`` says that the prompt lost its beginning."""

    prompt: Tokens
    until: list[str]
    budget: int
    was_cut: bool
    generated: list[int] = field(default_factory=list)
    finished: bool = False
