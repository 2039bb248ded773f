"""Text to ids and back: prompts, what follows them, and the texts that end it.

A text is text, however it is cut into tokens. What follows a prompt is what its tokens add to the
text before them; decoded by themselves they would lose the space that many tokenizers take off the
beginning of a text. And a stop text ends a row wherever it stands in the text, whether or not it
is encoded there as it would be alone.
"""

import itertools
from collections.abc import Sequence

from tokenizers import Tokenizer

from layerskip_jax.schema import require

# Tokens before new ones that are decoded with them. A few, since what a decoder does at a token
# depends on its neighbours; not all, or a text of n tokens would take n^2.
CONTEXT = 8
BEFORE = "\na.0 "  # what a completion may be encoded after
CHARACTER = 4  # bytes that one has at most in UTF-8, each perhaps a token
UNFINISHED = "\ufffd"  # what decoders make of bytes that are no character, or not yet


def begin_tokens(tokenizer: Tokenizer) -> list[int]:
    """Returns the ids that a tokenizer's own template puts before a text, such as Llama's `<s>`."""
    encoding = tokenizer.encode("a")
    added = itertools.takewhile(bool, encoding.special_tokens_mask)
    return encoding.ids[: len(list(added))]


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """Returns the ids of the beginning of a document, as `prepare` has them.

    What a text begins with is put there once, also where the text spells it and the tokenizer
    reads special tokens as such.
    """
    return begun(begin_tokens(tokenizer), tokenizer.encode(text, add_special_tokens=False).ids)


def begun(begin: list[int], ids: list[int]) -> list[int]:
    """Returns a text's ids after those that every text begins with, unless they are there."""
    return ids if ids[: len(begin)] == begin else begin + ids


def reading_special_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """Returns a copy to which a special token spelled out in a text is that token."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.encode_special_tokens = False
    return copy


def completion_ids(
    tokenizer: Tokenizer, completion: str, prompt_ids: list[int], whole_ids: list[int]
) -> list[int] | None:
    """Returns the ids that say a completion after its prompt, whose ids stay as they are.

    They are the rest of the whole text's ids, where those begin with the prompt's. Where a token
    would reach over the boundary they are the completion's own, encoded alone, or after a character
    in place of the prompt where a tokenizer puts a space before a text. Either way the ids of
    prompt and completion decode to what those of the whole text do.

    Args:
      tokenizer: of all ids.
      completion: what follows the prompt.
      prompt_ids: those that `generate` would make of the prompt.
      whole_ids: those of prompt and completion in one.

    Returns:
      None where the tokenizer has no such ids.
    """
    count = len(prompt_ids)
    if whole_ids[:count] == prompt_ids and len(whole_ids) > count:
        return whole_ids[count:]
    said = tokenizer.decode(whole_ids, skip_special_tokens=False)
    for before in ("", *BEFORE):
        around = tokenizer.encode(before, add_special_tokens=False).ids
        within = tokenizer.encode(before + completion, add_special_tokens=False).ids
        ids = within[len(around) :]
        if within[: len(around)] == around and ids:
            if tokenizer.decode(prompt_ids + ids, skip_special_tokens=False) == said:
                return ids
    return None


class Continuation:
    """The text that tokens add to a prompt, one after another.

    The bytes of an unfinished character wait for the rest of it.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]):
        """Begins after a prompt, given as ids."""
        self._tokenizer = tokenizer
        self._before = list(prompt)
        self._waiting: list[int] = []
        self._shorten()

    def add(self, token: int) -> str:
        """Takes a token; returns what it adds, nothing where a character is unfinished."""
        self._waiting.append(token)
        text = self.peek()
        if text.endswith(UNFINISHED):
            return ""
        self._settle()
        return text

    def peek(self, tokens: Sequence[int] = ()) -> str:
        """Returns what all that waits, and tokens after it, would add."""
        before = self._tokenizer.decode(self._before)
        after = self._tokenizer.decode([*self._before, *self._waiting, *tokens])
        for known in (before, before.rstrip(UNFINISHED)):
            if after.startswith(known):
                return after[len(known) :]
        # What came has changed what was there, which was said already.
        return after[len(before) :]

    def finish(self) -> str:
        """Returns what waits, as no rest of it will come."""
        text = self.peek()
        self._settle()
        return text

    def _settle(self) -> None:
        self._before += self._waiting
        self._waiting = []
        self._shorten()

    def _shorten(self) -> None:
        """Forgets what lies far back, but never all text: a first word is decoded otherwise.

        Nor a part of a character: where bytes are tokens, half a one spoils all bytes after it.
        """

        def last(count: int) -> str:
            return self._tokenizer.decode(self._before[-count:])

        count, text = CONTEXT, last(CONTEXT)
        while count < len(self._before) and not text:
            count *= 2
            text = last(count)
        if text.startswith(UNFINISHED):
            longer = range(count + 1, count + CHARACTER)
            whole = (n for n in longer if not last(n).startswith(UNFINISHED))
            count = next(whole, count)
        self._before = self._before[-count:]


def stop_texts(stop: str | Sequence) -> tuple[str, ...]:
    """Returns stop texts, of which one may be given by itself.

    Raises:
      ConfigError: one is empty or no text.
    """
    texts = (stop,) if isinstance(stop, str) else tuple(stop)
    for text in texts:
        require(isinstance(text, str), f"stop={text!r} is no text; give a str, or several")
        require(text != "", "stop='' would end every text at once; leave it out")
    return texts


def stop_sequences(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Returns ids that spell the texts, as they are encoded alone and within a line.

    The compiled loop ends a row at them. A text that is spelled otherwise it does not see, so they
    save time, and `Row` decides.
    """
    found = []
    special = _added_tokens(tokenizer)
    [around] = {tuple(tokenizer.encode("a", add_special_tokens=False).ids)}
    for text in texts:
        if text in special:
            found.append([special[text]])
            continue
        alone = tokenizer.encode(text, add_special_tokens=False).ids
        within = tokenizer.encode("a" + text, add_special_tokens=False).ids
        spellings = [alone]
        if tuple(within[: len(around)]) == around:
            spellings.append(within[len(around) :])
        for ids in spellings:
            if ids and ids not in found and text in Continuation(tokenizer, around).peek(ids):
                found.append(ids)
    return found


def _added_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    tokens = tokenizer.get_added_tokens_decoder()
    return {token.content: token_id for token_id, token in tokens.items()}


class Row:
    """What is written after one prompt, up to where it ends.

    Attributes:
      text: so far, without what may yet become a stop text.
      count: tokens that belong to it: up to and with the one that ended it.
      ended: whether an end token or a stop text came.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        *,
        stop: Sequence[str] = (),
        end_tokens: Sequence[int] = (),
    ):
        """Begins after a prompt.

        Args:
          tokenizer: the model's.
          prompt: ids before the first new one.
          stop: texts that end the row, and are left out of it; see `stop_texts`.
          end_tokens: ids that end it.
        """
        self.text, self.count, self.ended = "", 0, False
        self._continuation = Continuation(tokenizer, prompt)
        self._held = ""
        self._stop = tuple(stop)
        added = _added_tokens(tokenizer) if stop else {}
        self._end_tokens = {*end_tokens, *(added[text] for text in stop if text in added)}

    def add(self, tokens: Sequence[int]) -> str:
        """Takes new tokens; returns the text that they add for good."""
        begun = len(self.text)
        for token in tokens:
            if self.ended:
                break
            self.count += 1
            if token in self._end_tokens:
                self.finish()
                self.ended = True
                break
            self._take(self._continuation.add(token))
        return self.text[begun:]

    def peek(self, tokens: Sequence[int]) -> str:
        """Returns the text that drafted tokens would add, to be shown until they are settled."""
        if self.ended:
            return ""
        text = (self._held + self._continuation.peek(tokens)).rstrip(UNFINISHED)
        at = self._find(text)
        return text if at is None else text[:at]

    def finish(self) -> str:
        """Returns the text that was held back, as nothing more will come."""
        begun = len(self.text)
        if not self.ended:
            self._take(self._continuation.finish())
        if not self.ended:
            self.text += self._held
            self._held = ""
        return self.text[begun:]

    def _take(self, text: str) -> None:
        self._held += text
        at = self._find(self._held)
        if at is not None:
            self.text += self._held[:at]
            self._held, self.ended = "", True
            return
        # What may be the beginning of a stop text waits for what follows.
        most = max(map(len, self._stop), default=1) - 1
        waits = next(
            (
                length
                for length in range(min(most, len(self._held)), 0, -1)
                if any(stop.startswith(self._held[-length:]) for stop in self._stop)
            ),
            0,
        )
        keep = len(self._held) - waits
        self.text += self._held[:keep]
        self._held = self._held[keep:]

    def _find(self, text: str) -> int | None:
        """Returns where the first stop text begins."""
        return min((text.find(stop) for stop in self._stop if stop in text), default=None)
