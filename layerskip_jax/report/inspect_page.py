"""What every exit predicts after every token of a text, as one page that needs nothing beside it.

The cells are data, and a browser makes only those that are looked at: 160,000 of them at once would
stop a phone. For printing all are made.
"""

import base64
import importlib.resources
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jinja2
import numpy as np
from jaxtyping import Int
from markupsafe import Markup
from tokenizers import Tokenizer

from layerskip_jax.evaluation.inspection import (
    ExitPredictions,
    first_agreement,
    settled,
    token_texts,
)
from layerskip_jax.run_folder.atomic import named_writes, write_text
from layerskip_jax.run_folder.object_store import require_local
from layerskip_jax.schema import require

# More of the same white space than this is counted, not shown one by one.
LONGEST_RUN = 4
# Probabilities in the page are whole numbers of 1 / SCALE.
SCALE = 10_000
_WHITE = {" ": "·", "\n": "↵", "\t": "⇥", "\r": "␍"}


class Inspected(NamedTuple):
    """A text and what every exit predicts after each of its tokens.

    Attributes:
      tokens: of the text.
      predictions: of all exits, B = 1, as numpy.
    """

    tokens: list[int]
    predictions: ExitPredictions

    @property
    def choices(self) -> Int[np.ndarray, "L S"]:
        """The likeliest token of each exit at each position."""
        return np.asarray(self.predictions.tokens)[:, 0, :, 0]

    def means(self) -> tuple[float, float]:
        """Returns the means of d and s over the text."""
        return float(first_agreement(self.choices).mean()), float(settled(self.choices).mean())


def visible(text: str) -> str:
    """Returns a token's text with every character to be seen, none that a terminal would obey."""
    parts, index = [], 0
    while index < len(text):
        character = text[index]
        run = len(text[index:]) - len(text[index:].lstrip(character))
        if character in _WHITE:
            mark = _WHITE[character]
            parts.append(mark * run if run <= LONGEST_RUN else f"{mark}×{run}")
        else:
            shown = character if character.isprintable() else ascii(character)[1:-1]
            parts.append(shown * run)
        index += run
    return "".join(parts) or "∅"


def visible_texts(tokenizer: Tokenizer, texts: Sequence[Inspected]) -> dict[int, str]:
    """Returns what is shown of each token that occurs in these texts or their predictions."""
    ids = {i for text in texts for i in text.tokens}
    ids |= {int(i) for text in texts for i in np.unique(np.asarray(text.predictions.tokens))}
    ordered = sorted(ids)
    return dict(zip(ordered, map(visible, token_texts(tokenizer, ordered)), strict=True))


def write_inspect_page(
    path: str | Path, name: str, tokenizer: Tokenizer, texts: Sequence[Inspected]
) -> Path:
    """Writes the page and returns its path.

    Args:
      path: of the page, here.
      name: of the model.
      tokenizer: the model's.
      texts: at least one.

    Raises:
      UserError: it cannot be written.
    """
    require_local(path, "--output")
    with named_writes(Path(path)):
        write_text(Path(path), build_inspect_page(name, tokenizer, texts))
    return Path(path)


def build_inspect_page(name: str, tokenizer: Tokenizer, texts: Sequence[Inspected]) -> str:
    """Returns the whole page as HTML; see `write_inspect_page`."""
    require(len(texts) > 0, "there is no text to show")
    shown = visible_texts(tokenizer, texts)
    place = {token: index for index, token in enumerate(shown)}
    wide = len(shown) > np.iinfo(np.uint16).max
    data = {"scale": SCALE, "wide": wide, "words": list(shown.values()), "texts": []}
    sentences = []
    for text in texts:
        layers, _, count, top = text.predictions.tokens.shape
        # Token by token, since a block of the page holds all layers of some tokens.
        ids = np.asarray(text.predictions.tokens)[:, 0].transpose(1, 0, 2)
        index = np.vectorize(place.get, otypes=[np.uint32 if wide else np.uint16])(ids)
        p = np.asarray(text.predictions.probabilities)[:, 0].transpose(1, 0, 2)
        d, s = text.means()
        sentences.append(
            f"{count:,} token{'s' * (count > 1)}, {layers} layers. On average an exit first agrees "
            f"with the last layer at layer {d:.2f}, and all exits do from layer {s:.2f} on."
        )
        data["texts"].append(
            {
                "layers": layers,
                "count": count,
                "top": top,
                "read": [place[token] for token in text.tokens],
                "index": _packed(index),
                "p": _packed(np.round(p * SCALE).astype(np.uint16)),
            }
        )
    files = importlib.resources.files(__package__)
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string((files / "inspect.html.jinja").read_text(encoding="utf-8"))
    return template.render(
        name=name,
        css=(files / "inspect.css").read_text(encoding="utf-8"),
        script=(files / "inspect.js").read_text(encoding="utf-8"),
        sentences=sentences,
        data=_in_script(data),
    )


def _packed(numbers: np.ndarray) -> str:
    """Returns whole numbers, little-endian, in base64."""
    return base64.b64encode(numbers.astype(numbers.dtype.newbyteorder("<")).tobytes()).decode()


def _in_script(value: dict) -> Markup:
    """Returns JSON that can stand in a `<script>`: no character of it ends or begins a tag."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)
