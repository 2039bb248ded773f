"""Exit adapters and the learned exit: a model is left as it is, and its exits get better."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layerskip_jax.config import MeshConfig, OptimizerConfig, RunConfig, TrainingConfig
from layerskip_jax.decoding.weights import decoder_weights
from layerskip_jax.distributed.mesh import MeshShape
from layerskip_jax.early_exit_loss import EarlyExitConfig
from layerskip_jax.layer_dropout import LayerDropoutConfig
from layerskip_jax.model.definition import ModelDefinition
from layerskip_jax.model.exits import ExitsConfig
from layerskip_jax.schema import ConfigError
from layerskip_jax.training.evaluation import make_exit_scorer
from layerskip_jax.training.exits import classifier_error, equal_exits, exits_loss
from layerskip_jax.training.initialize import initial_parameters
from layerskip_jax.training.setup import make_setup
from tests.helpers import SEQUENCE, random_batch, run_steps, small_model


def _run(exits, **training) -> RunConfig:
    settings = {"steps": 40, "batch_size": 16, "trainable": "exits", "loss_chunk": 5}
    return RunConfig(
        init_from="a-run",
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=0, weight_decay=0.0),
        model=small_model(exits=exits),
        training=TrainingConfig(**{**settings, **training}),
    )


class _Base:
    """A model to start from, in memory."""

    config, files = small_model(), {}

    def check_tokenizer(self, file):
        """It has none."""

    def branch(self, setup):
        return None

    def parameters(self, config, shardings):
        assert not config.exits
        made = ModelDefinition(config).init(jax.random.key(7))
        made["final_norm"]["scale"] = jnp.linspace(0.5, 1.5, config.model_dim)
        return jax.device_put(made, shardings)


def _micro(seed=0):
    return jax.tree.map(jnp.asarray, random_batch(seed))


@pytest.fixture(scope="module")
def trained():
    """A setup, its first parameters on the host, and the state after 40 steps."""
    setup = make_setup(_run(ExitsConfig((1, 3), rank=4, learned=True)), jax.devices()[:1])
    with jax.set_mesh(setup.mesh):
        step = setup.compile_step(SEQUENCE)
        first = initial_parameters(setup, _Base())
        state = setup.start_from(first)
        before = jax.device_get(first)
        losses = []
        for index in range(40):
            batch = setup.placement.place(random_batch(index % 4))
            state, metrics = step(state, batch)
            losses.append(float(metrics.loss))
    return setup, before, state, losses


def test_fresh_adapters_are_the_model_as_it_was(trained):
    setup, before, _, _ = trained
    before = jax.tree.map(jnp.asarray, before)
    base = {name: part for name, part in before.items() if name != "exits"}
    batch = jax.tree.map(lambda array: array[None], _micro())
    plain = ModelDefinition(small_model())
    theirs, _ = make_exit_scorer(plain, chunk=4)(base, batch)
    with jax.set_mesh(setup.mesh):
        ours, _ = make_exit_scorer(setup.definition, chunk=4)(before, batch)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    plain_weights = decoder_weights(plain.model(base))
    weights = decoder_weights(setup.definition.model(before))
    x = jax.random.normal(jax.random.key(1), (2, 3, 32))
    for exit_layer in (1, 2, 3, 4):
        np.testing.assert_array_equal(
            weights.before_head(x, exit_layer), plain_weights.before_head(x, exit_layer)
        )


def test_exits_of_the_model_to_start_from_are_left_out_aloud(trained, caplog):
    class WithExits(_Base):
        config = small_model(exits=ExitsConfig((2,), rank=3))

    setup, before, _, _ = trained
    with jax.set_mesh(setup.mesh):
        parameters = initial_parameters(setup, WithExits())
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(parameters), before)
    assert "the exits of a-run (adapters (2,), learned False) are left out" in caplog.text


def test_the_model_is_left_bit_for_bit_and_its_exits_move(trained):
    setup, before, state, losses = trained
    after = jax.device_get(state.parameters)
    for name in before.keys() - {"exits"}:
        jax.tree.map(np.testing.assert_array_equal, before[name], after[name])
    for name, part in after["exits"].items():
        assert not np.array_equal(part, before["exits"][name]), name
    batch = _micro()
    definition = ModelDefinition(setup.config.model)
    logits = [
        definition.model(jax.tree.map(jnp.asarray, p)).logits(
            batch.tokens, batch.positions, batch.segment_ids
        )
        for p in (before, after)
    ]
    np.testing.assert_array_equal(*logits)
    assert all(last < first for first, last in zip(losses[:4], losses[-4:], strict=True))


def test_nothing_of_the_model_has_a_state_in_the_optimizer(trained):
    setup, _, state, _ = trained
    exits = sum(leaf.size for leaf in jax.tree.leaves(state.parameters["exits"]))
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim)
    assert moments == 2 * exits


def test_decoding_reads_what_was_trained(trained):
    setup, _, state, _ = trained
    model = setup.definition.model(state.parameters)
    weights = decoder_weights(model)
    assert sorted(weights.adapters) == [1, 3]
    x = jax.random.normal(jax.random.key(1), (2, 3, 32))
    exits = jax.device_get(state.parameters["exits"])
    z = np.asarray(x) / np.sqrt(np.mean(np.square(x), -1, keepdims=True) + 1e-5)
    z = z * exits["scale"][1]
    z = z + z @ exits["down"][1] @ exits["up"][1]
    np.testing.assert_allclose(weights.before_head(x, 3), z, rtol=1e-4, atol=1e-5)
    score = 1 / (1 + np.exp(-(z @ exits["weight"] + exits["score_bias"])))
    np.testing.assert_allclose(weights.classifier(jnp.asarray(z)), score, rtol=1e-5)
    np.testing.assert_array_equal(weights.before_head(x, 2), weights.final_norm(x))


@pytest.mark.parametrize("target", ["last", "data"])
def test_the_loss_by_hand(target):
    config = _run(ExitsConfig((2,), rank=3, learned=True, target=target))
    definition = ModelDefinition(config.model)
    parameters = definition.init(jax.random.key(0))
    key = jax.random.key(5)
    parameters["exits"]["up"] = jax.random.normal(key, (1, 3, 32))
    parameters["exits"]["weight"] = jax.random.normal(key, (32,))
    batch = _micro()
    count = batch.valid.sum()
    value, means = exits_loss(definition, config)(
        parameters, batch, None, equal_exits(config.model), None, count
    )

    model, exits = definition.model(parameters), parameters["exits"]
    kept, last = model.exit_states(
        model.embed(batch.tokens),
        model.row_inputs(batch.positions, batch.segment_ids),
        jnp.array([1, 0, 1, 1]),
        1,
    )
    x = np.asarray(kept[0], np.float64)
    z = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-5)
    z = z + z @ np.asarray(exits["down"][0]) @ np.asarray(exits["up"][0])
    head = np.asarray(model.head_weight, np.float64)

    def log_softmax(logits):
        logits = logits - logits.max(-1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    log_p, log_q = log_softmax(z @ head), log_softmax(np.asarray(model.final_norm(last)) @ head)
    hot = np.exp(log_q) if target == "last" else np.eye(64)[np.asarray(batch.targets)]
    valid = np.asarray(batch.valid)
    entropy = -(hot * log_p).sum(-1)[valid].mean()
    is_right = log_p.argmax(-1) == hot.argmax(-1)
    score = 1 / (1 + np.exp(-(z @ np.asarray(exits["weight"]))))
    error = np.square(score - is_right)[valid].mean()
    np.testing.assert_allclose(means, [entropy], rtol=1e-4)
    np.testing.assert_allclose(value, entropy + error, rtol=1e-4)


def _beside(learned, devices=1, **changes):
    """Returns parameters and losses of 24 steps that train a model, its classifier beside it."""
    training = {"steps": 40, "batch_size": 16, "loss_chunk": 5, "gradient_accumulation": 1}
    mesh = changes.pop("mesh", MeshConfig())
    config = RunConfig(
        model=small_model(exits=ExitsConfig(learned=learned)),
        early_exit=EarlyExitConfig("rotational", rotation_interval=2, e_scale=1.0),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=0, clip_norm=0.0),
        training=TrainingConfig(**training | changes),
        mesh=mesh,
    )
    _, state, history = run_steps(config, 24, devices)
    return jax.device_get(state.parameters), [float(metrics.loss) for metrics in history]


@pytest.fixture(scope="module")
def beside():
    """What 24 steps of a model with a classifier beside it come to."""
    return _beside(True)


def test_a_model_trains_as_it_would_without_the_classifier_beside_it(beside):
    with_it, losses = beside
    without, plain_losses = _beside(False)
    np.testing.assert_allclose(losses, plain_losses, rtol=1e-5)
    for name, part in without.items():
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-4), part, with_it[name]
        )
    assert np.abs(with_it["exits"]["weight"]).max() > 0.01


@pytest.mark.parametrize("shape", [MeshShape(data=2, fsdp=2, tensor=2), MeshShape(data=1, fsdp=4)])
def test_a_classifier_learns_the_same_on_any_mesh(beside, shape):
    devices = shape.data * shape.fsdp * shape.tensor
    after, losses = _beside(True, devices, mesh=MeshConfig(shape), gradient_accumulation=2)
    np.testing.assert_allclose(losses, beside[1], rtol=1e-4)
    for name, part in after["exits"].items():
        np.testing.assert_allclose(part, beside[0]["exits"][name], rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("target", ["last", "data"])
def test_the_error_of_a_classifier_by_hand(target):
    config = small_model(exits=ExitsConfig(learned=True, target=target))
    definition = ModelDefinition(config)
    parameters = definition.init(jax.random.key(0))
    parameters["exits"]["weight"] = jax.random.normal(jax.random.key(5), (32,))
    batch, model = _micro(), definition.model(parameters)
    early, last = model.exit_states(
        model.embed(batch.tokens),
        model.row_inputs(batch.positions, batch.segment_ids),
        jnp.array([0, 1, 2, 2]),
        2,
    )

    def error(on, positions=None):
        at = early if positions is None else jnp.take(early, positions, axis=2)
        return float(classifier_error(
            model, at, last, batch.targets, batch.valid, jnp.array(on), batch.valid.sum(),
            positions=positions, chunk=2,
        ))  # fmt: skip

    head, w = np.asarray(model.head_weight), np.asarray(parameters["exits"]["weight"])
    z = np.asarray(model.final_norm(jnp.concatenate([early, last[None]])))
    choice = (z @ head).argmax(-1)
    right = choice[-1] if target == "last" else np.asarray(batch.targets)
    squares = np.square(1 / (1 + np.exp(-(z[:2] @ w))) - (choice[:2] == right))
    squares *= np.asarray(batch.valid)
    # Positions 0 and 8 of 12, which stand for all 12.
    count = float(batch.valid.sum()) * 2 / 12
    both = squares[:, :, [0, 8]].sum() / count / 2
    assert error([True, True]) == pytest.approx(both, rel=1e-4)
    assert error([False, True]) == pytest.approx(squares[1][:, [0, 8]].sum() / count, rel=1e-4)
    assert error([False, False]) == 0
    # Of sampled positions every eighth: the first of these four, and 1/12 of all.
    sampled = jnp.array([2, 5, 7, 11])
    assert error([True, False], sampled) == pytest.approx(
        squares[0][:, 2].sum() / (count / 2), rel=1e-4
    )


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: ExitsConfig((0,)), "adapters"),
        (lambda: ExitsConfig((3, 1)), "ascending"),
        (lambda: ExitsConfig((1,), rank=0), "rank"),
        (lambda: ExitsConfig((1,), target="x"), "target"),
        (lambda: _run(ExitsConfig()), "needs adapters or learned"),
        (lambda: _run(ExitsConfig((1,)), trainable="all"), "trainable='all'"),
        (lambda: RunConfig(model=small_model(exits=ExitsConfig(learned=True))), "turns none on"),
        (lambda: dataclasses.replace(_run(ExitsConfig((1,))), init_from=""), "init_from"),
        (
            lambda: dataclasses.replace(
                _run(ExitsConfig((1,))), layer_dropout=LayerDropoutConfig(p_max=0.1)
            ),
            "p_max=0.1",
        ),
        (lambda: make_setup(_run(ExitsConfig((4,))), jax.devices()[:1]), "1..3"),
    ],
)
def test_settings_that_cannot_be_are_refused(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


def test_the_exits_trained_without_adapters_are_those_of_adaptive_decoding():
    assert ExitsConfig(learned=True).trained(16) == (2, 4, 6, 8, 10, 12, 14)
    assert ExitsConfig(learned=True).trained(4) == (1, 2, 3)
