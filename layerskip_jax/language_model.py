"""A trained model that continues text: what `layerskip_jax.load` returns."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

from jax.sharding import Mesh
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from layerskip_jax.data.tokenizer import encode_prompt, load_tokenizer
from layerskip_jax.generation.generator import Generator
from layerskip_jax.generation.options import Generation
from layerskip_jax.interop.pretrained import end_token_ids, open_pretrained
from layerskip_jax.model.definition import ModelDefinition
from layerskip_jax.run_folder.object_store import as_path
from layerskip_jax.run_folder.paths import is_run
from layerskip_jax.schema import ConfigError, require
from layerskip_jax.training.restore import load_run

# How to draft: not at all, as the sweep found best, as the model finds out, or (E, G).
Draft = str | tuple[int, int] | None


@dataclasses.dataclass(frozen=True)
class Completions:
    """What `LanguageModel.generate` returns.

    Attributes:
      texts: what follows each prompt; a stop sequence or end token at its end is left out.
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
      best_pair: (E, G) that `layerskip sweep` found best, `PLAIN` where it found plain decoding
        the fastest, None if it was not run.
    """

    def __init__(
        self,
        generator: Generator,
        tokenizer: Tokenizer,
        end_token: int | None,
        best_pair: tuple[int, int] | None,
        more_end_tokens: Sequence[int] = (),
    ):
        """Takes the parts; see `load`."""
        self.generator = generator
        self.tokenizer = tokenizer
        self.end_token = end_token
        self.best_pair = best_pair
        self.more_end_tokens = tuple(i for i in more_end_tokens if i != end_token)

    def generate(
        self,
        prompts: str | Sequence[str],
        max_new_tokens: int = 128,
        *,
        draft: Draft = None,
        exit_layer: int | None = None,
        stop: Sequence[str] = (),
        **options: Any,
    ) -> Completions:
        """Continues one text or several, all in one batch.

        Args:
          prompts: texts.
          max_new_tokens: the most new tokens of each.
          draft: None decodes plainly; `best` drafts as `layerskip sweep` found best, or not at
            all if it found nothing faster than plain decoding; `auto` chooses from cycle to cycle;
            a pair (E, G) drafts G tokens with E layers. None of them changes the tokens.
          exit_layer: E, to decode with the first E layers only: faster, and other tokens.
          stop: texts that end a row, as the tokens that they are encoded to.
          **options: further attributes of `Request`: temperature, top_k, top_p, seed, ...

        Raises:
          ConfigError: naming the value and the remedy.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        ids = [encode_prompt(self.tokenizer, prompt) for prompt in prompts]
        request = self._request(draft, exit_layer, stop, options)
        generation = self.generator.generate(ids, max_new_tokens, **request)
        endings = [*request["stop"], [request["end_token"]]]
        texts = [self.tokenizer.decode(_without(row, endings)) for row in generation.tokens]
        return Completions(texts, generation)

    def generate_tokens(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        draft: Draft = None,
        exit_layer: int | None = None,
        stop: Sequence[str] = (),
        **options: Any,
    ) -> Generation:
        """Continues prompts given as token ids; see `generate` for the arguments."""
        request = self._request(draft, exit_layer, stop, options)
        return self.generator.generate(prompts, max_new_tokens, **request)

    def stream(
        self,
        prompt: str,
        max_new_tokens: int = 128,
        *,
        draft: Draft = None,
        exit_layer: int | None = None,
        stop: Sequence[str] = (),
        **options: Any,
    ) -> Iterator[Piece]:
        """Continues one text and yields it as it comes; see `generate` for the arguments.

        A piece never ends within a character; its bytes wait for the rest.
        """
        ids = encode_prompt(self.tokenizer, prompt)
        request = self._request(draft, exit_layer, stop, options)
        decoder, read = DecodeStream(skip_special_tokens=True), []
        for event in self.generator.stream(ids, max_new_tokens, **request):
            if event.is_draft:
                # What the drafts add to the text so far.
                before = self.tokenizer.decode(read[-8:])
                after = self.tokenizer.decode(read[-8:] + event.tokens)
                yield Piece(True, after[len(before.rstrip("�")) :].rstrip("�"))
                continue
            read += event.tokens
            pieces = (decoder.step(self.tokenizer, token) for token in event.tokens)
            yield Piece(False, "".join(piece for piece in pieces if piece))

    def _stop_tokens(self, text: str) -> list[int]:
        for token_id, token in self.tokenizer.get_added_tokens_decoder().items():
            if token.content == text:
                return [token_id]
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def _request(self, draft, exit_layer, stop, options) -> dict:
        require(
            draft is None or exit_layer is None,
            f"exit_layer={exit_layer} decodes with those layers alone, so there is nothing to "
            f"draft for; leave it out, or draft={draft!r}",
        )
        sequences = [self._stop_tokens(text) for text in stop]
        for text, sequence in zip(stop, sequences, strict=True):
            require(len(sequence) > 0, f"stop={text!r} holds no token")
        sequences += [[token] for token in self.more_end_tokens]
        request = {"end_token": self.end_token, "stop": sequences, **options}
        if draft == "best":
            if self.best_pair is None:
                raise ConfigError(
                    "draft='best' needs what `layerskip sweep` finds; run it, or use draft='auto'"
                )
            draft = None if self.best_pair == PLAIN else self.best_pair
        if exit_layer is not None:
            request |= {"mode": "early_exit", "exit_layer": exit_layer}
        elif draft == "auto":
            request["mode"] = "auto"
        elif isinstance(draft, tuple) and len(draft) == 2:
            request |= {
                "mode": "self_speculative", "exit_layer": draft[0], "draft_length": draft[1]
            }  # fmt: skip
        elif draft is not None:
            raise ConfigError(f"draft={draft!r} must be None, 'best', 'auto' or a pair (E, G)")
        return request


def load(
    path: str | PurePath,
    *,
    step: int | None = None,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    draft_tokens: Sequence[int] | None = None,
) -> LanguageModel:
    """Reads a trained model.

    Args:
      path: the folder of a run, here or on gs:// or s3://, a Hugging Face folder, or a GGUF file.
      step: the checkpoint of a run; None takes the newest.
      dtype: to compute in; None takes the run's, or bfloat16.
      mesh: to decode on; see `Generator`.
      draft_tokens: the only tokens to draft, see `Generator`; None drafts those that
        `layerskip sweep` was told to draft, if it was run.

    Raises:
      UserError: no such run or checkpoint, or see `open_pretrained`.
    """
    if not is_run(as_path(path)) and step is None:
        published = open_pretrained(path)
        model = dataclasses.replace(published.config, dtype=dtype or published.config.dtype)
        definition = ModelDefinition(model)
        return LanguageModel(
            Generator(
                definition.model(published.parameters()), mesh=mesh, draft_tokens=draft_tokens
            ),
            published.tokenizer,
            published.end_token_id,
            None,
            end_token_ids(published.files, published.source),
        )
    run = load_run(path, step)
    model = run.config.model
    model = dataclasses.replace(model, dtype=dtype or model.dtype)
    best = None
    if run.folder.speculation_file.is_file():
        found = json.loads(run.folder.speculation_file.read_text())
        best = (found["best"]["exit_layer"], found["best"]["draft_length"])
        if found["best"]["speedup"] < 1:
            best = PLAIN
        if draft_tokens is None:
            draft_tokens = found.get("draft_tokens")
    return LanguageModel(
        Generator(
            ModelDefinition(model).model(run.parameters), mesh=mesh, draft_tokens=draft_tokens
        ),
        load_tokenizer(run.folder.tokenizer_file),
        json.loads(run.folder.data_file.read_text())["end_token_id"],
        best,
        end_token_ids(run.folder.published_files(), run.folder.published),
    )


def _without(tokens: list[int], endings: list[list[int]]) -> list[int]:
    for ending in endings:
        if ending and tokens[-len(ending) :] == ending:
            return tokens[: -len(ending)]
    return tokens
