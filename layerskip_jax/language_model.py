"""A trained model that continues text: what `layerskip_jax.load` returns."""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

from jax.sharding import Mesh
from tokenizers import Tokenizer

from layerskip_jax.data.text import (
    Row,
    encode_prompt,
    reading_special_tokens,
    stop_sequences,
    stop_texts,
)
from layerskip_jax.data.tokenizer import load_tokenizer
from layerskip_jax.decoding.exit_policy import ExitPolicy, candidate_exits, parse_policy
from layerskip_jax.generation.generator import Generator
from layerskip_jax.generation.options import DEFAULT_KV, Generation, Request
from layerskip_jax.interop.chat import ChatTemplate, chat_template
from layerskip_jax.interop.pretrained import end_token_ids, open_pretrained
from layerskip_jax.model.config import ModelConfig
from layerskip_jax.model.definition import ModelDefinition
from layerskip_jax.model.transformer import Transformer
from layerskip_jax.run_folder.exit_policies import load_threshold
from layerskip_jax.run_folder.object_store import as_path
from layerskip_jax.run_folder.paths import is_run, open_run
from layerskip_jax.schema import ConfigError, is_whole, require, require_count
from layerskip_jax.training.restore import load_run

# How to draft: not at all, as the sweep found best, as the model finds out, (E, G), or G with the
# draft model.
Draft = str | int | tuple[int, int] | None
# Returns the threshold of a policy, a way with skipped keys and values, and candidate exits.
Calibrated = Callable[[str, str, tuple[int, ...]], int | float]
# A turn of a chat: `role` and `content`, and whatever else the model's template reads.
Message = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Completions:
    """What `LanguageModel.generate` returns.

    Attributes:
      texts: what follows each prompt, so that prompt and text joined are what the model wrote;
        a stop text or end token at its end is left out.
      generation: tokens, times, and how the drafts fared.
    """

    texts: list[str]
    generation: Generation


class Piece(NamedTuple):
    """A piece of streamed text: a draft, which the next piece replaces, or text for good."""

    is_draft: bool
    text: str


# The pair of no drafts at all.
PLAIN = (0, 0)


class LanguageModel:
    """A model with its tokenizer.

    Attributes:
      generator: for token ids instead of text.
      tokenizer: that of the data the model was trained on.
      end_token: id of the token that ends a document, if there is one.
      more_end_tokens: ids of others that end a text too, such as that of a chat's turn.
      chat: the model's chat template, None if it has none.
      calibrated: returns the threshold that `layerskip calibrate` found for a policy, a way with
        the keys and values of skipped layers, and candidate exits; None of a model that is no run.
      best_pair: (E, G) that `layerskip sweep` found best, `PLAIN` where it found plain decoding
        the fastest, None if it was not run.
      best_stop_below: the threshold below which it found that drafts should end, if any.
    """

    def __init__(
        self,
        generator: Generator,
        tokenizer: Tokenizer,
        end_token: int | None,
        best_pair: tuple[int, int] | None,
        more_end_tokens: Sequence[int] = (),
        chat: ChatTemplate | None = None,
        calibrated: Calibrated | None = None,
        best_stop_below: float | str | None = None,
    ):
        """Takes the parts; see `load`."""
        self.calibrated = calibrated
        self.chat = chat
        self.generator = generator
        self.tokenizer = tokenizer
        self.end_token = end_token
        self.best_pair = best_pair
        self.best_stop_below = best_stop_below
        # One without a row is never drawn.
        self.more_end_tokens = tuple(
            i for i in more_end_tokens if i != end_token and i < generator.config.vocab_size
        )

    def generate(
        self,
        prompts: str | Sequence[str] = (),
        max_new_tokens: int = 128,
        *,
        messages: Sequence[Message] | Sequence[Sequence[Message]] = (),
        draft: Draft = None,
        exit_layer: int | None = None,
        exit_when: str | ExitPolicy | None = None,
        stop: str | Sequence[str] = (),
        special_tokens: bool = False,
        **options: Any,
    ) -> Completions:
        """Continues one text or several, all in one batch.

        Args:
          prompts: texts; none with `messages`.
          max_new_tokens: the most new tokens of each.
          messages: a chat, or several: turns as `{"role": "user", "content": "Hello"}`. The model's
            own template makes a prompt of each, and the special tokens that the template writes, or
            a message spells out, are those tokens, as in `transformers`.
          draft: None decodes plainly; `best` drafts as `layerskip sweep` found best, or not at
            all if it found nothing faster than plain decoding; `auto` chooses from cycle to cycle;
            a pair (E, G) drafts G tokens with E layers; a number G drafts as many with the draft
            model that `load` was given. None of them changes the tokens.
          exit_layer: E, to decode with the first E layers only: faster, and other tokens.
          exit_when: to run each token only as deep as it takes an exit to be sure, such as
            `entropy:0.2`, or `entropy` for the threshold that `layerskip calibrate` found:
            faster, and some other tokens. See `decoding.exit_policy`; `exits`, `kv`,
            `room` and `falling` are options beside it.
          stop: a text that ends a row wherever it comes, however it is cut into tokens, or
            several. It is left out of the text.
          special_tokens: whether a special token spelled out in a prompt, such as a chat's
            `<|im_start|>`, is that token. By default it is text, as it is in the documents that
            `prepare` reads: a prompt that comes from elsewhere cannot end its own turn.
          **options: further attributes of `Request`: temperature, top_k, top_p, seed,
            stop_below (drafts of a pair, or of the draft model, end early where it is unsure;
            `best` and `auto` take what the sweep found unless it is given), ...

        Raises:
          ConfigError: naming the value and the remedy.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        ids = [self.encode(prompt, special_tokens=special_tokens) for prompt in prompts]
        require(not (prompts and messages), "give prompts or messages, not both")
        if messages:
            chats = [messages] if isinstance(messages[0], Mapping) else messages
            ids = [self.encode_chat(chat) for chat in chats]
        return self.complete(
            ids,
            max_new_tokens,
            draft=draft,
            exit_layer=exit_layer,
            exit_when=exit_when,
            stop=stop,
            **options,
        )

    def encode(self, prompt: str, *, special_tokens: bool = False) -> list[int]:
        """Returns a prompt's ids; see `generate`."""
        return encode_prompt(
            self.reading_special_tokens if special_tokens else self.tokenizer, prompt
        )

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Returns the ids of a chat, up to where the model's turn begins; see `generate`.

        Raises:
          ConfigError: the model has no chat template, or it refuses the messages.
        """
        if self.chat is None:
            raise ConfigError(
                "the model has no chat template, so it was not trained on chats; give it a prompt"
            )
        text = self.chat.render(messages)
        # The template writes what a text begins with.
        return self.reading_special_tokens.encode(text, add_special_tokens=False).ids

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        draft: Draft = None,
        exit_layer: int | None = None,
        exit_when: str | ExitPolicy | None = None,
        stop: str | Sequence[str] = (),
        **options: Any,
    ) -> Completions:
        """Continues prompts given as token ids; see `generate` for the arguments."""
        texts, request = self._request(draft, exit_layer, exit_when, stop, options)
        rows = [self._row(prompt, texts, request) for prompt in prompts]

        def ended(index: int, tokens: list[int]) -> bool:
            rows[index].add(tokens[rows[index].count :])
            return rows[index].ended

        generation = self.generator.generate(
            prompts, max_new_tokens, ended=ended if texts else None, **request
        )
        for index, row in enumerate(rows):
            ended(index, generation.tokens[index])
            row.finish()
        tokens = [new[: row.count] for row, new in zip(rows, generation.tokens, strict=True)]
        return Completions(
            [row.text for row in rows], dataclasses.replace(generation, tokens=tokens)
        )

    def stream(
        self,
        prompt: str = "",
        max_new_tokens: int = 128,
        *,
        messages: Sequence[Message] = (),
        draft: Draft = None,
        exit_layer: int | None = None,
        exit_when: str | ExitPolicy | None = None,
        stop: str | Sequence[str] = (),
        special_tokens: bool = False,
        **options: Any,
    ) -> Iterator[Piece]:
        """Continues one text and yields it as it comes; see `generate` for the arguments.

        A piece never ends within a character, nor within what may be a stop text: they wait for
        the rest. Joined, the pieces for good are the text of `generate`.
        """
        require(not (prompt and messages), "give a prompt or messages, not both")
        if messages:
            ids = self.encode_chat(messages)
        else:
            ids = self.encode(prompt, special_tokens=special_tokens)
        texts, request = self._request(draft, exit_layer, exit_when, stop, options)
        row = self._row(ids, texts, request)
        for event in self.generator.stream(ids, max_new_tokens, **request):
            if event.is_draft:
                yield Piece(True, row.peek(event.tokens))
                continue
            yield Piece(False, row.add(event.tokens))
            if row.ended:
                return
        yield Piece(False, row.finish())

    def _row(self, prompt: Sequence[int], texts: tuple[str, ...], request: dict) -> Row:
        ends = (request["end_token"], *self.more_end_tokens)
        return Row(
            self.tokenizer,
            prompt,
            stop=texts,
            end_tokens=[token for token in ends if token is not None],
        )

    @functools.cached_property
    def reading_special_tokens(self) -> Tokenizer:
        """A copy of the tokenizer to which a special token spelled out in a text is that token."""
        return reading_special_tokens(self.tokenizer)

    def _request(self, draft, exit_layer, exit_when, stop, options) -> tuple[tuple[str, ...], dict]:
        """Returns the stop texts, and what the generator is asked."""
        require(
            draft is None or exit_layer is None,
            f"exit_layer={exit_layer} decodes with those layers alone, so there is nothing to "
            f"draft for; leave it out, or draft={draft!r}",
        )
        require(
            exit_when is None or (draft is None and exit_layer is None),
            f"exit_when={str(exit_when)!r} decides how deep each token runs; leave it out, or "
            "draft and exit_layer",
        )
        texts = stop_texts(stop)
        sequences = stop_sequences(self.tokenizer, texts)
        sequences += [[token] for token in self.more_end_tokens]
        request = {"end_token": self.end_token, "stop": sequences, **options}
        if draft == "best":
            if self.best_pair is None:
                raise ConfigError(
                    "draft='best' needs what `layerskip sweep` finds; run it, or use draft='auto'"
                )
            draft = None if self.best_pair == PLAIN else self.best_pair
            if draft is None:
                request.pop("stop_below", None)  # nothing is drafted that could end early
            elif request.get("stop_below") is None:
                request["stop_below"] = self.best_stop_below
        if exit_when is not None:
            request |= {"mode": "adaptive", "exit_when": self._policy(exit_when, options)}
        elif exit_layer is not None:
            request |= {"mode": "early_exit", "exit_layer": exit_layer}
        elif draft == "auto":
            request["mode"] = "auto"
            if request.get("stop_below") is None:
                request["stop_below"] = self.best_stop_below
        elif isinstance(draft, tuple) and len(draft) == 2:
            request |= {
                "mode": "self_speculative", "exit_layer": draft[0], "draft_length": draft[1]
            }  # fmt: skip
        elif is_whole(draft):
            require_count("draft", draft, 1)
            require(
                self.generator.draft_config is not None,
                f"draft={draft} drafts with a draft model, and the model was loaded without one; "
                "give load(..., draft_model=PATH) one, or a pair (E, G) to draft with E layers",
            )
            request |= {"mode": "draft_model", "draft_length": draft}
        elif draft is not None:
            raise ConfigError(
                f"draft={draft!r} must be None, 'best', 'auto', a pair (E, G), or G beside a draft "
                "model"
            )
        return texts, request

    def check_policy(self, exit_when: str | ExitPolicy, **options: Any) -> None:
        """Raises ConfigError unless `generate` would take this policy and these options."""
        policy = self._policy(exit_when, options)
        self.generator.check(Request([[0]], 1, mode="adaptive", exit_when=policy, **options))

    def _policy(self, exit_when: str | ExitPolicy, options: Mapping[str, Any]) -> ExitPolicy:
        """Returns a policy with its threshold, where there is none the one that was calibrated."""
        policy = parse_policy(exit_when) if isinstance(exit_when, str) else exit_when
        if policy.threshold is not None or self.calibrated is None:
            return policy
        exits = options.get("exits")
        exits = candidate_exits(
            self.generator.config.num_layers, None if exits is None else tuple(exits)
        )
        kv = options.get("kv", DEFAULT_KV)
        return dataclasses.replace(policy, threshold=self.calibrated(policy.name, kv, exits))


class _Source(NamedTuple):
    """A model that was opened; its parameters are not read yet."""

    config: ModelConfig
    tokenizer: Tokenizer
    read: Callable[[], tuple[Transformer, Calibrated | None]]
    end_token: int
    more_end_tokens: list[int]
    chat: ChatTemplate | None
    best_pair: tuple[int, int] | None = None
    draft_tokens: list[int] | None = None
    best_stop_below: float | str | None = None


def load(
    path: str | PurePath,
    *,
    step: int | None = None,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    draft_tokens: Sequence[int] | None = None,
    draft_model: str | PurePath | None = None,
) -> LanguageModel:
    """Reads a trained model.

    Args:
      path: the folder of a run, here or on gs:// or s3://, a Hugging Face folder, or a GGUF file.
      step: the checkpoint of a run; None takes the newest.
      dtype: to compute in; None takes the run's, or bfloat16.
      mesh: to decode on; see `Generator`.
      draft_tokens: the only tokens to draft, see `Generator`; None drafts those that
        `layerskip sweep` was told to draft, if it was run.
      draft_model: the like of `path`, a second model with the same tokens, to draft with
        (`generate(draft=5)`); of a run its newest checkpoint.

    Raises:
      ConfigError: the draft model has other tokens.
      UserError: no such run or checkpoint, or see `open_pretrained`.
    """
    model, second = _open(path, step, dtype), None
    if draft_model is not None:
        second = _open(draft_model, None, dtype)
        _require_same_tokens(model, second, draft_model)
    parameters, calibrated = model.read()
    generator = Generator(
        parameters,
        mesh=mesh,
        draft_tokens=model.draft_tokens if draft_tokens is None else draft_tokens,
        draft_model=None if second is None else second.read()[0],
    )
    return LanguageModel(
        generator,
        model.tokenizer,
        model.end_token,
        model.best_pair,
        model.more_end_tokens,
        model.chat,
        calibrated,
        model.best_stop_below,
    )


def _open(path: str | PurePath, step: int | None, dtype: str | None) -> _Source:
    """Opens a model without reading its parameters; see `load`."""
    if not is_run(as_path(path)) and step is None:
        published = open_pretrained(path)
        model = dataclasses.replace(published.config, dtype=dtype or published.config.dtype)
        return _Source(
            model,
            published.tokenizer,
            lambda: (ModelDefinition(model).model(published.parameters()), None),
            published.end_token_id,
            end_token_ids(published.files, published.source),
            chat_template(published.files, published.source, published.tokenizer),
        )
    folder, config = open_run(path)
    model = dataclasses.replace(config.model, dtype=dtype or config.model.dtype)
    best, stop_below, draft_tokens = None, None, None
    if folder.speculation_file.is_file():
        found = json.loads(folder.speculation_file.read_text())
        best = (found["best"]["exit_layer"], found["best"]["draft_length"])
        stop_below = found["best"].get("stop_below")  # older sweeps tried none
        if found["best"]["speedup"] < 1:
            best = PLAIN
        draft_tokens = found.get("draft_tokens")
    tokenizer, files = load_tokenizer(folder.tokenizer_file), folder.published_files()

    def read():
        run = load_run(path, step)
        calibrated = functools.partial(load_threshold, folder, step=run.step)
        return ModelDefinition(model).model(run.parameters), calibrated

    return _Source(
        model,
        tokenizer,
        read,
        folder.data()["end_token_id"],
        end_token_ids(files, folder.published),
        chat_template(files, folder.published, tokenizer),
        best,
        draft_tokens,
        stop_below,
    )


def _require_same_tokens(model: _Source, second: _Source, path: str | PurePath) -> None:
    """Refuses a draft model to which an id is another text."""
    remedy = "take one with the same tokenizer, such as a smaller one trained on the same data"
    ours, theirs = model.config.vocab_size, second.config.vocab_size
    require(
        ours == theirs,
        f"the draft model {path} has a vocabulary of {theirs} tokens and the model one of {ours}; "
        f"{remedy}",
    )
    texts, drafted = (
        {token_id: text for text, token_id in tokenizer.get_vocab(with_added_tokens=True).items()}
        for tokenizer in (model.tokenizer, second.tokenizer)
    )
    for token_id in sorted(texts.keys() | drafted.keys()):
        require(
            texts.get(token_id) == drafted.get(token_id),
            f"token {token_id} is {texts.get(token_id)!r} to the model and "
            f"{drafted.get(token_id)!r} to the draft model {path}; {remedy}",
        )
