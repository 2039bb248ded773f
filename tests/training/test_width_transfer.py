"""Rates that carry over: by hand, by what a step changes at each width, and by a sweep."""

import dataclasses
import shutil
import sysconfig
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from layerskip_jax.cli import main
from layerskip_jax.config import MeshConfig, OptimizerConfig, RunConfig, TrainingConfig
from layerskip_jax.data.batches import BatchSource
from layerskip_jax.distributed.mesh import MeshShape
from layerskip_jax.early_exit_loss import EarlyExitConfig
from layerskip_jax.layer_dropout import LayerDropoutConfig
from layerskip_jax.model.definition import ModelDefinition
from layerskip_jax.run_folder.paths import RunFolder
from layerskip_jax.schema import ConfigError, UserError
from layerskip_jax.training.initialize import open_initial
from layerskip_jax.training.muon import Matrices
from layerskip_jax.training.optimizer import make_optimizer, state_share
from layerskip_jax.training.restore import load_run
from layerskip_jax.training.setup import make_setup
from layerskip_jax.training.step import Batch, TrainState, make_train_step
from layerskip_jax.training.trainable import names
from layerskip_jax.training.width_transfer import Scaling, WidthTransfer
from tests.helpers import go_back, small_model

BASE = 64
PLAIN = OptimizerConfig(learning_rate=2**-7, warmup_steps=0, schedule="constant")
CARRIED = dataclasses.replace(PLAIN, width_transfer=BASE)


def _model(width, **changes):
    shape = {
        "num_layers": 2, "model_dim": width, "ffn_dim": 2 * width, "num_heads": width // 16,
        "num_kv_heads": width // 32, "remat": "none",
    }  # fmt: skip
    return small_model(**{**shape, **changes})


def _optimizer(config, model):
    return make_optimizer(config, 100, Matrices(ModelDefinition(model).logical_axes), model)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("width, m", [(64, 1), (128, 2), (256, 4)])
def test_what_each_parameter_has_by_hand(width, m, tied):
    transfer = WidthTransfer(CARRIED, _model(width, tie_embeddings=tied, qkv_bias=True))
    matrix, vector = Scaling(1, 1 / m, 1 / m), Scaling(1, 1, 1 / m)
    expected = {
        "embedding": Scaling({1: 1, 2: 2**0.5, 4: 2}[m], 1, 1 / m),
        "final_norm.scale": Scaling(1 / m, 1 / m, 1) if tied else vector,
        **({} if tied else {"head": Scaling({1: 1, 2: 2**-0.5, 4: 0.5}[m], 1 / m, 1)}),
        **{f"layers.attention.{name}": matrix for name in "qkvo"},
        **{f"layers.mlp.{name}": matrix for name in ("gate", "up", "down")},
        **{f"layers.attention.{name}_bias": vector for name in "qkv"},
        **{f"layers.{name}_norm.scale": vector for name in ("attention", "mlp")},
    }
    found = names(ModelDefinition(transfer.model).shapes)
    assert {name: transfer.scaling(name) for name in found} == expected
    # What an adapter adds grows as the normed state that it is added to; a score stays as it is.
    exits = [transfer.scaling(f"exits.{name}").rate for name in ("scale", "down", "up", "weight")]
    assert exits == [1 / m if tied else 1, 1 / m, 1, 1 if tied else 1 / m]


def test_heads_that_grow_have_their_scores_divided_by_their_size():
    config = dataclasses.replace(CARRIED, width_transfer_head_dim=16)
    model = _model(256, num_heads=4, num_kv_heads=2, head_dim=64)
    transfer = WidthTransfer(config, model)
    # sqrt(16 / 64): q k / sqrt(64) becomes q k / 64, times sqrt(16) as it was at heads of 16
    assert transfer.scaling("layers.attention.q") == Scaling(0.5, 0.125, 0.5)
    assert transfer.scaling("layers.attention.q_bias") == Scaling(0.5, 0.5, 0.5)
    assert transfer.scaling("layers.attention.k") == Scaling(1, 0.25, 0.25)
    assert transfer.scaling("layers.attention.o") == Scaling(1, 0.25, 0.25)
    # A norm takes the factor from the queries again, so that it is in the norm's scale.
    normed = WidthTransfer(config, dataclasses.replace(model, qk_norm="head"))
    assert normed.scaling("layers.attention.q") == Scaling(1, 0.25, 0.25)
    assert normed.scaling("layers.attention.q_norm.scale") == Scaling(0.5, 0.5, 0.5)
    assert normed.scaling("layers.attention.k_norm.scale") == Scaling(1, 1, 0.25)


def test_a_first_step_by_hand():
    """Adam's first step is g / (|g| + eps), of gradients as large as at the base width."""
    eps, decay, rate = 0.01, 0.5, 2**-7
    config = dataclasses.replace(CARRIED, eps=eps, weight_decay=decay, clip_norm=0.0)
    model = _model(256)
    optimizer = _optimizer(config, model)
    parameters = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 3.0), ModelDefinition(model).shapes)
    gradients = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.02), parameters)
    updates, _ = optimizer.update(gradients, optimizer.init(parameters), parameters)
    small, large = 0.08 / (0.08 + eps), 0.02 / (0.02 + eps)
    for leaf, expected in {
        "embedding": small + decay * 3,
        "head": large / 4 + decay * 3,
        "up": small / 4 + decay * 3,
        "scale": small,
    }.items():
        found = [
            update for path, update in jax.tree_util.tree_leaves_with_path(updates)
            if path[-1].key == leaf
        ]  # fmt: skip
        assert found
        for update in found:
            np.testing.assert_allclose(update, -rate * expected, rtol=1e-5)


def test_off_or_at_the_base_width_every_bit_is_as_it_was():
    model, key = _model(BASE, tie_embeddings=True), jax.random.key(0)
    parameters = ModelDefinition(model).init(key)
    keys = iter(jax.random.split(key, len(jax.tree.leaves(parameters))))
    gradients = jax.tree.map(lambda p: jax.random.normal(next(keys), p.shape), parameters)
    adamw = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            2**-7, 0.9, 0.95, 1e-8, weight_decay=0.1,
            mask=jax.tree_util.tree_map_with_path(lambda p, _: p[-1].key != "scale", parameters),
        ),
    )  # fmt: skip
    state = adamw.init(parameters)
    expected, _ = adamw.update(gradients, state, parameters)
    for config in (PLAIN, CARRIED):
        optimizer = _optimizer(config, model)
        found, after = optimizer.update(gradients, optimizer.init(parameters), parameters)
        jax.tree.map(np.testing.assert_array_equal, found, expected)
        drawn = WidthTransfer(config, model).drawn(parameters)
        jax.tree.map(np.testing.assert_array_equal, drawn, parameters)
    for name in ("adamw", "muon"):
        off, on = (dataclasses.replace(config, name=name) for config in (PLAIN, CARRIED))
        wide = _model(128)
        states = [
            jax.eval_shape(_optimizer(config, wide).init, ModelDefinition(wide).shapes)
            for config in (off, on)
        ]
        assert states[0] == states[1]
        assert state_share(off, wide) == state_share(on, wide)


def test_a_wide_model_is_drawn_as_it_should_be_whatever_the_mesh():
    training = TrainingConfig(steps=10, batch_size=8)
    for tied in (False, True):
        model = _model(256, tie_embeddings=tied)
        found = []
        for shape in (MeshShape(data=1), MeshShape(data=1, fsdp=8)):
            run = RunConfig(
                model=model, optimizer=CARRIED, training=training, mesh=MeshConfig(shape)
            )
            setup = make_setup(run, jax.devices()[: 8 if shape.fsdp > 1 else 1])
            with jax.set_mesh(setup.mesh):
                found.append(jax.device_get(setup.init().parameters))
        jax.tree.map(np.testing.assert_array_equal, *found)
        [drawn, _], plain = found, ModelDefinition(model).init(jax.random.key(0))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
            drawn["layers"], plain["layers"],
        )  # fmt: skip
        # An embedding has the base's size; a head a half of 1 / sqrt(256), a quarter of the base's.
        base = ModelDefinition(_model(BASE)).init(jax.random.key(0))
        np.testing.assert_allclose(np.std(drawn["embedding"]), np.std(base["embedding"]), rtol=0.02)
        if tied:
            assert (drawn["final_norm"]["scale"] == 0.25).all()
        else:
            np.testing.assert_allclose(drawn["head"], plain["head"] / 2, rtol=1e-6)
            np.testing.assert_allclose(np.std(drawn["head"]), np.std(base["head"]) / 4, rtol=0.02)
            assert (drawn["final_norm"]["scale"] == 1).all()


def _loss(definition, tokens):
    tokens, (rows, length) = jnp.asarray(tokens), (tokens.shape[0], tokens.shape[1] - 1)
    positions = jnp.tile(jnp.arange(length), (rows, 1))

    def loss(parameters):
        logits = definition.model(parameters).logits(
            tokens[:, :-1], positions, jnp.ones((rows, length), jnp.int32)
        )
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    return loss


def _train(loss, optimizer, parameters, steps):
    @jax.jit
    def step(parameters, state):
        updates, state = optimizer.update(jax.grad(loss)(parameters), state, parameters)
        return optax.apply_updates(parameters, updates), state

    state = optimizer.init(parameters)
    for _ in range(steps):
        parameters, state = step(parameters, state)
    return parameters


# Few, so that a step of the head follows each of the states that it is taken at.
TOKENS = np.array([[3, 14, 15, 9, 26, 5, 35, 8, 40]])


def test_the_factor_of_tied_logits_is_in_the_final_norm():
    """A norm of scale g, a factor 1 / m behind it and the rate of a norm: the same steps."""
    model = _model(128, tie_embeddings=True)
    definition = ModelDefinition(model)
    loss = _loss(definition, TOKENS)
    drawn = WidthTransfer(CARRIED, model).drawn(definition.init(jax.random.key(1)))
    ours = _train(loss, _optimizer(dataclasses.replace(CARRIED, clip_norm=0.0), model), drawn, 3)

    def folded(parameters):
        scale = parameters["final_norm"]["scale"] / 2
        return {**parameters, "final_norm": {"scale": scale}}

    # What an untied model's norm has is what a norm before such a factor has.
    untied = dataclasses.replace(model, tie_embeddings=False)
    explicit = _optimizer(dataclasses.replace(CARRIED, clip_norm=0.0), untied)
    behind = {**drawn, "final_norm": {"scale": 2 * drawn["final_norm"]["scale"]}}
    theirs = _train(lambda p: loss(folded(p)), explicit, behind, 3)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), ours, folded(theirs)
    )
    assert np.ptp(ours["final_norm"]["scale"]) > 1e-3  # it moved


def _changes(width, config, **model):
    """How much four steps change the last state, and what the head's own add to the logits."""
    model = _model(width, **model)
    definition = ModelDefinition(model)
    before = WidthTransfer(config, model).drawn(definition.init(jax.random.key(1)))
    after = _train(_loss(definition, TOKENS), _optimizer(config, model), before, 4)
    positions, tokens = jnp.arange(8)[None], jnp.asarray(TOKENS[:, :-1])

    @jax.jit
    def read(parameters):
        read_by = definition.model(parameters)
        rows = read_by.row_inputs(positions, jnp.ones((1, 8), jnp.int32))
        slots = jnp.zeros(model.num_layers, jnp.int32)
        _, last = read_by.exit_states(read_by.embed(tokens), rows, slots, 1)
        return last, read_by.final_norm(last), read_by.head_weight

    (x, _, head), (moved_x, z, moved_head) = read(before), read(after)
    sizes = jnp.abs(moved_x - x), jnp.abs(z @ (moved_head - head))
    return np.array([float(size.mean()) for size in sizes])


@pytest.mark.parametrize(
    "name, tied, widths", [("adamw", True, (128, 256, 512)), ("adamw", False, (256,)),
                           ("muon", True, (256,))],
)  # fmt: skip
def test_four_steps_change_states_and_logits_alike_at_every_width(name, tied, widths):
    """The coordinate check of Yang et al. 2022, section D.1.

    Of the logits, what the head's own steps add: what a head as it is drawn makes of the change
    before it falls with the root of the width, as it should.
    """
    off, on = (
        dataclasses.replace(config, name=name, learning_rate=2**-9) for config in (PLAIN, CARRIED)
    )
    base = _changes(BASE, on, tie_embeddings=tied)
    for width in widths:
        ratios = _changes(width, on, tie_embeddings=tied) / base
        assert ((1 / 1.5 < ratios) & (ratios < 1.5)).all(), (width, ratios)
    grown = _changes(widths[-1], off, tie_embeddings=tied) / base
    assert (grown > 1.4).all() and grown.max() > 1.9, grown


@pytest.mark.parametrize("rms, grows", [(0.2, 4**0.5), (0.0, 1.0)])
def test_steps_of_muon_have_one_spectral_norm_at_every_width(rms, grows):
    """By the condition sqrt(outputs / inputs), of matrices that keep their proportions."""

    def norms(width, config):
        config = dataclasses.replace(
            config, name="muon", muon_rms=rms, weight_decay=0.0, clip_norm=0.0
        )
        model = _model(width, num_layers=1)
        shapes = ModelDefinition(model).shapes
        keys = iter(jax.random.split(jax.random.key(0), len(jax.tree.leaves(shapes))))
        gradients = jax.tree.map(lambda leaf: jax.random.normal(next(keys), leaf.shape), shapes)
        optimizer = _optimizer(config, model)
        parameters = jax.tree.map(jnp.zeros_like, gradients)
        updates, _ = optimizer.update(gradients, optimizer.init(parameters), parameters)
        layers = updates["layers"]
        up = np.linalg.norm(layers["mlp"]["up"][0], 2)
        out = np.linalg.norm(np.asarray(layers["attention"]["o"][0]).reshape(-1, width), 2)
        return np.array([up, out])

    base = norms(BASE, CARRIED)
    np.testing.assert_allclose(norms(256, CARRIED) / base, 1, rtol=0.1)
    np.testing.assert_allclose(norms(256, PLAIN) / base, grows, rtol=0.1)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"width_transfer": -1}, "width_transfer=-1 must be at least 0"),
        (
            {"width_transfer_head_dim": 16},
            "width_transfer_head_dim=16 is the size of a head at the width_transfer where .* is 0",
        ),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        OptimizerConfig(**settings)


def test_only_a_model_that_was_drawn_for_it_may_be_gone_on_with(finished, tmp_path):
    run = RunConfig(init_from=str(finished), optimizer=CARRIED)
    message = "width_transfer=64 moves parameters that were drawn for it, and .* trained with 0"
    with pytest.raises(UserError, match=message):
        open_initial(run, tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    file = RunFolder(copy).config_file
    file.write_text(file.read_text().replace('"width_transfer": 0', '"width_transfer": 64'))
    run = dataclasses.replace(run, init_from=str(copy))
    assert open_initial(run, tmp_path).config.num_layers == 4
    plain = dataclasses.replace(run, optimizer=PLAIN)  # with rates as they are, any model may be
    assert open_initial(plain, tmp_path).config.num_layers == 4


def test_a_run_goes_on_to_the_same_bits(arguments, tmp_path):
    command = [
        "train", f"--workdir={tmp_path / 'run'}", *arguments, "--config.optimizer.width_transfer=8",
        "--config.model.tie_embeddings=True",
    ]  # fmt: skip
    assert main(command) == 0
    first = load_run(tmp_path / "run").parameters
    assert np.abs(first["final_norm"]["scale"] - 0.25).max() < 0.05  # drawn as 8 / 32
    go_back(tmp_path / "run")
    assert main(command) == 0
    jax.tree.map(np.testing.assert_array_equal, load_run(tmp_path / "run").parameters, first)


@pytest.fixture(scope="module")
def modules(tmp_path_factory):
    """A few modules of the standard library in windows of 64 tokens."""
    folder = tmp_path_factory.mktemp("modules")
    texts = folder / "texts"
    texts.mkdir()
    library = Path(sysconfig.get_paths()["stdlib"])
    for name in ("argparse", "ast", "inspect", "tarfile", "turtle", "typing", "zipfile/__init__"):
        source = library / f"{name}.py"
        source = source if source.exists() else library / "zipfile.py"  # before Python 3.12
        lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
        # In parts, as which of a few documents are held out is by chance.
        for number, part in enumerate(np.array_split(lines, 10)):
            (texts / f"{source.parent.name}-{source.stem}-{number}.py").write_text("".join(part))
    arguments = ["--vocab-size=512", "--sequence-length=64", "--validation-fraction=0.15"]
    assert main(["prepare", f"--source={texts}", f"--output={folder / 'data'}", *arguments]) == 0
    return folder / "data"


def _with_rate(optimizer):
    """An optimizer of rate 1 whose steps are multiplied by what its state says.

    Steps and decay are both proportional to the rate, and the programs of all rates are one.
    """

    def update(gradients, state, parameters):
        inner, rate = state
        updates, inner = optimizer.update(gradients, inner, parameters)
        return jax.tree.map(lambda leaf: rate * leaf, updates), (inner, rate)

    return optax.GradientTransformation(lambda p: (optimizer.init(p), jnp.float32(1)), update)


@pytest.mark.slow
def test_the_best_rate_of_a_sweep_stays_put(modules):
    """Within one step of a factor of 2 at four times the width, with dropout and an early exit."""
    rates, steps = [2.0**-power for power in (9, 8, 7, 6)], 60

    def best(width, carried):
        """Returns the number of the best rate for each exit."""
        run = RunConfig(
            model=_model(
                width, vocab_size=512, num_heads=width // 32, num_kv_heads=width // 64,
                head_dim=32, tie_embeddings=True,
            ),
            layer_dropout=LayerDropoutConfig(p_max=0.2, row_groups=8),
            early_exit=EarlyExitConfig("all", depth_weight="uniform"),
            optimizer=dataclasses.replace(
                CARRIED if carried else PLAIN, learning_rate=1.0, warmup_steps=10, schedule="wsd"
            ),
            training=TrainingConfig(steps=steps, batch_size=8),
        )  # fmt: skip
        setup = make_setup(run, jax.devices()[:1])
        source = BatchSource(modules, "train", batch_size=8, seed=0)
        optimizer = _with_rate(setup.optimizer)
        step = jax.jit(make_train_step(setup.definition, setup.config, optimizer))
        last_losses = []
        with jax.set_mesh(setup.mesh):
            drawn = setup.init().parameters
            for rate in rates:
                inner, _ = optimizer.init(drawn)
                state, losses = TrainState(jnp.int32(0), drawn, (inner, jnp.float32(rate))), []
                for index in range(steps):
                    state, metrics = step(state, setup.placement.place(Batch(*source.batch(index))))
                    losses.append(np.asarray(metrics.exit_losses))
                last_losses.append(np.mean(losses[-10:], axis=0))  # of windows not seen before
        return np.argmin(last_losses, axis=0)

    base = best(64, True)
    for width in (128, 256):
        found = best(width, True)
        assert (np.abs(found - base) <= 1).all(), (width, found, base)
    assert (best(256, False) <= base - 2).all()  # without, it falls as the width grows
