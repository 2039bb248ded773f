import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layerskip_jax.model.config import ModelConfig, RopeScaling
from layerskip_jax.model.layers import RMSNorm
from layerskip_jax.model.rope import apply_rope, rope_frequencies, rope_tables
from layerskip_jax.model.transformer import Transformer
from layerskip_jax.schema import SMALLEST_FLOAT32, ConfigError
from tests.helpers import small_model

LARGEST = float(np.finfo(np.float32).max)


def _whole(length, rows=1):
    positions = jnp.tile(jnp.arange(length), (rows, 1))
    return positions, jnp.ones((rows, length), jnp.int32)


@pytest.mark.parametrize("tied", [False, True])
def test_packed_documents_have_the_logits_they_have_alone(tied):
    model = Transformer(small_model(tie_embeddings=tied), jax.random.key(0))
    lengths = [5, 1, 9, 3]
    keys = jax.random.split(jax.random.key(1), len(lengths))
    documents = [jax.random.randint(k, (1, n), 0, 64) for k, n in zip(keys, lengths, strict=True)]
    alone = [model.logits(d, *_whole(d.shape[1])) for d in documents]
    positions = jnp.concatenate([jnp.arange(n) for n in lengths])[None]
    segments = jnp.concatenate([jnp.full(n, i + 1) for i, n in enumerate(lengths)])[None]
    packed = model.logits(jnp.concatenate(documents, axis=1), positions, segments)
    np.testing.assert_allclose(packed, jnp.concatenate(alone, axis=1), atol=2e-5)


def test_no_position_sees_a_later_one():
    model = Transformer(small_model(), jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 8), 0, 64)
    changed = tokens.at[:, 5].set((tokens[:, 5] + 1) % 64)
    a, b = (model.logits(t, *_whole(8, 2)) for t in (tokens, changed))
    np.testing.assert_array_equal(a[:, :5], b[:, :5])
    assert (jnp.abs(a[:, 5:] - b[:, 5:]).max(axis=-1) > 1e-4).all()


def test_logits_depend_on_relative_positions_only():
    model = Transformer(small_model(), jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (1, 8), 0, 64)
    positions, segments = _whole(8)
    np.testing.assert_allclose(
        model.logits(tokens, positions, segments),
        model.logits(tokens, positions + 37, segments),
        atol=2e-5,
    )


def test_rope_rotates_the_first_pair_by_the_position_in_radians():
    cos, sin = rope_tables(jnp.array([[2]]), ModelConfig(num_heads=1, model_dim=4, num_kv_heads=1))
    x = jnp.array([1.0, 0.0, 0.0, 0.0]).reshape(1, 1, 1, 4)
    np.testing.assert_allclose(
        apply_rope(x, cos, sin).ravel(), [np.cos(2), 0, np.sin(2), 0], atol=1e-6
    )
    # the second pair turns theta^(-1/2) = 100 times slower
    np.testing.assert_allclose(cos.ravel(), [np.cos(2), np.cos(0.02)], atol=1e-6)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_exit_states_are_the_outputs_of_their_layers(remat):
    config = small_model(remat=remat)
    model = Transformer(config, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 6), 0, 64)
    rows = model.row_inputs(*_whole(6, 2))
    x = model.embed(tokens)
    early, last = model.exit_states(x, rows, jnp.array([2, 0, 1, 2]), 2)
    picked = jnp.array([[1], [4]])
    some, _ = model.exit_states(x, rows, jnp.array([2, 0, 1, 2]), 2, positions=picked)
    outputs = []
    for layer in range(4):
        x = jax.tree.map(lambda w, l=layer: w[l], model.layers)(x, *rows)
        outputs.append(x)
    np.testing.assert_allclose(early, jnp.stack(outputs[1:3]), atol=1e-5)
    np.testing.assert_array_equal(some, early[:, :, picked[:, 0]])
    np.testing.assert_allclose(last, outputs[3], atol=1e-5)


@pytest.mark.parametrize("positions", [None, jnp.array([[0], [3]]), jnp.array([[0, 3]])])
def test_gradients_of_exits_reach_the_layers_below_them(positions):
    """Against a loop that differentiates each exit by itself."""
    model = Transformer(small_model(), jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 6), 0, 64)
    weights = jax.random.normal(jax.random.key(2), (2, 2, 6, 32))
    positions_ = jnp.arange(6) if positions is None else positions.reshape(-1)

    def kept(model):
        rows = model.row_inputs(*_whole(6, 2))
        slots = jnp.array([1, 0, 1, 1])
        early, last = model.exit_states(model.embed(tokens), rows, slots, 1, positions=positions)
        return jnp.sum(early[0] * weights[0][:, positions_]) + jnp.sum(last * weights[1])

    def looped(model):
        rows, x, total = model.row_inputs(*_whole(6, 2)), model.embed(tokens), 0.0
        for layer in range(4):
            x = jax.tree.map(lambda w, l=layer: w[l], model.layers)(x, *rows)
            if layer == 1:
                total += jnp.sum(x[:, positions_] * weights[0][:, positions_])
        return total + jnp.sum(x * weights[1])

    (a, da), (b, db) = (jax.value_and_grad(f)(model) for f in (kept, looped))
    np.testing.assert_allclose(a, b, rtol=1e-5)
    for x, y in zip(jax.tree.leaves(da), jax.tree.leaves(db), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)


def test_bfloat16_computes_in_bfloat16_with_float32_parameters():
    model = Transformer(small_model(dtype="bfloat16"), jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {jnp.dtype(jnp.float32)}
    assert model.embed(jnp.zeros((1, 2), jnp.int32)).dtype == jnp.bfloat16
    twin = Transformer(small_model(), jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 8), 0, 64)
    a, b = (m.logits(tokens, *_whole(8, 2)) for m in (model, twin))
    assert a.dtype == jnp.float32
    assert jnp.linalg.norm(a - b) < 0.03 * jnp.linalg.norm(b)


def test_first_losses_are_near_ln_v():
    """At initialisation no token is favoured by much at any width."""
    model = Transformer(small_model(model_dim=64, vocab_size=512), jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (4, 32), 0, 512)
    logits = model.logits(tokens, *_whole(32, 4))
    assert 0.5 < logits.std() < 1.5


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_kv_heads": 3}, "num_kv_heads=3 must divide num_heads=4"),
        ({"num_heads": 5, "num_kv_heads": 5}, "num_heads=5 must divide model_dim=32"),
        ({"head_dim": 7}, "head_dim=7 must be positive and even"),
        ({"num_layers": 0}, "num_layers=0 must be at least 1"),
        ({"dtype": "float8"}, "dtype='float8' is not one of float32, bfloat16"),
        ({"remat": "dot"}, "remat='dot' is not one of .* Did you mean 'dots'"),
        ({"attention": "flash"}, "attention='flash' is not one of auto, xla, splash"),
        ({"rope_theta": 0.5}, "rope_theta=0.5"),
    ],
)
def test_bad_shapes_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        small_model(**changes)


@pytest.mark.parametrize(
    "theta, scaling",
    [
        (LARGEST, RopeScaling()),
        (1 + 2**-23, RopeScaling()),
        (1e4, RopeScaling("linear", LARGEST)),
        (1e4, RopeScaling("llama3", LARGEST, 2 * SMALLEST_FLOAT32, LARGEST, 2**31 - 1)),
        (1e4, RopeScaling("llama3", 8.0, 1.0, 1 + 2**-23, 1)),
    ],
)
def test_rotary_frequencies_at_the_ends_of_their_ranges(theta, scaling):
    """Against the formula in float64; 2**31 times less than 1e-25 is no angle."""
    config = small_model(head_dim=8, rope_theta=theta, rope_scaling=scaling)
    exact = theta ** -(np.arange(0, 8, 2) / 8)
    if scaling.kind == "linear":
        exact = exact / scaling.factor
    elif scaling.kind == "llama3":
        turns = scaling.original_length * exact / (2 * np.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = np.clip((turns - low) / (high - low), 0, 1)
        exact = kept * exact + (1 - kept) * exact / scaling.factor
    np.testing.assert_allclose(rope_frequencies(config), exact, rtol=2e-5, atol=1e-25)


def test_the_smallest_epsilon_norms_a_state_of_zeros():
    assert (RMSNorm(4, SMALLEST_FLOAT32)(jnp.zeros((1, 4))) == 0).all()


def test_head_dim_follows_from_the_width():
    assert ModelConfig(model_dim=96, num_heads=4, num_kv_heads=2).head_dim == 24
