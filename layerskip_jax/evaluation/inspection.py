"""What every exit predicts at every position, and how many layers a token needs.

LayerSkip, section 3.1: most tokens are decided long before the last layer, and some change their
mind on the way. An exit's prediction is the token it likes best; nothing is drawn.
"""

import dataclasses
import functools
import keyword
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from tokenizers import Tokenizer

from layerskip_jax.data.packing import Rows
from layerskip_jax.data.text import UNFINISHED
from layerskip_jax.decoding.cache import read_head
from layerskip_jax.decoding.sampling import likeliest
from layerskip_jax.decoding.weights import DecoderWeights
from layerskip_jax.model.config import ModelConfig
from layerskip_jax.model.rope import rope_tables
from layerskip_jax.ops.attention import PackedAttention
from layerskip_jax.schema import require

# Positions whose logits exist at one time, and to whose multiple a text is padded, so that texts of
# about a length share a program.
CHUNK, BUCKET = 128, 64
TOP = 5

CLASSES = (
    "whitespace", "identifier", "keyword", "punctuation", "number", "word begin", "word inside",
    "other",
)  # fmt: skip


class ExitPredictions(NamedTuple):
    """The likeliest tokens of every exit, best first, of k tokens each.

    Attributes:
      tokens: their ids; [l] is of exit l + 1.
      probabilities: of each, in float32.
    """

    tokens: Int[Array, "L B S k"]
    probabilities: Float[Array, "L B S k"]


@functools.partial(jax.jit, static_argnames=("config", "top"))
def read_exits(
    weights: DecoderWeights,
    config: ModelConfig,
    tokens: Int[Array, "B S"],
    positions: Int[Array, "B S"],
    segment_ids: Int[Array, "B S"],
    *,
    top: int,
) -> ExitPredictions:
    """Runs all layers once and reads every exit, through its adapter where it has one.

    The logits of `CHUNK` positions of one exit exist at a time.

    Args:
      weights: the model's weights, on one device.
      config: its shapes.
      tokens: packed windows.
      positions: within each document.
      segment_ids: the document of each token; none sees another's.
      top: k, how many tokens to return of each.
    """
    batch, length = tokens.shape
    top = min(top, config.vocab_size)
    attend = PackedAttention(packing_mask=config.packing_mask)
    cos, sin = rope_tables(positions, config)

    def likeliest_of(chunk, exit_layer):
        logits = read_head(weights, chunk[None], exit_layer)[0]
        if top == 1:  # much faster than a top-k on a CPU
            best, values = likeliest(logits)[:, None], jnp.max(logits, axis=-1, keepdims=True)
        else:
            values, best = jax.lax.top_k(logits, top)
        total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        return best.astype(jnp.int32), jnp.exp(values - total)

    def read(x, exit_layer):
        rows = x.reshape(batch * length, -1)
        rows = jnp.pad(rows, ((0, -len(rows) % CHUNK), (0, 0)))
        chunks = rows.reshape(-1, CHUNK, rows.shape[-1])
        of_chunks = jax.lax.map(lambda chunk: likeliest_of(chunk, exit_layer), chunks)
        return tuple(
            part.reshape(-1, top)[: batch * length].reshape(batch, length, top)
            for part in of_chunks
        )

    x, found = weights.embedding[tokens], []
    for index, layer in enumerate(weights.layers):
        q, k, v = layer.project(x, cos, sin, config.num_kv_heads)
        split = q.shape[1:3]
        q = q.transpose(0, 3, 1, 2, 4).reshape(batch, length, config.num_heads, -1)
        attend = dataclasses.replace(attend, window=layer.kind.window)
        attended = attend(q, k.swapaxes(1, 2), v.swapaxes(1, 2), segment_ids)
        attended = attended.reshape(batch, length, *split, -1).transpose(0, 2, 3, 1, 4)
        x = layer.finish(x, attended)
        found.append(read(x, index + 1))
    ids, probabilities = zip(*found, strict=True)
    return ExitPredictions(jnp.stack(ids), jnp.stack(probabilities))


def inspect_tokens(
    weights: DecoderWeights, config: ModelConfig, tokens: Sequence[int], top: int = TOP
) -> ExitPredictions:
    """Returns what every exit predicts after each token of one text, as numpy, B = 1.

    Raises:
      ConfigError: no token, too many for the model, or one that it does not have.
    """
    count, most = len(tokens), config.max_sequence_length
    require(count > 0, "the prompt has no token; give it some text")
    require(
        count <= most,
        f"the prompt has {count:,} tokens, and the model was made for {most:,} "
        "(max_sequence_length); give it less text",
    )
    require(
        max(tokens) < config.vocab_size,
        f"the prompt holds token {max(tokens)}, and the model's embedding has "
        f"{config.vocab_size} rows; take the tokenizer that the model was trained with",
    )
    padded = jnp.zeros((1, -(-count // BUCKET) * BUCKET), jnp.int32)
    padded = padded.at[0, :count].set(jnp.asarray(tokens, jnp.int32))
    positions = jnp.arange(padded.shape[1], dtype=jnp.int32)[None]
    seen = read_exits(
        weights, config, padded, positions, jnp.ones_like(padded), top=top
    )  # what is padded comes after all of the text, which does not see it
    return ExitPredictions(*(np.asarray(part)[:, :, :count] for part in seen))


def first_agreement(choices: Int[np.ndarray, "L *N"]) -> Int[np.ndarray, "*N"]:
    """Returns d, the first exit E = 1..L whose token is the last layer's."""
    return np.argmax(choices == choices[-1], axis=0) + 1


def settled(choices: Int[np.ndarray, "L *N"]) -> Int[np.ndarray, "*N"]:
    """Returns s, the first exit from which on every exit's token is the last layer's."""
    differs = choices != choices[-1]
    layers = np.arange(1, len(choices) + 1).reshape(-1, *[1] * (choices.ndim - 1))
    return np.max(np.where(differs, layers, 0), axis=0) + 1


def changes_of_mind(choices: Int[np.ndarray, "L *N"]) -> Int[np.ndarray, "*N"]:
    """Returns for how many E < L the token of exit E is not that of exit E + 1."""
    return np.sum(choices[:-1] != choices[1:], axis=0)


def saving(mean: float, num_layers: int) -> float:
    """Returns the share of the layers that a perfect and free predictor would save, 1 - mean/L."""
    return 1 - mean / num_layers


def token_class(text: str) -> str:
    """Returns which of `CLASSES` a token is of, by its own text as it stands within a line.

    A name that prose would spell alike, such as `self`, is a word: the text of one token does not
    tell. `is` and `for` are keywords, in prose as well.

    - whitespace: nothing else in it.
    - keyword: one of Python's, a space before it or not.
    - number: begins with a digit, such as ` 12` or `0x`.
    - identifier: letters with an underscore, a digit, a capital after a small letter, or a mark
      before them: `_name`, `utf8`, `getValue`, `.join`. Underscores alone too.
    - word begin: letters after whitespace. Word inside: letters alone, or with the mark that
      prose has within words, as in `'s`.
    - punctuation: no letter and no digit.
    - other: a part of a character, and tokens without text.
    """
    bare = text.strip()
    if not text or UNFINISHED in text:
        return "other"
    if not bare:
        return "whitespace"
    if keyword.iskeyword(bare):
        return "keyword"
    if bare[0].isdigit():
        return "number"
    if bare.strip("_") == "":
        return "identifier"
    if not any(character.isalnum() for character in bare):
        return "punctuation"
    if re.fullmatch(r"['’-]?[^\W\d_]+", bare) and not re.search(r"[a-z][A-Z]", bare):
        return "word begin" if text[0].isspace() else "word inside"
    return "identifier"


def token_texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Returns the text of each token as it stands within a line, special tokens spelled out."""
    around = tokenizer.encode("a", add_special_tokens=False).ids
    before = tokenizer.decode(around, skip_special_tokens=False)
    joined = tokenizer.decode_batch([[*around, i] for i in ids], skip_special_tokens=False)
    return [text.removeprefix(before) for text in joined]


def classes_of_vocabulary(tokenizer: Tokenizer, size: int) -> Int[np.ndarray, "V"]:
    """Returns the index in `CLASSES` of each of V tokens; special tokens are `other`."""
    special = {i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special}
    names = map(token_class, token_texts(tokenizer, range(size)))
    other = CLASSES.index("other")
    return np.array([other if i in special else CLASSES.index(n) for i, n in enumerate(names)])


class LayersNeeded:
    """Counts of d, s and the changes of mind, by the class of the token that was to come."""

    def __init__(self, num_layers: int):
        """Begins with no token.

        Args:
          num_layers: L.
        """
        self.num_layers = num_layers
        shape = (len(CLASSES), num_layers)
        self._counts = {name: np.zeros(shape, np.int64) for name in _MEASURES}

    def add(self, choices: Int[np.ndarray, "L N"], classes: Int[np.ndarray, "N"]) -> None:
        """Counts tokens, given what each exit chose and the class of each."""
        for name, (measure, first) in _MEASURES.items():
            np.add.at(self._counts[name], (classes, measure(choices) - first), 1)

    def figures(self) -> dict:
        """Returns the figures, named for `--json`.

        `first_agreement` and `settled`: mean, saving and histogram, [E - 1] counts tokens that need
        E layers. `changes_of_mind`: mean and histogram, [n] counts tokens with n changes.
        `classes`: tokens and means of each class that came, the most frequent first.

        Raises:
          ConfigError: no token was counted.
        """
        tokens = int(self._counts["settled"].sum())
        require(tokens > 0, "the data hold no token to predict; prepare some text")
        values = {
            name: np.arange(self.num_layers) + first for name, (_, first) in _MEASURES.items()
        }
        found: dict = {"layers": self.num_layers, "tokens": tokens}
        for name, counts in self._counts.items():
            whole = counts.sum(axis=0)
            mean = float(whole @ values[name] / tokens)
            found[name] = {"mean": mean}
            if name != "changes_of_mind":
                found[name]["saving"] = saving(mean, self.num_layers)
            found[name]["histogram"] = whole.tolist()
        found["classes"] = []
        of_class = self._counts["settled"].sum(axis=1)
        for index in np.argsort(-of_class, kind="stable"):
            if of_class[index]:
                means = {
                    name: float(counts[index] @ values[name] / of_class[index])
                    for name, counts in self._counts.items()
                }
                found["classes"].append(
                    {"class": CLASSES[index], "tokens": int(of_class[index]), **means}
                )
        return found


# How each is computed, and the least that it can be.
_MEASURES = {
    "first_agreement": (first_agreement, 1),
    "settled": (settled, 1),
    "changes_of_mind": (changes_of_mind, 0),
}


def layers_needed(
    weights: DecoderWeights,
    config: ModelConfig,
    batches: Iterable[Rows],
    classes: Int[np.ndarray, "V"],
) -> dict:
    """Returns `LayersNeeded.figures` over the valid targets of packed windows.

    Args:
      weights: the model's weights, on one device.
      config: its shapes.
      batches: the windows, all of one shape.
      classes: of every token of the vocabulary, see `classes_of_vocabulary`.
    """
    counts = LayersNeeded(config.num_layers)
    for rows in batches:
        seen = read_exits(weights, config, rows.tokens, rows.positions, rows.segment_ids, top=1)
        valid: Bool[np.ndarray, "B S"] = np.asarray(rows.valid, bool)
        counts.add(np.asarray(seen.tokens)[:, valid, 0], classes[rows.targets[valid]])
    return counts.figures()
