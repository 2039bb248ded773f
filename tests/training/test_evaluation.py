import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layerskip_jax.commands.evaluate import evaluate
from layerskip_jax.model.definition import ModelDefinition
from layerskip_jax.schema import UserError
from layerskip_jax.training.evaluation import evaluate_exits, make_exit_scorer, not_finite
from layerskip_jax.training.step import Batch
from tests.helpers import random_batch, small_model


def test_every_exit_is_scored_as_its_logits_say():
    definition = ModelDefinition(small_model())
    parameters = definition.init(jax.random.key(0))
    batches = [random_batch(seed, rows=4) for seed in (0, 1)]
    scorer = make_exit_scorer(definition, chunk=5)
    on_device = [Batch(*(jnp.asarray(a)[None] for a in batch)) for batch in batches]
    result = evaluate_exits(scorer, parameters, on_device)
    assert [entry["layers"] for entry in result] == [1, 2, 3, 4]

    model = definition.model(parameters)
    losses = np.zeros(4)
    for batch in batches:
        batch = Batch(*map(jnp.asarray, batch))
        rows = model.row_inputs(batch.positions, batch.segment_ids)
        x = model.embed(batch.tokens)
        for layer in range(4):
            x = jax.tree.map(lambda w, l=layer: w[l], model.layers)(x, *rows)
            log_p = jax.nn.log_softmax(model.final_norm(x) @ model.head_weight)
            picked = jnp.take_along_axis(log_p, batch.targets[..., None], axis=-1)[..., 0]
            losses[layer] -= float((picked * batch.valid).sum())
    losses /= sum(int(batch.valid.sum()) for batch in batches)
    np.testing.assert_allclose([entry["loss"] for entry in result], losses, rtol=1e-5)
    np.testing.assert_allclose([entry["perplexity"] for entry in result], np.exp(losses), rtol=1e-4)


def test_a_loss_that_is_not_finite_is_told_and_a_large_one_has_no_perplexity():
    def score(parameters, batch):
        return np.array([2.0, np.nan, 3000.0, np.inf]), 2

    exits = evaluate_exits(score, {}, [None])
    assert not_finite(exits) == [2, 4]
    assert [entry["perplexity"] for entry in exits[::2]] == [math.e, math.inf]


def test_evaluate_refuses_a_loss_that_is_not_finite(finished, monkeypatch):
    exits = [{"layers": 3, "loss": math.nan, "perplexity": math.nan}]
    monkeypatch.setattr("layerskip_jax.commands.evaluate.evaluate_exits", lambda *_: exits)
    with pytest.raises(UserError, match=r"step 12: the loss of the exits 3 .* not finite in float"):
        evaluate(finished)


def test_the_batching_does_not_change_the_result():
    definition = ModelDefinition(small_model())
    parameters = definition.init(jax.random.key(0))
    scorer = make_exit_scorer(definition, chunk=12)
    batch = random_batch(0, rows=6)
    whole = evaluate_exits(scorer, parameters, [Batch(*(jnp.asarray(a)[None] for a in batch))])
    parts = [
        Batch(*(jnp.asarray(a[rows])[None] for a in batch)) for rows in (slice(0, 2), slice(2, 6))
    ]
    np.testing.assert_allclose(
        [e["loss"] for e in evaluate_exits(scorer, parameters, parts)],
        [e["loss"] for e in whole],
        rtol=1e-6,
    )
