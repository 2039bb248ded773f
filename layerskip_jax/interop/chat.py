"""Chats: turns of several speakers as the one text that a model was trained on."""

import datetime
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from layerskip_jax.interop.pretrained import parse_json
from layerskip_jax.schema import ConfigError, UserError, require

# What templates are given beside the messages, where the tokenizer has such a token.
_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")

# A character of nobody's, to find the end of a message by.
_MARK = "\ue000"
# What a template raises by itself, and what Python does in the expressions of one.
_REFUSALS = (
    jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError
)  # fmt: skip


class _Generation(Extension):
    """`{% generation %}` marks what the model writes, for training; here it is nothing."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **_: Any) -> str:
    """Jinja's own escapes what HTML does not allow."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


class ChatTemplate:
    """A model's chat template, in Jinja, run in a sandbox: it comes with the weights.

    Attributes:
      text: the template itself.
    """

    def __init__(self, template: str, tokens: Mapping[str, str]):
        """Compiles a template.

        Args:
          template: its text.
          tokens: the special tokens that it may write, as `bos_token`.

        Raises:
          UserError: it is no Jinja template.
        """
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        try:
            self._template = environment.from_string(template)
        except jinja2.TemplateError as error:
            raise UserError(f"the model's chat template cannot be read ({error})") from error
        self.text = template
        self._tokens = dict(tokens)

    def __reduce__(self):
        """Compiled templates do not travel between processes; their texts do."""
        return ChatTemplate, (self.text, self._tokens)

    def render(self, messages: Sequence[Mapping[str, Any]], *, continue_last: bool = False) -> str:
        """Returns a chat as text, up to where the model's turn begins.

        Args:
          messages: each with `role` and `content`, as `{"role": "user", "content": "Hello"}`.
          continue_last: whether the model's turn has begun already, and the last message is what it
            has said; the text then ends with that.

        Raises:
          ConfigError: a message lacks one of them, or the template refuses the chat.
        """
        self._check(messages)
        if not continue_last:
            return self._render(messages, add_generation_prompt=True)
        *before, last = messages
        require(
            isinstance(last["content"], str), f"message {last!r} must have a text to be continued"
        )
        # The space shows whether the template takes spaces off the end of a message.
        last_marked = {**last, "content": f"{last['content']}{_MARK} "}
        marked = self._render([*before, last_marked], add_generation_prompt=False)
        text, mark, rest = marked.rpartition(_MARK)
        require(
            bool(mark) and last["content"].strip() in text,
            f"the model's chat template changes message {last!r}, so it cannot be continued",
        )
        # A template may have written the message before as well.
        text = text.replace(f"{_MARK} ", "").replace(_MARK, "")
        return text if rest.startswith(" ") else text.rstrip()

    def turns(self, messages: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
        """Returns the turns of the assistant, each with the prompt that asks for it.

        Args:
          messages: each with `role` and `content`. An assistant's at the very beginning has no
            prompt, and is no turn here.

        Returns:
          Of each turn what `render` makes of the messages before it, and what the template writes
          of the turn after that, up to where the next one begins.

        Raises:
          ConfigError: see `render`; or a turn is empty, or the template writes a turn otherwise
            than after its prompt.
        """
        self._check(messages)
        found = []
        for index, message in enumerate(messages):
            if index == 0 or message["role"] != "assistant":
                continue
            content = message["content"]
            said = content.strip() if isinstance(content, str) else content
            require(bool(said or message.get("tool_calls")), f"message {message!r} is empty")
            prompt = self.render(messages[:index])
            whole = self._render(messages[: index + 1], add_generation_prompt=False)
            require(
                whole.startswith(prompt) and len(whole) > len(prompt),
                f"the model's chat template does not write message {message!r} after what it asks "
                "for it with",
            )
            found.append((prompt, whole[len(prompt) :]))
        return found

    @property
    def sha256(self) -> str:
        """SHA-256 of the template and its tokens, in hexadecimal."""
        return hashlib.sha256(json.dumps([self.text, self._tokens]).encode()).hexdigest()

    @staticmethod
    def _check(messages: Sequence[Mapping[str, Any]]) -> None:
        require(len(messages) > 0, "the chat has no message; give at least one")
        for message in messages:
            require(
                isinstance(message, Mapping) and {"role", "content"} <= message.keys(),
                f"message {message!r} must have a role and a content",
            )

    def _render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool) -> str:
        try:
            return self._template.render(
                messages=list(messages), add_generation_prompt=add_generation_prompt, tools=None,
                documents=None, **self._tokens,
            )  # fmt: skip
        except _REFUSALS as error:
            raise ConfigError(f"the model's chat template refuses this chat: {error}") from error


def chat_template(
    files: Mapping[str, bytes], source: Path, tokenizer: Tokenizer
) -> ChatTemplate | None:
    """Returns the chat template among a model's files, None if there is none.

    Looked for where `transformers` writes one, the newest way first; so are the special tokens.

    Args:
      files: small files by name, as in `Pretrained`.
      source: where they are, for messages.
      tokenizer: the model's, for special tokens of which the files say ids alone.

    Raises:
      UserError: a file is no JSON, or the template no template.
    """
    ids, tokens, own, settings = (
        parse_json(files.get(name, b"{}"), source / name)
        for name in (
            "config.json", "special_tokens_map.json", "chat_template.json", "tokenizer_config.json",
        )
    )  # fmt: skip
    template = files.get("chat_template.jinja", b"").decode("utf-8", errors="replace")
    template = template or own.get("chat_template") or settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = [entry for entry in template if isinstance(entry, dict)]
        template = {entry.get("name"): entry.get("template") for entry in named}.get("default")
    if not template:
        return None
    if not isinstance(template, str):
        raise UserError(f"{source}: chat_template={template!r} is no text")
    known = {}
    for name in _TOKENS:
        number = ids.get(f"{name}_id")
        number = number[0] if isinstance(number, list) and number else number
        if type(number) is int and number >= 0:  # some say -1 for none
            if (text := tokenizer.id_to_token(number)) is not None:
                known[name] = text
        for given in (tokens.get(name), settings.get(name)):
            if text := given.get("content") if isinstance(given, dict) else given:
                known[name] = text
    return ChatTemplate(template, known)
