"""A run that trains exits before a small trained model: what it gains, and going on."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layerskip_jax.cli import main
from layerskip_jax.commands.sweep import validation_prompts
from layerskip_jax.decoding.weights import decoder_weights
from layerskip_jax.generation.generator import Generator
from layerskip_jax.run_folder.paths import RunFolder, read_json_lines
from layerskip_jax.training.restore import load_run

PROMPTS = [[5, 3, 9], [1], [7] * 9, [60, 2]]


@pytest.fixture(scope="module")
def command(quickstart):
    run = quickstart[0]
    return [
        "train", "--config=exit_adapters", f"--config.init_from={run / 'model'}",
        f"--config.data.path={run / 'data'}", "--config.model.exits.adapters=(1,2)",
        "--config.model.exits.rank=16", "--config.model.exits.learned=True",
        "--config.optimizer.learning_rate=1e-2", "--config.optimizer.warmup_steps=2",
        "--config.training.steps=40", "--config.training.batch_size=8",
        "--config.training.evaluate_every=40", "--config.training.evaluate_batches=2",
        "--config.checkpoint.every_steps=20",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def adapted(command, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("adapters") / "run"
    assert main([*command, f"--workdir={workdir}"]) == 0
    return workdir


def _agreement(run, tokens):
    """Returns by exit the share of positions at which it has the last layer's likeliest token."""
    weights = decoder_weights(run.model)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    early, last = run.model.exit_states(
        run.model.embed(tokens),
        run.model.row_inputs(positions, jnp.ones_like(tokens)),
        jnp.array([0, 1, 2, 3]),
        3,
    )

    def best(x, exit_layer):
        return weights.any_head(weights.before_head(x, exit_layer)).argmax(-1)

    whole = best(last, 4)
    return [float((best(x, e) == whole).mean()) for e, x in enumerate(early, start=1)]


def test_adapters_agree_more_with_the_last_layer_which_stays(adapted, quickstart):
    records = read_json_lines(RunFolder(adapted).evaluations_file)
    (before, after) = ([e["loss"] for e in record["exits"]] for record in records)
    assert after[0] < before[0] and after[1] < before[1]
    assert after[2:] == before[2:]
    model, run = load_run(quickstart[0] / "model"), load_run(adapted)
    tokens = jnp.array(validation_prompts(str(quickstart[0] / "data"), 16, 32))
    plain, ours = _agreement(model, tokens), _agreement(run, tokens)
    assert ours[0] > plain[0] and ours[1] > plain[1]
    assert ours[2] == plain[2]


def test_stopping_and_going_on_gives_the_same_exits_bit_for_bit(adapted, command, tmp_path):
    stopped = shutil.copytree(adapted, tmp_path / "run")
    shutil.rmtree(RunFolder(stopped).checkpoints / "40")
    assert main([*command, f"--workdir={stopped}"]) == 0
    again, whole = load_run(stopped), load_run(adapted)
    assert again.step == whole.step == 40
    jax.tree.map(np.testing.assert_array_equal, again.parameters, whole.parameters)


@pytest.mark.parametrize("sampled", [{}, {"temperature": 0.8, "top_k": 20, "seed": 3}])
def test_drafts_through_adapters_give_the_tokens_of_plain_decoding(adapted, quickstart, sampled):
    base = load_run(quickstart[0] / "model").model
    expected = Generator(base).generate(PROMPTS, 12, **sampled).tokens
    generator = Generator(load_run(adapted).model)
    assert generator.generate(PROMPTS, 12, **sampled).tokens == expected
    for exit_layer, draft_length in ((1, 3), (2, 1), (3, 2)):
        way = {"mode": "self_speculative", "exit_layer": exit_layer, "draft_length": draft_length}
        assert generator.generate(PROMPTS, 12, **way, **sampled).tokens == expected
