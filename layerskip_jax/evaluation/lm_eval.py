"""A model of EleutherAI's lm-evaluation-harness: any exit scored, generation drafted or not.

Importing this module registers the model `layerskip`; `layerskip lm-eval` does so and goes on as
`lm_eval`. Its arguments (`--model_args`):

    path        a run, a Hugging Face folder or a GGUF file
    exit        E, to score and decode with the first E layers only; all layers otherwise
    draft       to generate with: best, auto or E:G; the tokens stay the same
    exit_when   to generate with, each token until an exit is sure: entropy:0.2; kv with it
    dtype       to compute in, float32 or bfloat16
    max_length  context to use, in tokens; the model's otherwise
    seed        of what is drawn where a task samples, 0 otherwise; repeats draw independently

`--apply_chat_template` writes the questions as chats, by the model's own template.
"""

import abc
import collections
import functools
import hashlib
import logging
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tokenizers import Tokenizer
from tqdm import tqdm

from layerskip_jax.data.text import begin_tokens, encode_prompt
from layerskip_jax.decoding.cache import empty_cache, read_head, run_layers
from layerskip_jax.decoding.weights import DecoderWeights
from layerskip_jax.generation.generator import bucket
from layerskip_jax.generation.options import DEFAULT_KV
from layerskip_jax.interop.chat import ChatTemplate
from layerskip_jax.language_model import Draft, load
from layerskip_jax.model.config import ModelConfig
from layerskip_jax.schema import ConfigError, UserError, is_whole, require

# Options of others that say nothing at these values, which tasks write for completeness.
WITHOUT_EFFECT = {
    "num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0, "length_penalty": 1.0,
    "min_p": 0.0, "use_cache": True,
}  # fmt: skip
# What the harness gives every model whose command line names no device.
UNSAID_DEVICE = "cuda:0"
_log = logging.getLogger(__name__)
# Positions whose logits are held at once.
CHUNK = 64


def parse_draft(text: str | None) -> Draft:
    """Reads `best`, `auto` or `E:G`; commas part the harness's own arguments."""
    if text in (None, "", "best", "auto"):
        return text or None
    try:
        exit_layer, draft_length = map(int, str(text).split(":"))
    except ValueError:
        raise ConfigError(f"draft={text!r} is not best, auto or E:G") from None
    return exit_layer, draft_length


def _whole(name: str, value: Any) -> int | None:
    """Returns a model argument as a number; the harness leaves some of them text.

    Raises:
      ConfigError: it is no whole number.
    """
    if value is None or is_whole(value):
        return value
    if not re.fullmatch(r"-?\d+", str(value)):
        raise ConfigError(f"{name}={value} must be a whole number")
    return int(value)


@functools.partial(jax.jit, static_argnames=("config", "num_layers"))
def score(
    weights: DecoderWeights,
    tokens: Int[Array, "B S"],
    *,
    config: ModelConfig,
    num_layers: int,
) -> tuple[Float[Array, "B S1"], Float[Array, "B S1"]]:
    """Returns the log-probability of each token after the first, and that of the likeliest one.

    Args:
      weights: the model's weights.
      tokens: right-padded; S - 1 is a multiple of `CHUNK`.
      config: shapes.
      num_layers: E, the layers before the head.
    """
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    batch, length = inputs.shape
    positions = jnp.broadcast_to(jnp.arange(length), inputs.shape)
    cache = empty_cache(config, num_layers, batch, length)
    x, _ = run_layers(weights, cache, weights.embedding[inputs], positions, 0, num_layers)

    def chunks(array):
        return array.reshape(batch, -1, CHUNK, *array.shape[2:]).swapaxes(0, 1)

    def of_chunk(chunk):
        states, targets = chunk
        log_p = jax.nn.log_softmax(read_head(weights, states), axis=-1)
        chosen = jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
        return chosen, log_p.max(axis=-1)

    chosen, likeliest = jax.lax.map(of_chunk, (chunks(x), chunks(targets)))
    return (
        chosen.swapaxes(0, 1).reshape(batch, length),
        likeliest.swapaxes(0, 1).reshape(batch, length),
    )


class ExitLM(TemplateLM):
    """What the harness asks of a model, answered from scored tokens and completed texts.

    Attributes:
      max_length: the context used, in tokens.
      tokenizer: reads special tokens that a text spells out, as chat templates need it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        end_token: int,
        *,
        dtype: str,
        max_length: int,
        batch_size: int,
        seed: int = 0,
        chat: ChatTemplate | None = None,
        multiple: int = CHUNK,
    ):
        """Takes what all such models have.

        Args:
          tokenizer: reads special tokens.
          end_token: the token that ends a document.
          dtype: what is computed in.
          max_length: the context, in tokens.
          batch_size: rows scored at once.
          seed: of what is drawn.
          chat: the model's chat template, if it has one.
          multiple: what the number of scored positions is a multiple of, itself one of `CHUNK`.
        """
        super().__init__()
        self.tokenizer, self.max_length = tokenizer, max_length
        self._end_token, self._chat_template, self._dtype = end_token, chat, dtype
        self._batch_size, self._multiple = batch_size, multiple
        self._seed, self._told = seed, False
        self._begin = begin_tokens(tokenizer)

    @abc.abstractmethod
    def _score(
        self, tokens: Int[np.ndarray, "B S"]
    ) -> tuple[Float[np.ndarray, "A B S1"], Float[np.ndarray, "A B S1"]]:
        """Returns what `score` does, of each of the exits that are asked for."""

    @abc.abstractmethod
    def _complete(self, ids: list[int], count: int, until: list[str], sampling: dict) -> str:
        """Continues a prompt by up to so many tokens, up to a stop text."""

    def _each(self, items: Sequence, quiet: bool, what: str) -> Iterable:
        """Yields what takes long, with a progress bar."""
        return tqdm(items, disable=quiet, desc=what)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document."""
        return self._end_token

    @property
    def prefix_token_id(self) -> int:
        """What stands for an empty context: what a document begins with, or what ended the last."""
        return self._begin[-1] if self._begin else self.eot_token_id

    @functools.cached_property
    def tokenizer_name(self) -> str:
        """A name of tokenizer and chat template; the harness keeps prepared requests by it."""
        chat = self._chat_template
        about = f"{self.tokenizer.to_str()}{'' if chat is None else chat.text}"
        return f"layerskip-{hashlib.blake2b(about.encode(), digest_size=8).hexdigest()}"

    def chat_template(self, chat_template: bool | str | None = False) -> str | None:
        """Returns the chat template's text, for the harness's record; None for False or None.

        Raises:
          ConfigError: the model has none, or none of that name.
        """
        if not chat_template:
            return None
        require(
            chat_template in (True, "default"),
            f"--apply_chat_template={chat_template}: a model's default chat template is the only "
            "one that is read here; leave the name out",
        )
        return self._chat.text

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Returns a chat as the text of a prompt.

        Turns of the system, that a template refuses, are left out with a warning, as the harness's
        own model does.

        Args:
          chat_history: turns with `role` and `content`.
          add_generation_prompt: whether the model's turn begins after them; otherwise the last one
            is its beginning.

        Raises:
          ConfigError: the model has no chat template, or it refuses the chat.
        """
        chat, continues = self._chat, not add_generation_prompt
        try:
            return chat.render(chat_history, continue_last=continues)
        except ConfigError as error:
            others = [turn for turn in chat_history if turn.get("role") != "system"]
            if len(others) in (0, len(chat_history)):
                raise
            text = chat.render(others, continue_last=continues)
            if not self._told:
                _log.warning("%s; the system's turns are left out", error)
            self._told = True
            return text

    @property
    def _chat(self) -> ChatTemplate:
        if self._chat_template is None:
            raise ConfigError(
                "the model has no chat template, so it was not trained on chats; leave "
                "--apply_chat_template out"
            )
        return self._chat_template

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        """Returns the tokens of a text, begun as the tokenizer begins one unless told otherwise."""
        if add_special_tokens is None:  # once: a chat template may have written it already
            return encode_prompt(self.tokenizer, string)
        ids = self.tokenizer.encode(string, add_special_tokens=False).ids
        return self._begin + ids if add_special_tokens else ids

    def _loglikelihood_tokens(
        self, requests: list, disable_tqdm: bool = False, **_
    ) -> list[tuple[float, bool]]:
        """Returns log-probability, and whether it is the greedy choice, of each continuation."""
        results = [answers[0] for answers in self._answers(requests, disable_tqdm)]
        for (key, _, _), answer in zip(requests, results, strict=True):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answer)
        return results

    def _answers(self, requests: list, quiet: bool) -> list[list[tuple[float, bool]]]:
        """Returns the same of each exit that is scored.

        A context that leaves no room loses its beginning; a continuation that has none itself is
        impossible for this model, of log-probability -inf. Both are said.
        """
        self._say_too_long([(len(context), len(answer)) for _, context, answer in requests])
        order = sorted(range(len(requests)), key=lambda i: -sum(map(len, requests[i][1:])))
        results: list = [None] * len(requests)
        size, multiple = self._batch_size, self._multiple
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        for batch in self._each(batches, quiet, "log-likelihoods"):
            rows = [(requests[i][1] + requests[i][2])[-(self.max_length + 1) :] for i in batch]
            width = bucket(max(map(len, rows)), self.max_length)
            tokens = np.zeros((size, -(-width // multiple) * multiple + 1), np.int32)
            for row, ids in zip(tokens, rows, strict=False):
                row[: len(ids)] = ids
            chosen, likeliest = self._score(tokens)
            for row, (i, ids) in enumerate(zip(batch, rows, strict=True)):
                # Of the continuation only; the score of token n stands at n - 1.
                part = slice(max(len(ids) - 1 - len(requests[i][2]), 0), len(ids) - 1)
                if not np.isfinite(chosen[:, row, part]).all():
                    raise UserError(
                        f"a log-probability is not finite in {self._dtype}, although every weight "
                        "is; compute in float32 (--model_args dtype=float32)"
                    )
                fits = len(requests[i][2]) <= self.max_length
                results[i] = [
                    (float(ours.sum()), bool((ours == most).all())) if fits else (-math.inf, False)
                    for ours, most in zip(
                        chosen[:, row, part], likeliest[:, row, part], strict=True
                    )
                ]
        return results

    def _say_too_long(self, lengths: list[tuple[int, int]]) -> None:
        """Warns of contexts and continuations, of so many tokens, that do not fit."""
        cut = sum(sum(pair) > self.max_length + 1 for pair in lengths)
        lost = sum(answer > self.max_length for _, answer in lengths)
        if cut - lost:
            _log.warning(
                "%d of %d log-likelihoods are of more than %d tokens; their contexts are cut at "
                "the beginning", cut - lost, len(lengths), self.max_length,
            )  # fmt: skip
        if lost:
            _log.warning(
                "%d of %d continuations alone are longer than the context of %d tokens; their "
                "log-likelihood is -inf", lost, len(lengths), self.max_length,
            )  # fmt: skip

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Returns the log-probability of whole texts, in windows of the context."""
        results = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(
                self.tok_encode(text, add_special_tokens=False),
                self.prefix_token_id,
                self.max_length,
                1,
            )
            parts = [(None, *make_disjoint_window(window)) for window in windows]
            scores = self._loglikelihood_tokens(parts, disable_tqdm=True)
            results.append(sum(logprob for logprob, _ in scores))
        return results

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Continues each context until a stop text, drafted if asked for."""
        asked = [self._asked(request.args[1]) for request in requests]  # before any is computed
        no_room = [
            request
            for request, (count, _, _) in zip(requests, asked, strict=True)
            if count >= self.max_length
        ]
        for task in sorted({str(request.task_name) for request in no_room}):
            documents = [r.doc_id for r in no_room if str(r.task_name) == task]
            _log.warning(
                "task %s: max_gen_toks leaves no room for a prompt in a context of %d tokens, so "
                "its documents %s are answered with nothing; give --gen_kwargs max_gen_toks=N",
                task, self.max_length, documents,
            )  # fmt: skip
        results, met = [], collections.Counter()
        pairs = zip(self._each(requests, disable_tqdm, "generating"), asked, strict=True)
        for request, (count, until, sampling) in pairs:
            if count >= self.max_length:
                results.append("")
                continue
            context = request.args[0]
            ids = self.tok_encode(context)[-(self.max_length - count) :] or [self.eot_token_id]
            if sampling:
                # Fixed by the seed, and another one for each repetition and context.
                key = f"{sampling['seed']} {context}"
                drawn = hashlib.blake2b(f"{met[key]} {key}".encode(), digest_size=4)
                sampling = sampling | {"seed": int.from_bytes(drawn.digest())}
                met[key] += 1
            text = self._complete(ids, count, until, sampling)
            results.append(text)
            self.cache_hook.add_partial("generate_until", request.args, text)
        return results

    def check_generation(self, given: dict[str, Any]) -> None:
        """Raises ConfigError where a task's options for generation cannot be honoured."""
        self._asked(given)

    def _asked(self, given: dict[str, Any]) -> tuple[int, list[str], dict[str, Any]]:
        """Returns the most new tokens, the stop texts, and how to draw: nothing if greedily.

        Raises:
          ConfigError: an option that cannot be honoured.
        """
        settings = normalize_gen_kwargs(given, 256)
        count = settings.pop("max_gen_toks")
        until = [text for text in settings.pop("until") if text]
        draws = settings.pop("do_sample")
        # As `transformers` has it, where nothing is said.
        temperature = settings.pop("temperature", 1.0)
        temperature = temperature if "temperature" in given else 1.0
        temperature = float(temperature)
        sampling = {
            "temperature": temperature,
            "top_k": _whole("top_k", settings.pop("top_k", None)) or 0,
            "top_p": float(settings.pop("top_p", 1.0)),
            "seed": _whole("seed", settings.pop("seed", self._seed)),
        }
        if sampling["top_k"] <= 0:  # all tokens, as others write it
            sampling["top_k"] = None
        for name, value in settings.items():
            require(
                name in WITHOUT_EFFECT and value in (None, WITHOUT_EFFECT[name]),
                f"generation option {name}={value!r} is none of this model's; leave it out of the "
                "task or --gen_kwargs",
            )
        return count, until, sampling if draws and temperature != 0 else {}


@register_model("layerskip")
class LayerSkipLM(ExitLM):
    """Scores with the first `exit` layers, and generates with them or with drafts."""

    def __init__(
        self,
        path: str,
        exit: int | None = None,  # the harness's own word on the command line
        draft: str | None = None,
        exit_when: str | None = None,
        kv: str = DEFAULT_KV,
        dtype: str | None = None,
        max_length: int | None = None,
        seed: int = 0,
        batch_size: int | str = 1,
        max_batch_size: int | str | None = None,
        device: str | None = None,
        **others: Any,
    ):
        """Loads the model; see the module for the arguments.

        Raises:
          ConfigError, UserError: naming the argument.
        """
        require(
            not others,
            f"model argument {next(iter(others), '')} is none of this model's; they are path, "
            "exit, draft, exit_when, kv, dtype, max_length and seed",
        )
        require(
            device in (None, UNSAID_DEVICE),
            f"device={device}: jax chooses it; leave it out and set JAX_PLATFORMS, as to cpu",
        )
        require(
            max_batch_size is None,
            f"max_batch_size={max_batch_size} has no meaning without batch_size=auto; leave it out",
        )
        exit, max_length = _whole("exit", exit), _whole("max_length", max_length)
        self._model = load(path, dtype=dtype)
        config = self._model.generator.config
        layers = config.num_layers
        require(exit is None or 1 <= exit <= layers, f"exit={exit} must be in 1..{layers}")
        # The last exit is the whole model, which may draft.
        self._exit = None if exit is None or exit == layers else exit
        self._draft = parse_draft(draft)
        require(
            self._exit is None or self._draft is None,
            f"exit={exit} decodes with those layers alone; leave it or draft={draft} out",
        )
        self._depth: dict[str, Any] = {"exit_when": exit_when, "kv": kv}
        if exit_when is not None:
            require(
                self._exit is None and self._draft is None,
                f"exit_when={exit_when} decides how deep each token runs; leave it or exit and "
                "draft out",
            )
            self._model.check_policy(exit_when, kv=kv)
        else:
            require(kv == DEFAULT_KV, f"kv={kv} has no meaning without exit_when; leave it out")
        context = config.max_sequence_length
        require(max_length is None or max_length >= 1, f"max_length={max_length} must be above 0")
        require(
            str(batch_size).isdigit() and int(batch_size) >= 1,
            f"batch_size={batch_size} must be a number of rows",
        )
        super().__init__(
            self._model.reading_special_tokens,
            self._model.end_token,
            dtype=config.dtype,
            max_length=min(max_length or context, context),
            batch_size=int(batch_size),
            seed=_whole("seed", seed),
            chat=self._model.chat,
        )

    def _score(self, tokens):
        generator = self._model.generator
        layers = self._exit or generator.config.num_layers
        found = score(generator.weights, tokens, config=generator.config, num_layers=layers)
        chosen, likeliest = jax.device_get(found)
        return chosen[None], likeliest[None]

    def _complete(self, ids, count, until, sampling):
        [text] = self._model.complete(
            [ids], count, draft=self._draft, exit_layer=self._exit, stop=until, **self._depth,
            **sampling,
        ).texts  # fmt: skip
        return text
