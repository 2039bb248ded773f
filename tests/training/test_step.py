import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layerskip_jax.config import TrainingConfig
from layerskip_jax.data.packing import Completed, pack_whole, unpack
from layerskip_jax.distributed.mesh import MeshShape
from layerskip_jax.early_exit_loss import EarlyExitConfig
from layerskip_jax.layer_dropout import LayerDropoutConfig
from layerskip_jax.training.setup import make_setup
from layerskip_jax.training.step import Batch, make_train_step
from tests.helpers import (
    SEQUENCE,
    random_batch,
    run_steps,
    small_model,
    small_run,
    with_training,
)

STEPS = 20
NO_DROPOUT = LayerDropoutConfig()
GOLDEN = [4.512221, 4.626373, 4.520033]


def _losses(history):
    return np.array([m.loss for m in history])


def _largest_difference(a, b):
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: np.abs(x - y).max(), a, b)))


@pytest.fixture(scope="module")
def one_device():
    _, state, history = run_steps(small_run(), 8)
    return jax.device_get(state.parameters), history


@pytest.fixture(scope="module")
def one_device_throughout():
    _, state, history = run_steps(small_run(), STEPS)
    return jax.device_get(state.parameters), history


MESHES = [
    MeshShape(data=8),
    MeshShape(data=1, fsdp=8),
    MeshShape(data=1, fsdp=4, tensor=2),
    MeshShape(data=2, fsdp=2, tensor=2),
    MeshShape(data=1, fsdp=4, context=2),
    MeshShape(data=1, fsdp=2, context=2, tensor=2),
    MeshShape(data=1, fsdp=4, slice=2),
]


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_eight_devices_give_the_losses_of_one(one_device_throughout, shape):
    parameters, history = one_device_throughout
    config = small_run()
    config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, shape=shape))
    setup, state, sharded = run_steps(config, STEPS, devices=8)
    np.testing.assert_allclose(_losses(sharded), _losses(history), rtol=1e-5)
    for a, b in zip(history, sharded, strict=True):
        np.testing.assert_allclose(a.exit_losses, b.exit_losses, rtol=1e-5)
        np.testing.assert_array_equal(a.exit_layers, b.exit_layers)
        assert a.layers_run == b.layers_run < 1
    assert _largest_difference(parameters, jax.device_get(state.parameters)) < 1e-4
    # parameters really are spread: fsdp and tensor hold parts, the other axes hold copies
    gate = state.parameters["layers"]["mlp"]["gate"]
    assert gate.addressable_shards[0].data.size * shape.fsdp * shape.tensor == gate.size


@pytest.mark.parametrize("shape", [MESHES[4], MESHES[5]], ids=str)
def test_sampled_exit_positions_do_not_depend_on_the_mesh(shape):
    exits = EarlyExitConfig("rotational", rotation_interval=2, exit_token_fraction=2 / 3)
    config = small_run(early_exit=exits)
    _, _, alone = run_steps(config, 4)
    config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, shape=shape))
    _, _, sharded = run_steps(config, 4, devices=8)
    np.testing.assert_allclose(_losses(sharded), _losses(alone), rtol=1e-5)


def test_a_padded_vocabulary_trains_the_same_model():
    """64 tokens in 96 rows, 24 on each of four devices, one of which has no token at all."""
    config = small_run(model=small_model(pad_vocab_to_multiple_of=48, num_kv_heads=4))
    alone = run_steps(small_run(model=small_model(num_kv_heads=4)), 4)
    config = dataclasses.replace(
        config, mesh=dataclasses.replace(config.mesh, shape=MeshShape(1, 2, 4))
    )
    _, state, padded = run_steps(config, 4, devices=8)
    np.testing.assert_allclose(_losses(padded), _losses(alone[2]), rtol=1e-5)
    found, expected = jax.device_get((state.parameters, alone[1].parameters))
    assert found["embedding"].shape == (96, 32)
    for name, cut in (("embedding", np.s_[:64]), ("head", np.s_[:, :64])):
        np.testing.assert_allclose(found[name][cut], expected[name], atol=1e-4)
    assert not found["embedding"][64:].any()
    assert not found["head"][:, 64:].any()


def test_mask_and_gather_give_one_loss_curve(one_device):
    parameters, history = one_device
    dropout = dataclasses.replace(small_run().layer_dropout, execution="mask")
    _, state, masked = run_steps(small_run(layer_dropout=dropout), 8)
    np.testing.assert_allclose(_losses(masked), _losses(history), rtol=1e-6)
    assert _largest_difference(parameters, jax.device_get(state.parameters)) < 1e-5


@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulation_equals_the_whole_batch(one_device, accumulation):
    """The rows' numbers of valid tokens differ, so a mean of means would be off."""
    valid = random_batch(0).valid.reshape(accumulation, -1).sum(axis=1)
    assert len(set(valid.tolist())) > 1
    parameters, history = one_device
    _, state, parts = run_steps(with_training(small_run(), gradient_accumulation=accumulation), 8)
    np.testing.assert_allclose(_losses(parts), _losses(history), rtol=1e-6)
    for a, b in zip(history, parts, strict=True):
        np.testing.assert_allclose(a.exit_losses, b.exit_losses, rtol=1e-5)
        np.testing.assert_allclose(a.gradient_norm, b.gradient_norm, rtol=1e-5)
    assert _largest_difference(parameters, jax.device_get(state.parameters)) < 1e-4


@pytest.mark.parametrize(
    "exits", [EarlyExitConfig("last"), EarlyExitConfig("all"), EarlyExitConfig("gradual")]
)
def test_every_layer_has_a_finite_gradient(exits):
    config = small_run(early_exit=exits, layer_dropout=NO_DROPOUT)
    setup = make_setup(config, jax.devices()[:1])
    seen = {}

    def keep(gradients):
        seen.update(gradients)
        return gradients

    with jax.set_mesh(setup.mesh):
        state = setup.init()
        batch = setup.placement.place(random_batch(0))
        step = make_train_step(setup.definition, config, setup.optimizer, keep)

        def gradients(state, batch):
            step(state, batch)
            return dict(seen)

        result = jax.jit(gradients)(state, batch)
    for path, gradient in jax.tree_util.tree_leaves_with_path(result):
        assert np.isfinite(gradient).all(), path
        if path[0].key == "layers":
            sizes = np.abs(gradient).reshape(config.model.num_layers, -1).max(axis=1)
            assert (sizes > 0).all(), (path, sizes)
        else:
            assert np.abs(gradient).max() > 0, path


def test_masked_prompts_have_the_gradient_of_the_completions_alone():
    """By hand: each document by itself, and the log-probability of its completion's tokens."""
    random = np.random.default_rng(0)
    documents = []
    for prompt, completion in ((4, 5), (3, 2), (6, 3), (4, 1), (2, 3), (1, 4), (2, 7)):
        tokens = random.integers(1, 64, prompt + completion).astype(np.int32)
        documents.append(Completed(tokens, np.arange(len(tokens)) >= prompt))
    windows = list(pack_whole(iter(documents), SEQUENCE, 0))
    # Microbatches with more targets and with fewer, and one with none: a prompt, and padding.
    prompt = Completed(random.integers(1, 64, 9).astype(np.int32), np.zeros(9, bool))
    [alone] = pack_whole([prompt], SEQUENCE, 0)
    windows += [alone, alone, np.zeros((2, SEQUENCE + 1), np.int32)]
    rows = Batch(*unpack(np.stack(windows)))
    counts = rows.valid.reshape(len(windows) // 2, -1).sum(axis=1)
    assert len(set(counts.tolist())) > 2 and counts[-1] == 0
    config = small_run(
        early_exit=EarlyExitConfig("all", depth_weight="uniform", e_scale=1.0),
        layer_dropout=LayerDropoutConfig(row_groups=len(counts)),
        training=TrainingConfig(
            steps=20, batch_size=len(windows), gradient_accumulation=len(counts)
        ),
    )
    setup = make_setup(config, jax.devices()[:1])
    seen = {}

    def gradients(state, batch):
        step = make_train_step(
            setup.definition, config, setup.optimizer, lambda g: seen.update(g) or g
        )
        return step(state, batch)[1], dict(seen)

    with jax.set_mesh(setup.mesh):
        state = setup.init()
        metrics, found = jax.jit(gradients)(state, setup.placement.place(rows))

    def by_hand(parameters):
        model, total, count = setup.definition.model(parameters), 0.0, 0
        for length in (5, 9):  # those of a length as rows, one to each
            alike = [document for document in documents if len(document.tokens) == length]
            ids = jnp.stack([document.tokens for document in alike])
            positions = jnp.broadcast_to(jnp.arange(length), ids.shape)
            inputs = model.row_inputs(positions, jnp.ones_like(ids))
            _, states = model.scan_layers(model.embed(ids), inputs, lambda c, _, x: (c, x), None)
            log_p = jax.nn.log_softmax(model.final_norm(states) @ model.head_weight)
            for row, (tokens, is_target) in enumerate(alike):
                for place in np.flatnonzero(is_target).tolist():
                    total -= log_p[:, row, place - 1, tokens[place]].mean()  # over the exits
                    count += 1
        return total / count

    with jax.set_mesh(setup.mesh):
        loss, expected = jax.jit(jax.value_and_grad(by_hand))(state.parameters)
    assert metrics.valid_tokens == sum(int(d.is_target.sum()) for d in documents)
    assert metrics.left_out == 1
    np.testing.assert_allclose(metrics.loss, loss, rtol=1e-6)
    for path, gradient in jax.tree_util.tree_leaves_with_path(expected):
        ours = found
        for key in path:
            ours = ours[key.key]
        assert np.abs(gradient).max() > 0
        np.testing.assert_allclose(ours, gradient, rtol=1e-4, atol=1e-7, err_msg=str(path))


def test_a_batch_without_a_valid_token_moves_nothing_but_decay():
    config = small_run(optimizer=dataclasses.replace(small_run().optimizer, weight_decay=0.0))

    def empty(seed, rows):
        return random_batch(seed, rows)._replace(valid=np.zeros((rows, SEQUENCE), bool))

    setup, state, history = run_steps(config, 1, batch=empty)
    with jax.set_mesh(setup.mesh):
        before = setup.init()
    assert history[0].loss == 0
    assert _largest_difference(before.parameters, state.parameters) == 0


def test_one_batch_is_learned_by_heart():
    config = small_run(
        layer_dropout=NO_DROPOUT,
        early_exit=EarlyExitConfig("all"),
        optimizer=dataclasses.replace(
            small_run().optimizer, learning_rate=1e-2, warmup_steps=5, schedule="constant"
        ),
    )
    _, _, history = run_steps(config, 60, batch=lambda seed, rows: random_batch(0, rows))
    assert history[0].loss > 4
    assert history[-1].loss < 0.5


def test_bfloat16_follows_float32(one_device):
    config = small_run(model=small_model(dtype="bfloat16"))
    _, state, history = run_steps(config, 3)
    np.testing.assert_allclose(_losses(history), _losses(one_device[1])[:3], rtol=0.01)
    leaves = jax.tree.leaves(state.parameters) + jax.tree.leaves(state.optimizer)
    assert {leaf.dtype for leaf in leaves if leaf.ndim} == {jnp.dtype(jnp.float32)}


def test_golden_losses_of_three_steps(one_device):
    """Moves only with the numerics: change it knowingly, with the reason in the commit."""
    np.testing.assert_allclose(_losses(one_device[1])[:3], GOLDEN, rtol=1e-5)


def test_metrics_follow_the_schedules(one_device):
    _, history = one_device
    layers = [m.exit_layers[m.exit_weights > 0].tolist() for m in history[:4]]
    # layer 0 has weight 0 (eq. 6), so it is not scored even where the curriculum has it on
    assert layers == [[2, 3], [1, 3], [2, 3], [1, 3]]
    rates = np.array([m.learning_rate for m in history])
    warmup = 20  # the default of 100 is cut to the length of the run
    np.testing.assert_allclose(rates, 3e-4 * np.arange(1, 9) / warmup, rtol=1e-5)


def test_any_step_can_be_taken_alone():
    """Schedules are functions of the step: no step needs the one before it."""
    config = small_run(layer_dropout=LayerDropoutConfig(0.5, time_schedule="exp", row_groups=8))
    setup = make_setup(config, jax.devices()[:1])
    with jax.set_mesh(setup.mesh):
        step = setup.compile_step(SEQUENCE)
        for at in (0, 7, 19):
            state = setup.init()._replace(step=jax.device_put(jnp.int32(at), setup.shardings.step))
            _, metrics = step(state, setup.placement.place(random_batch(at)))
            on = (np.arange(4) - at) % 4 % 2 == 0
            on[3] = True
            scored = metrics.exit_layers[metrics.exit_weights > 0]
            assert scored.tolist() == [l for l in np.flatnonzero(on) if l > 0]
            assert (metrics.layers_run == 1) == (at == 0)


SCHEDULES = {
    "gradual, decreasing": {
        "early_exit": EarlyExitConfig("gradual", gradual_fraction=1.0, z_loss=1e-3),
        "layer_dropout": LayerDropoutConfig(
            0.6, "linear", "decreasing", residual_scale="inverse_keep", row_groups=2
        ),
    },
    "rotational, exp, on a share of the tokens": {
        "early_exit": EarlyExitConfig("rotational", rotation_interval=2, exit_token_fraction=0.5),
        "layer_dropout": LayerDropoutConfig(0.5, "exp", "exp", row_groups=2),
    },
    "all, increasing, cond, some layers": {
        "early_exit": EarlyExitConfig("all", depth_weight="inverse_sqrt"),
        "layer_dropout": LayerDropoutConfig(
            0.5, "uniform", "increasing", layers=(1, 3), execution="cond"
        ),
    },
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_going_on_in_the_middle_of_a_schedule_gives_the_same_steps(name):
    """A state put down after step 2 and taken up by a new program, against going on."""
    config = with_training(small_run(**SCHEDULES[name]), steps=6)
    setup, state, whole = run_steps(config, 6)
    _, middle, _ = run_steps(config, 3)
    again = make_setup(config, jax.devices()[:1])
    with jax.set_mesh(again.mesh):
        resumed = jax.device_put(jax.device_get(middle), again.shardings)
        step = again.compile_step(SEQUENCE)
        for index in (3, 4, 5):
            rows = random_batch(index, rows=config.training.batch_size)
            resumed, metrics = step(resumed, again.placement.place(rows))
            for a, b in zip(jax.device_get(metrics), whole[index], strict=True):
                np.testing.assert_array_equal(a, b)
    assert _largest_difference(state.parameters, jax.device_get(resumed.parameters)) == 0
    assert len({float(m.layers_run) for m in whole}) > 1, "the schedule should have moved"


def test_a_share_of_the_tokens_does_not_depend_on_accumulation():
    exits = EarlyExitConfig("rotational", rotation_interval=2, exit_token_fraction=0.5, z_loss=1e-3)
    config = small_run(early_exit=exits)
    _, _, whole = run_steps(config, 3)
    _, _, parts = run_steps(with_training(config, gradient_accumulation=4), 3)
    np.testing.assert_allclose(_losses(parts), _losses(whole), rtol=1e-6)
    _, _, all_tokens = run_steps(small_run(), 3)
    # the last exit is scored on every token, the early one on half of them
    np.testing.assert_allclose(whole[0].exit_losses[-1], all_tokens[0].exit_losses[-1], rtol=1e-6)
    assert whole[0].exit_losses[0] != all_tokens[0].exit_losses[0]


def test_the_compiled_step_refuses_another_shape():
    setup = make_setup(small_run(), jax.devices()[:1])
    with jax.set_mesh(setup.mesh):
        step = setup.compile_step(SEQUENCE)
        wrong = Batch(*(array[:, :-1] for array in random_batch(0)))
        with pytest.raises(TypeError):
            step(setup.init(), setup.placement.place(wrong))
