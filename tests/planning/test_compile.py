"""Plans by arithmetic, worked by hand; tests/pods has those that are compiled."""

import dataclasses
import json
from pathlib import Path

import optax
import pytest

from layerskip_jax.commands import plan as command
from layerskip_jax.config import OptimizerConfig, RunConfig, load_config, recipe_targets
from layerskip_jax.hardware.chips import CHIPS
from layerskip_jax.hardware.topology import parse_topology
from layerskip_jax.planning.compile import plan_step, plan_step_apart
from layerskip_jax.planning.search import candidates, nearest_that_fits, search
from layerskip_jax.planning.step_plan import fits_text
from layerskip_jax.schema import ConfigError
from layerskip_jax.training.optimizer import OPTIMIZERS
from tests.helpers import small_model, with_training

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted(
    (file.stem, target) for file in CONFIGS.glob("*.py") for target in recipe_targets(file)
)


def _run(data=1, fsdp=1, tensor=1, **training):
    """Four layers of 32: a layer has 32 * 8 * (2 * 4 + 2 * 2) + 3 * 32 * 64 = 9216 parameters."""
    config = RunConfig(model=small_model(remat="full"))
    shape = dataclasses.replace(config.mesh.shape, data=data, fsdp=fsdp, tensor=tensor)
    config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, shape=shape))
    return with_training(config, steps=20, batch_size=64, **training)


LAYER, HEADS = 9216, 2 * 64 * 32  # parameters; norms are left out


def test_memory_by_hand():
    plan = plan_step(_run(data=2, fsdp=4), parse_topology("h100:8"), 16)
    assert not plan.compiled and plan.fits
    assert plan.memory.parameters == 4 * (4 * LAYER + HEADS) / 4
    assert plan.memory.optimizer == 2 * plan.memory.parameters
    # each device has 8 rows of 16 tokens; remat `full` keeps what enters each of 4 layers
    assert plan.memory.activations == 8 * 16 * 4 * 32 * 4
    assert plan.memory.limit == CHIPS["h100"].memory


def test_what_goes_to_the_host_takes_none_of_the_device():
    run = _run(data=2, fsdp=4)
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, remat="offload"))
    memory = plan_step(run, parse_topology("h100:8"), 16).memory
    assert (memory.activations, memory.host) == (0, 8 * 16 * 4 * 32 * 4)


def test_traffic_by_hand():
    plan = plan_step(_run(data=4, fsdp=4), parse_topology("h100:16"), 16)
    lines = {line.kind: line for line in plan.traffic}
    gather, scatter, reduce = (lines[k] for k in ("all-gather", "reduce-scatter", "all-reduce"))
    assert (gather.turns, gather.size, gather.over) == (8, 8 * LAYER * 4, "links")
    assert gather.seconds == pytest.approx(8 * LAYER * 4 * 3 / 4 / 450e9)
    assert (scatter.turns, scatter.size) == (4, 4 * LAYER * 4)
    # four replicas of 4 devices are on more than one host of 8
    assert (reduce.devices, reduce.over) == (4, "network")
    assert reduce.seconds == pytest.approx(plan.memory.parameters * 2 * 3 / 4 / 50e9)


def test_an_optimizer_takes_the_memory_and_the_time_of_its_own_state(monkeypatch):
    def lion(config, rate, decayed, matrices, transfer):
        return optax.lion(rate, mask=decayed)

    monkeypatch.setitem(OPTIMIZERS, "lion", lion)
    config = _run(data=2, fsdp=4)
    config = dataclasses.replace(config, optimizer=OptimizerConfig(name="lion"))
    plan = plan_step(config, parse_topology("h100:8"), 16)
    assert plan.memory.optimizer == plan.memory.parameters
    assert plan.update_seconds == pytest.approx(20 * plan.memory.parameters / 4 / 3350e9)


def test_the_bound_on_the_step_is_the_arithmetic_that_is_printed(capsys):
    plan = plan_step(_run(data=2, fsdp=4), parse_topology("h100:8"), 16)
    assert plan.compute_seconds == pytest.approx(plan.flops_computed / (8 * 989e12))
    assert plan.update_seconds == pytest.approx(28 * plan.memory.parameters / 4 / 3350e9)
    longest = max(plan.compute_seconds, plan.traffic_seconds)
    assert plan.step_seconds == longest + plan.update_seconds
    assert plan.mfu == pytest.approx(plan.flops_needed / (plan.step_seconds * 8 * 989e12))
    assert plan.flops_computed > plan.flops_needed


def test_more_microbatches_take_less_memory_and_more_traffic():
    once, four = (
        plan_step(_run(fsdp=8, gradient_accumulation=n), parse_topology("h100:8"), 16)
        for n in (1, 4)
    )
    assert four.memory.activations == once.memory.activations / 4
    assert four.traffic_seconds == 4 * once.traffic_seconds


def test_candidates_are_ordered_and_leave_the_batch_alone():
    config = _run(data=-1)
    found = candidates(config, parse_topology("h100:8"), 16)
    assert len(found) > 10
    assert found[0].estimate.step_seconds <= found[-1].estimate.step_seconds * 1.01
    assert {candidate.config.training.batch_size for candidate in found} == {64}
    assert all("=" in change for candidate in found for change in candidate.changes)


def test_a_candidate_is_what_its_changes_say():
    """Given on the command line, they lead to its plan."""
    arguments = [f"--config={CONFIGS / 'llama2_7b_scratch.py'}:h100"]
    config, topology = load_config(arguments), parse_topology("h100:32")
    (candidate, plan), *_ = search(config, topology, 4096, 3)
    again = plan_step(load_config([*arguments, *candidate.changes]), topology, 4096)
    assert again.step_seconds == plan.step_seconds
    assert again.memory == plan.memory


def test_what_does_not_fit_leads_to_the_nearest_that_does():
    config = load_config(
        [f"--config={CONFIGS / 'llama2_70b_continual.py'}", "--config.model.remat=dots"]
    )
    topology = parse_topology("h100:32")
    assert not plan_step(config, topology).fits
    candidate, plan = nearest_that_fits(config, topology, 4096)
    assert plan.fits and candidate.changes


@pytest.mark.usefixtures("uncached")
def test_a_compiler_that_dies_takes_nothing_with_it(monkeypatch):
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--no_such_setting=1")
    plan = plan_step_apart(_run(fsdp=4), parse_topology("v5e:2x2"), 16)
    assert plan.memory.total is None and not plan.fits
    assert fits_text(plan).startswith("not compiled: the compiler's process ended")


@pytest.mark.parametrize("recipe, target", RECIPES)
def test_every_recipe_is_laid_out_for_its_devices(recipe, target):
    """Batch, groups and mesh fit each other, LayerSkip and plain, and on GPUs so does memory."""
    for variant in (target, f"plain-{target}"):
        config = load_config([f"--config={CONFIGS / recipe}.py:{variant}"])
        topology = parse_topology(config.mesh.topology, config.mesh.shape.slice)
        sizes = config.mesh.shape.resolve(topology.num_devices)
        shards = sizes[0] * sizes[1] * sizes[2]
        microbatch = config.training.batch_size // config.training.gradient_accumulation
        assert config.training.batch_size % (config.training.gradient_accumulation * shards) == 0
        assert (
            config.layer_dropout.row_groups % (shards * config.training.gradient_accumulation) == 0
        )
        assert microbatch >= 2 * shards, "one row a shard would be dropped as a whole"
    if topology.chip.platform == "gpu":
        assert plan_step(config, topology).fits


def test_the_verb_prints_and_writes_the_plan(tmp_path, capsys):
    file = tmp_path / "plan.json"
    recipe = f"--config={CONFIGS / 'llama2_7b_scratch.py'}:h100"
    assert command.main([recipe, f"--json={file}", "--search=2"]) == 0
    printed = capsys.readouterr().out
    for words in ("by arithmetic only", "fsdp 32", "fits: ", "MFU at most", "Layouts that fit"):
        assert words in printed
    figures = json.loads(file.read_text())
    assert figures["by"] == "arithmetic" and figures["fits"]
    assert figures["total_bytes"] < figures["limit_bytes"]
    assert len(figures["search"]) == 2


def test_all_targets_make_one_table(tmp_path, capsys):
    file = tmp_path / "plans.json"
    arguments = ["--all", "--only=h100", f"--configs={CONFIGS}", f"--json={file}"]
    assert command.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "llama3_70b_continual" in printed and "h100:512 (arithmetic)" in printed
    assert len(json.loads(file.read_text())) == 2 * sum(t == "h100" for _, t in RECIPES)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["quickstart.py"], "no devices are named: add --topology=v5p:4x4x8"),
        (["quickstart.py", "--topology=h100:8"], "vocab_size=0 is read from the data"),
        (["llama2_7b_scratch.py", "--topology=h100"], "the sizes are missing; write h100:64"),
        (["llama2_7b_scratch.py:v7"], "no variant 'v7'; there is h100, plain, v5e"),
        (["llama2_7b_scratch.py:v5e-v5p"], "names more than one target"),
        (
            ["llama2_7b_scratch.py", "--topology=h100:8", "--config.mesh.shape.tensor=3"],
            "config.mesh.shape .* does not fit 8",
        ),
    ],
)
def test_a_plan_that_cannot_be_made_says_why(arguments, message):
    recipe, *rest = arguments
    with pytest.raises(ConfigError, match=message):
        command.main([f"--config={CONFIGS / recipe}", *rest])
