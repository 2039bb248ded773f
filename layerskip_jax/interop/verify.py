"""Our tokens, logits and greedy tokens against those of `transformers`, exit by exit."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from tokenizers import Tokenizer

from layerskip_jax.data.text import encode_prompt
from layerskip_jax.decoding.cache import empty_cache, read_head, run_layers
from layerskip_jax.decoding.weights import DecoderWeights
from layerskip_jax.interop.pretrained import parse_json
from layerskip_jax.model.config import ModelConfig
from layerskip_jax.schema import UserError

# Texts that tokenizers cut differently by the least of their settings.
HARD_TEXTS = (
    "The cat sat on the mat.",
    "  two  spaces   three, and at the end  ",
    "def f(x):\n    if x:\n\treturn [x,  1]\n\n\n",
    "tab\there\r\nand a line of Windows",
    "1234567 3.14159 1,000,000 x2",
    "don't WON'T I'm you'll",
    "\U0001f642 \U0001f469\u200d\U0001f4bb\U0001f1e6\U0001f1fa",  # emoji, one of several points
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002 \u65e5\u672c\u8a9e\u306e\u6587 \ud55c\uad6d\uc5b4",  # CJK
    "caf\u00e9 \ufb01ne \u00a0 \u2581 \u00df",  # a ligature, and a space mark
    "\u0645\u0631\u062d\u0628\u0627 \u0928\u092e\u0938\u094d\u0924\u0947",
)
_MOST_SPECIAL_TOKENS = 16
_MOST_SCORES = 2**27  # that attention may have in memory, 512 MiB in float32
_MOST_POSITIONS = 256  # whose logits are compared; a head over all costs more than the layers


class TextDifference(NamedTuple):
    """A text whose ids differ.

    Attributes:
      text: what was encoded.
      ours: its ids here.
      theirs: those of `transformers.AutoTokenizer`.
    """

    text: str
    ours: list[int]
    theirs: list[int]


def compare_texts(tokenizer: Tokenizer, folder: Path) -> list[TextDifference]:
    """Encodes hard texts here and with the folder's `AutoTokenizer`.

    Texts are `HARD_TEXTS` and such as spell out the tokens added to the vocabulary, read as tokens;
    and what a text begins with is compared.

    Args:
      tokenizer: ours, as `load_tokenizer` reads it.
      folder: the model's.

    Raises:
      UserError: transformers is not installed, or it cannot load the tokenizer.
    """
    theirs = _auto_tokenizer(folder)
    special = Tokenizer.from_str(tokenizer.to_str())
    special.encode_special_tokens = False
    ours = [token.content for token in special.get_added_tokens_decoder().values()]
    # First what is said beside the tokenizer.json alone; a class adds some of its own unasked.
    names = dict.fromkeys([*(name for name in _said(folder) if name not in ours), *ours])
    names = list(names)[:_MOST_SPECIAL_TOKENS]
    texts = [*HARD_TEXTS, *(f"one {name}two{name} {name}\n" for name in names)]
    pairs = [
        (
            text,
            special.encode(text, add_special_tokens=False).ids,
            list(theirs(text, add_special_tokens=False)["input_ids"]),
        )
        for text in texts
    ]
    first = encode_prompt(tokenizer, "a")  # a document may end there with a token of its own
    pairs.append(("a", first, list(theirs("a")["input_ids"])[: len(first)]))
    return [TextDifference(*pair) for pair in pairs if pair[1] != pair[2]]


def _said(folder: Path) -> list[str]:
    """Returns the added tokens that tokenizer_config.json names."""
    file = folder / "tokenizer_config.json"
    settings = parse_json(file.read_bytes(), file) if file.is_file() else {}
    tokens = settings.get("added_tokens_decoder") or {}
    return [token["content"] for token in tokens.values()]


def _auto_tokenizer(folder: Path) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            f"comparing needs transformers ({error}); `pip install transformers`"
        ) from error
    try:
        return transformers.AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # the folder chooses the class, which raises what it will
        raise UserError(f"transformers cannot load the tokenizer in {folder}: {error}") from error


def longest_window(config: ModelConfig) -> int:
    """Returns how many tokens one pass can take: the model's context, where memory allows."""
    return min(config.max_sequence_length, math.isqrt(_MOST_SCORES // config.num_heads))


class ExitDifference(NamedTuple):
    """How far the logits of one exit are from those of `transformers`.

    Attributes:
      layers: E, the layers before the exit.
      largest: largest absolute difference of a logit.
      scale: largest absolute logit there.
      same_argmax: share of positions whose likeliest token is the same.
    """

    layers: int
    largest: float
    scale: float
    same_argmax: float

    def exceeds(self, tolerance: float) -> bool:
        """Whether the difference is more than `tolerance`, or that share of the largest logit."""
        return not self.largest <= tolerance * max(1.0, self.scale)


def exit_logits(
    weights: DecoderWeights,
    config: ModelConfig,
    tokens: Int[Array, "1 S"],
    at: Int[Array, "P"],
) -> Iterator[Float[Array, "P V"]]:
    """Yields the logits of every exit at positions `at`, from the first layer's to the last's."""
    positions = jnp.arange(tokens.shape[1])[None]

    @jax.jit  # one program for all layers of a kind
    def step(weights, x):
        cache = empty_cache(config, 1, *tokens.shape)
        x, _ = run_layers(weights, cache, x, positions, 0, 1)
        return x, read_head(weights, x[:, at])[0]

    x = weights.embedding[tokens]
    for layer in weights.layers:
        x, logits = step(weights._replace(layers=(layer,)), x)
        yield logits


def load_transformers(folder: Path) -> Any:
    """Loads the folder in `transformers`, in float32 on the CPU.

    Raises:
      UserError: PyTorch or transformers is not installed, or they cannot load it.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise UserError(
            f"comparing needs PyTorch and transformers ({error}); `pip install torch transformers`"
        ) from error
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"transformers cannot load {folder}: {error}") from error
    return model.eval()


def compare_exits(
    weights: DecoderWeights, config: ModelConfig, model: Any, tokens: np.ndarray
) -> list[ExitDifference]:
    """Compares every exit's logits: each layer's output through the final norm and the head.

    All positions are read, and the logits of up to 256 of them compared, spread from the first to
    the last.

    Args:
      weights: ours, float32.
      config: their shapes, to compute in float32.
      model: what `load_transformers` returned.
      tokens: to read, `[S]`.
    """
    import torch

    count = min(len(tokens), _MOST_POSITIONS)
    at = np.unique(np.linspace(0, len(tokens) - 1, count).round().astype(np.int32))
    ours = exit_logits(weights, config, jnp.asarray(tokens)[None], jnp.asarray(at))
    with torch.no_grad():
        ids = torch.from_numpy(tokens)[None].long()
        theirs = model.model(ids, output_hidden_states=True, use_cache=False)
        differences = []
        for layers, logits in enumerate(ours, start=1):
            if layers < config.num_layers:
                states = model.model.norm(theirs.hidden_states[layers][:, at])
            else:  # whose states come out normed
                states = theirs.last_hidden_state[:, at]
            other = model.lm_head(states)[0].numpy()
            logits = np.asarray(logits)
            differences.append(
                ExitDifference(
                    layers,
                    float(np.abs(logits - other).max()),
                    float(np.abs(other).max()),
                    float((logits.argmax(axis=-1) == other.argmax(axis=-1)).mean()),
                )
            )
    return differences


def greedy_tokens(model: Any, prompt: list[int], count: int) -> list[int]:
    """Returns `count` greedy tokens of `transformers`, whatever ends a text."""
    import torch

    ids = torch.tensor([prompt])
    with torch.no_grad():
        # Without a mask transformers would hide the tokens that it fills rows up with.
        ids = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False,
            max_new_tokens=count, min_new_tokens=count, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    return ids[0, len(prompt) :].tolist()
