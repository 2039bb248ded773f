"""Our logits and greedy tokens against those of `transformers`, on one folder, exit by exit."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from layerskip_jax.decoding.cache import empty_cache, read_head, run_layers
from layerskip_jax.decoding.weights import DecoderWeights
from layerskip_jax.model.config import ModelConfig
from layerskip_jax.schema import UserError


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
    weights: DecoderWeights, config: ModelConfig, tokens: Int[Array, "1 S"]
) -> Iterator[Float[Array, "S V"]]:
    """Yields the logits of every exit, from the first layer's to the last one's."""
    positions = jnp.arange(tokens.shape[1])[None]

    @jax.jit  # one program for all layers, which are alike
    def step(weights, x):
        cache = empty_cache(config, 1, *tokens.shape)
        x, _ = run_layers(weights, cache, x, positions, 0, 1)
        return x, read_head(weights, x)[0]

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

    Args:
      weights: ours, float32.
      config: their shapes, to compute in float32.
      model: what `load_transformers` returned.
      tokens: to read, `[S]`.
    """
    import torch

    ours = exit_logits(weights, config, jnp.asarray(tokens)[None])
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens)[None].long(), output_hidden_states=True)
        differences = []
        for layers, logits in enumerate(ours, start=1):
            if layers < config.num_layers:
                states = model.model.norm(theirs.hidden_states[layers])
                other = model.lm_head(states)[0].numpy()
            else:  # whose states come out normed
                other = theirs.logits[0].numpy()
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
