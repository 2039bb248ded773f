import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layerskip_jax.decoding import weights as decoding_weights
from layerskip_jax.decoding.weights import MOST_PANEL_ROWS, PANEL, decoder_weights, in_panels
from layerskip_jax.generation.generator import Generator
from layerskip_jax.model.transformer import Transformer
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
    lay_out = decoder_weights.__wrapped__  # uncompiled, as a compiled one keeps the limit
    weights = lay_out(model, panels=True)
    assert all(layer.down.outputs == model.config.model_dim for layer in weights.layers)
    assert weights.head.outputs == model.config.vocab_size
    monkeypatch.setattr(decoding_weights, "MOST_PANEL_BYTES", model.embedding.nbytes - 1)
    weights = lay_out(model, panels=True)
    assert weights.head is None  # a tied head that is whole is the embedding itself
    assert weights.layers[0].output.outputs == model.config.model_dim


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
