import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layerskip_jax.decoding import weights as decoding_weights
from layerskip_jax.decoding.weights import (
    MOST_PANEL_ROWS,
    PANEL,
    _laid_out,
    decoder_weights,
    in_panels,
)
from layerskip_jax.generation.generator import Generator
from layerskip_jax.model.transformer import Transformer
from layerskip_jax.schema import UserError
from tests.helpers import small_model


@pytest.mark.parametrize("rows", [1, 3, MOST_PANEL_ROWS + 1])
def test_a_matrix_in_panels_multiplies_as_the_whole_does(rows):
    outputs = 2 * PANEL + 5  # the last panel is padded
    x = jax.random.normal(jax.random.key(0), (rows, 12))
    whole = jax.random.normal(jax.random.key(1), (12, outputs))
    panels = in_panels(whole)
    assert panels.values.shape == (3, 12, PANEL)
    np.testing.assert_allclose(panels(x[None])[0], x @ whole, rtol=1e-5, atol=1e-6)
    some = jnp.array([2, 40, outputs - 1])
    np.testing.assert_allclose(panels.of_outputs(some)(x), x @ whole[:, some], rtol=1e-5, atol=1e-6)


def test_only_small_matrices_lie_in_panels(monkeypatch):
    model = Transformer(small_model(tie_embeddings=True), jax.random.key(0))
    lay_out = _laid_out.__wrapped__  # uncompiled, as a compiled one keeps the limit
    weights, _ = lay_out(model, panels=True)
    assert all(layer.down.outputs == model.config.model_dim for layer in weights.layers)
    assert weights.head.outputs == model.config.vocab_size
    monkeypatch.setattr(decoding_weights, "MOST_PANEL_BYTES", model.embedding.nbytes - 1)
    weights, _ = lay_out(model, panels=True)
    assert weights.head is None  # a tied head that is whole is the embedding itself
    assert weights.layers[0].output.outputs == model.config.model_dim


@pytest.mark.parametrize(
    "name, index, dtype, message",
    [
        ("embedding", (5, 0), "float32", "the parameter embedding holds a number"),
        ("mlp.up", (2, 0, 0), "float32", "layers.mlp.up of layer 2 .* not finite in float32"),
        ("attention_norm.scale", (3, 1), "bfloat16", "layers.attention_norm.scale of layer 3"),
    ],
)
def test_a_weight_that_is_not_finite_is_named(name, index, dtype, message):
    model = Transformer(small_model(dtype=dtype), jax.random.key(0))
    decoder_weights(model)
    parameter = operator.attrgetter(name)(model if name == "embedding" else model.layers)
    # The largest float32 is infinite in bfloat16.
    bad = jnp.nan if dtype == "float32" else jnp.finfo(jnp.float32).max
    parameter[...] = parameter[...].at[index].set(bad)
    with pytest.raises(UserError, match=message):
        decoder_weights(model)


def test_decoding_from_panels_gives_the_tokens_of_whole_matrices(monkeypatch):
    model = Transformer(small_model(), jax.random.key(0))
    prompts = [[5], [7, 9, 11, 2, 60, 3, 3]]
    pair = {"mode": "self_speculative", "exit_layer": 2, "draft_length": 2}
    tokens = {}
    for panels in (False, True):
        monkeypatch.setattr(
            "layerskip_jax.generation.generator.pays_for_panels", lambda _, panels=panels: panels
        )
        generator = Generator(model, draft_tokens=range(0, 64, 2))
        assert (generator.weights.layers[0].qkv.outputs is not None) == panels
        assert (generator.weights.draft_head.matrix.outputs is not None) == panels
        plain, drafted = (generator.generate(prompts, 6, **mode) for mode in ({}, pair))
        assert drafted.tokens == plain.tokens
        tokens[panels] = plain.tokens
    assert tokens[True] == tokens[False]
