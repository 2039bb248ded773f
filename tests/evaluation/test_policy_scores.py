"""One pass over whole texts, against plain forwards and against position after position."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layerskip_jax.decoding.exit_policy import POLICIES
from layerskip_jax.decoding.weights import ExitClassifier, decoder_weights
from layerskip_jax.evaluation.policy_scores import (
    CHUNK,
    first_sure,
    pad_length,
    read_exits,
    read_propagated,
)
from layerskip_jax.model.rope import rope_tables
from layerskip_jax.model.transformer import Transformer
from tests.helpers import small_model

EXITS, LENGTHS = (1, 3), (9, 6)
# Thresholds at which about half of the tokens of this model leave early.
THRESHOLDS = {
    "entropy": 0.93, "margin": 0.02, "saturation": 0.75, "patience": 2, "learned": 0.5
}  # fmt: skip


@functools.cache
def setup():
    """Returns a model, its weights with a classifier, and two padded texts."""
    config = small_model()
    model = Transformer(config, jax.random.key(0))
    w = jax.random.normal(jax.random.key(1), (config.model_dim,)) / 4
    weights = decoder_weights(model)._replace(classifier=ExitClassifier(w, jnp.float32(0.1)))
    tokens = np.zeros((2, pad_length(max(LENGTHS))), np.int32)
    for row, length in zip(tokens, LENGTHS, strict=True):
        row[:length] = np.random.default_rng(length).integers(1, config.vocab_size, length)
    return config, model, weights, jnp.asarray(tokens)


@functools.cache
def readings():
    config, _, weights, tokens = setup()
    found = read_exits(weights, tokens, config=config, exits=EXITS, policies=tuple(POLICIES))
    return jax.device_get(found)


def plain_states(row):
    """Returns the states of a text after each layer, by the training side's forward."""
    config, model, _, tokens = setup()
    ids = tokens[row : row + 1, : LENGTHS[row] - 1]
    inputs = model.row_inputs(jnp.arange(ids.shape[1])[None], jnp.ones_like(ids))
    return model.scan_layers(model.embed(ids), inputs, lambda c, _, x: (c, x), None)[1][:, 0]


def head(x):
    config, model, _, _ = setup()
    return np.asarray(model.final_norm(x) @ model.head_weight[:, : config.vocab_size], np.float64)


def softmax(logits):
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


@pytest.mark.parametrize("row", [0, 1])
def test_choices_losses_and_scores_are_those_of_a_plain_forward(row):
    config, model, weights, tokens = setup()
    states, length, found = plain_states(row), LENGTHS[row] - 1, readings()
    assert states.shape == (config.num_layers, length, config.model_dim)
    targets = tokens[row, 1 : length + 1]
    p = [softmax(head(states[exit_layer - 1])) for exit_layer in (*EXITS, config.num_layers)]
    for number, of_exit in enumerate(p):
        np.testing.assert_array_equal(found.choice[number, row, :length], of_exit.argmax(-1))
        loss = -np.log(of_exit[np.arange(length), targets])
        np.testing.assert_allclose(found.loss[number, row, :length], loss, atol=1e-4)
    for number, exit_layer in enumerate(EXITS):
        ranked, x = np.sort(p[number], -1), np.asarray(states[exit_layer - 1])
        entropy = -(p[number] * np.log(p[number])).sum(-1) / math.log(config.vocab_size)
        z = (
            np.asarray(model.final_norm(states[exit_layer - 1]))
            @ np.asarray(weights.classifier.weight)
            + 0.1
        )
        same = p[0].argmax(-1) == p[number].argmax(-1)
        before = np.asarray(states[EXITS[0] - 1])
        cosine = (x * before).sum(-1) / np.linalg.norm(x, axis=-1)
        wanted = {
            "entropy": entropy,
            "margin": ranked[:, -1] - ranked[:, -2],
            "saturation": cosine / np.linalg.norm(before, axis=-1) if number else -2.0,
            "patience": 1.0 + (same if number else 0),
            "learned": 1 / (1 + np.exp(-z)),
        }
        for name, scores in wanted.items():
            got = found.scores[name][number, row, :length]
            np.testing.assert_allclose(got, scores, atol=1e-4, err_msg=name)


def position_by_position(row, policy, threshold):
    """Returns layers, choice and loss of each position, run one token after another.

    Every layer keeps a list of keys and values; those a token skips are made from its exit state.
    """
    config, _, weights, tokens = setup()
    keys, values, found = [[] for _ in weights.layers], [[] for _ in weights.layers], []
    for position in range(LENGTHS[row] - 1):
        x = weights.embedding[tokens[row, position]][None, None]
        cos, sin = rope_tables(jnp.full((1, 1), position), config)
        left, streak, choice, before = None, 0, None, None
        for index, layer in enumerate(weights.layers):
            q, k, v = layer.project(x, cos, sin, config.num_kv_heads)
            keys[index].append(k[0, :, 0])
            values[index].append(v[0, :, 0])
            if left is not None:
                continue
            k, v = jnp.stack(keys[index], 1), jnp.stack(values[index], 1)
            logits = jnp.einsum("kgh,kth->kgt", q[0, :, :, 0], k) / math.sqrt(config.head_dim)
            attended = jnp.einsum("kgt,kth->kgh", jax.nn.softmax(logits), v)
            x = layer.finish(x, attended[None, :, :, None])
            if index + 1 not in (*EXITS, config.num_layers):
                continue
            p, last = softmax(head(x[0, 0])), choice
            choice = int(p.argmax())
            streak = streak + 1 if choice == last else 1
            ranked, now = np.sort(p), np.asarray(x[0, 0])
            score = {
                "entropy": -(p * np.log(p)).sum() / math.log(config.vocab_size),
                "margin": ranked[-1] - ranked[-2],
                "saturation": -2.0 if before is None
                else now @ before / np.linalg.norm(now) / np.linalg.norm(before),
                "patience": streak,
                "learned": float(weights.classifier(weights.final_norm(x))[0, 0]),
            }[policy]  # fmt: skip
            before = now
            sure = {"entropy": score < threshold, "patience": score >= threshold}
            if index + 1 == config.num_layers or sure.get(policy, score > threshold):
                left = (index + 1, choice, -math.log(p[tokens[row, position + 1]]))
        found.append(left)
    return found


@pytest.mark.parametrize("policy", POLICIES)
def test_a_propagated_pass_is_what_one_position_after_another_gives(policy):
    config, _, weights, tokens = setup()
    threshold = THRESHOLDS[policy]
    found = jax.device_get(
        read_propagated(
            weights,
            tokens,
            jnp.float32(threshold),
            config=config,
            exits=EXITS,
            policy=policy,
        )
    )
    layers = []
    for row, length in enumerate(LENGTHS):
        wanted = position_by_position(row, policy, threshold)
        part = [array[row, : length - 1] for array in found]
        assert part[0].tolist() == [left[0] for left in wanted]
        assert part[1].tolist() == [left[1] for left in wanted]
        np.testing.assert_allclose(part[2], [left[2] for left in wanted], atol=1e-4)
        layers += part[0].tolist()
    assert len(set(layers)) > 1  # or the threshold shows nothing


def test_a_token_leaves_at_the_first_candidate_that_is_sure():
    scores = np.array([[0.5, 0.1, 0.9, 0.2], [0.1, 0.3, 0.1, 0.2]], np.float32)
    assert first_sure(scores, 0.2, "entropy").tolist() == [1, 0, 1, 2]  # below, 0.2 is not
    assert first_sure(scores, 0.2, "margin").tolist() == [0, 1, 0, 2]  # above, nor here
    streaks = np.array([[1, 1], [2, 1]], np.float32)
    assert first_sure(streaks, 2, "patience").tolist() == [1, 2]  # at least


def test_rows_are_padded_to_whole_chunks():
    assert [pad_length(n) for n in (2, CHUNK + 1, CHUNK + 2)] == [
        CHUNK + 1, CHUNK + 1, 2 * CHUNK + 1
    ]  # fmt: skip
