"""The documents of prepared data, one by one, put together again from the packed windows."""

import numpy as np

from layerskip_jax.data.batches import BatchSource
from layerskip_jax.schema import require_count


def first_tokens(
    data: str, split: str, length: int, *, count: int | None = None, on_damaged: str = "stop"
) -> list[list[int]]:
    """Returns the first tokens of documents, one text for each document, its end token included.

    Documents come in the order in which `prepare` wrote them, which is drawn by a hash.

    Args:
      data: prepared data.
      split: `train` or `validation`.
      length: the most tokens of each; a shorter document gives what it has, one of a single token
        none.
      count: the most texts; None takes all documents.
      on_damaged: as `config.data.on_damaged`. A document that reaches into a damaged window that is
        skipped ends before it; the rest of it is left out.

    Raises:
      ConfigError: `length` or `count` is too small.
      UserError: the data are damaged.
    """
    require_count("--tokens", length, 2)
    if count is not None:
        require_count("--texts", count, 1)
    source = BatchSource(
        data, split, batch_size=1, seed=0, shuffle=False, skip_damaged=on_damaged == "skip"
    )
    begun = source.manifest.split(split).unit_starts
    texts: list[list[int]] = []
    text: list[int] | None = None  # what the open document has so far; None where none is known
    for number in range(source.num_windows):
        rows = source.batch(number)
        # The window with its last target, which the next window begins with.
        tokens = np.append(rows.tokens[0], rows.targets[0, -1:])
        segments = np.append(rows.segment_ids[0], 0)
        if rows.valid[0, -1]:
            segments[-1] = segments[-2]
        elif segments[-2] > 0:
            segments[-1] = segments[-2] + 1  # a document begins there, or the padding
        if not segments.any():
            text = None
            continue
        for segment in range(1, int(segments.max()) + 1):
            part = tokens[segments == segment]
            if segment > 1 or number in begun or source.whole_documents:
                text = []
                texts.append(text)
            elif number > 0:
                part = part[1:]  # which the window before ended with
            if text is not None:
                text.extend(part[: length - len(text)].tolist())
        enough = count is not None and (
            len(texts) > count or (len(texts) == count and len(texts[-1]) == length)
        )
        if enough:
            break
    return [text for text in texts if len(text) > 1][:count]
