"""What the relatives of Llama do otherwise: norms, windows, layers without positions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layerskip_jax.model.config import LayerKind, ModelConfig
from layerskip_jax.model.definition import ModelDefinition
from layerskip_jax.model.layers import HeadsNorm, KindedBlock
from layerskip_jax.model.transformer import Transformer
from layerskip_jax.schema import ConfigError
from layerskip_jax.training.flops import CostModel
from tests.helpers import random_batch, small_model, small_run

# By family, what differs from Llama; the last three have layers of several kinds.
FAMILIES = {
    "qwen3": {"qk_norm": "head", "head_dim": 6},
    "olmo2": {"qk_norm": "all", "norm_position": "after"},
    "mistral": {"sliding_window": 3},
    "smollm3": {"no_rope_every": 3},
    "qwen3 with windows": {"qk_norm": "head", "sliding_window": 3, "full_attention_every": 2},
    "all at once": {
        "qk_norm": "all", "norm_position": "after", "sliding_window": 3,
        "full_attention_every": 3, "no_rope_every": 2,
    },
}  # fmt: skip


def test_which_layers_differ_by_hand():
    config = small_model(
        num_layers=6, sliding_window=9, full_attention_every=3, no_rope_every=2,
        norm_position="after",
    )  # fmt: skip
    windows, rotary = zip(*((k.window, k.rotary) for k in config.layer_kinds), strict=True)
    assert windows == (9, 9, 0, 9, 9, 0)
    assert rotary == (True, False, True, False, True, False)
    assert all(kind.norm_after for kind in config.layer_kinds)
    assert set(small_model(num_layers=6).layer_kinds) == {LayerKind()}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"qk_norm": "heads"}, "qk_norm='heads' is not one of none, head, all"),
        ({"norm_position": "both"}, "norm_position='both' is not one of before, after"),
        ({"sliding_window": -1}, "sliding_window=-1 must be at least 0"),
        ({"no_rope_every": -2}, "no_rope_every=-2 must be at least 0"),
        ({"full_attention_every": 4}, "full_attention_every=4 .*sliding_window=0; .* both to 0"),
        ({"full_attention_every": 1, "sliding_window": 8}, "full_attention_every=1 lets every"),
    ],
)
def test_a_family_that_there_is_not_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**changes)


def test_norms_of_heads_by_hand():
    x = jnp.array([[[[3.0, 4.0], [0.0, 2.0]]]])  # two heads of two
    each = HeadsNorm((2,), ("head_dim",), 0.0)
    each.scale[...] = jnp.array([1.0, 10.0])
    root = 12.5**0.5
    np.testing.assert_allclose(each(x)[0, 0], [[3 / root, 40 / root], [0, 20 / 2**0.5]], rtol=1e-6)
    all_of_them = HeadsNorm((2, 2), ("heads", "head_dim"), 0.0)
    all_of_them.scale[...] = jnp.array([[1.0, 1.0], [1.0, 10.0]])
    root = (29 / 4) ** 0.5
    np.testing.assert_allclose(
        all_of_them(x)[0, 0], [[3 / root, 4 / root], [0, 20 / root]], rtol=1e-6
    )


def _random(config):
    """A model whose every parameter is drawn, scales of norms too."""
    definition = ModelDefinition(config)
    leaves, tree = jax.tree.flatten(definition.shapes)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    drawn = [0.5 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    return definition, jax.tree.unflatten(tree, drawn)


def _one_by_one(model: Transformer, x, rows):
    """Runs the layers one after another, each of its own kind."""
    for index, kind in enumerate(model.config.layer_kinds):
        block = jax.tree.map(lambda stacked, i=index: stacked[i], model.layers)
        x = KindedBlock(block, kind)(x, *rows)
    return x


@pytest.mark.parametrize("family", FAMILIES)
def test_scanned_layers_are_those_that_run_one_by_one(family):
    """And so are their gradients: a kind that is scanned over chooses as one that is known."""
    definition, parameters = _random(small_model(num_layers=6, **FAMILIES[family]))
    batch = random_batch(0, rows=2)
    tokens, positions, segments = (
        jnp.asarray(x).reshape(-1, x.shape[-1])
        for x in (batch.tokens, batch.positions, batch.segment_ids)
    )

    @jax.jit
    def both(parameters):
        def scanned(parameters):
            model = definition.model(parameters)
            x, rows = model.embed(tokens), model.row_inputs(positions, segments)
            x, _ = model.scan_layers(x, rows, lambda _, __, x: (x, None), x)
            return jnp.sum(x * jnp.cos(jnp.arange(x.size).reshape(x.shape)))

        def one_by_one(parameters):
            model = definition.model(parameters)
            x = _one_by_one(model, model.embed(tokens), model.row_inputs(positions, segments))
            return jnp.sum(x * jnp.cos(jnp.arange(x.size).reshape(x.shape)))

        return jax.value_and_grad(scanned)(parameters), jax.value_and_grad(one_by_one)(parameters)

    (value, gradients), (expected, wanted) = both(parameters)
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * float(jnp.abs(b).max() + 1e-6))


def test_a_window_hides_what_is_further_away():
    """Through L layers a token knows of L (w - 1) before it, unless a layer sees all."""
    tokens = jnp.arange(20)[None]
    changed = tokens.at[0, 2].set(50)
    positions, segments = jnp.arange(20)[None], jnp.ones((1, 20), jnp.int32)
    for every, reach in ((0, 2 + 4 * 3), (4, 19)):
        config = small_model(num_layers=4, sliding_window=4, full_attention_every=every)
        model = Transformer(config, jax.random.key(0))
        first, second = (model.logits(ids, positions, segments)[0] for ids in (tokens, changed))
        known = np.flatnonzero(np.abs(first - second).max(axis=1))
        assert (known.min(), known.max()) == (2, reach)


def test_flops_of_a_window_by_hand():
    """Of 8 tokens with a window of 3: 1 + 2 + 6 * 3 pairs, where all see 36."""
    run = small_run(model=small_model(num_layers=4, attention="splash"))
    windowed = dataclasses.replace(run, model=dataclasses.replace(run.model, sliding_window=3))
    mixed = dataclasses.replace(
        run, model=dataclasses.replace(windowed.model, full_attention_every=2)
    )
    whole, some, half = (CostModel(r, 8).plain().attention for r in (run, windowed, mixed))
    assert some / whole == pytest.approx(21 / 36)
    assert half / whole == pytest.approx((21 + 36) / 72)
    long_window = dataclasses.replace(run.model, sliding_window=8)
    assert CostModel(dataclasses.replace(run, model=long_window), 8).plain().attention == whole
