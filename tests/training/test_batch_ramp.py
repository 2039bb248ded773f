"""Runs whose batch doubles at some steps: resumed, counted, refused."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from layerskip_jax.cli import main
from layerskip_jax.config import MeshConfig, RunConfig
from layerskip_jax.distributed.mesh import MeshShape
from layerskip_jax.hardware.topology import parse_topology
from layerskip_jax.layer_dropout import LayerDropoutConfig
from layerskip_jax.planning.arithmetic import calculate_step
from layerskip_jax.run_folder.paths import RunFolder, read_json_lines
from layerskip_jax.schema import ConfigError
from layerskip_jax.training.flops import CostModel
from layerskip_jax.training.initialize import open_initial
from layerskip_jax.training.restore import load_run
from layerskip_jax.training.setup import make_setup
from tests.helpers import small_run, with_training

RAMP = [
    "--config.training.batch_size=32", "--config.training.batch_ramp=(2, 5)",
    "--config.training.steps=7", "--config.checkpoint.every_steps=2", "--config.checkpoint.keep=9",
    "--config.layer_dropout.execution=mask",  # compiled in half the time; draws the same
]  # fmt: skip


@pytest.fixture(scope="module")
def grown(arguments, tmp_path_factory):
    """A run of 8, 8, 16, 16, 16, 32 and 32 windows that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("grown") / "run"
    assert main(["train", f"--workdir={workdir}", *arguments, *RAMP]) == 0
    return workdir


def messages(workdir):
    lines = (RunFolder(workdir).logs / "process-0.jsonl").read_text().splitlines()
    return [json.loads(line)["message"] for line in lines]


def test_a_step_is_compiled_for_each_size_and_said(grown):
    said = messages(grown)
    for windows in (8, 16, 32):
        begin = f"compiled the train step for {windows} windows in"
        assert sum(line.startswith(begin) for line in said) == 1
    assert "batch ramp: 8 windows a step from step 1 to 2" in said
    assert "batch ramp: 16 windows a step from step 3 to 5" in said


def test_tokens_and_flops_are_those_of_the_windows(grown):
    records = read_json_lines(RunFolder(grown).metrics_file)
    windows = [8, 16, 32, 48, 64, 96, 128]
    assert [record["tokens"] for record in records] == [12 * count for count in windows]
    cost = CostModel(load_run(grown).config, 12)
    plain = cost.step(1.0, 0, rows=1)
    for record, rows in zip(records, (8, 8, 16, 16, 16, 32, 32), strict=True):
        # one early exit a step (layer 0 has no weight) and the layers that ran
        one = plain.exits * 2 + (plain.layers + plain.attention) * record["layers_run"]
        assert record["step_flops"] == pytest.approx(rows * one, rel=1e-6)
    steps = [cost.planned(step, step + 1).needed for step in range(7)]
    assert steps == pytest.approx([record["step_flops_planned"] for record in records])
    assert cost.planned(0, 7).needed == pytest.approx(np.mean(steps))
    assert cost.planned(0, 7).computed == pytest.approx(
        np.mean([cost.planned(step, step + 1).computed for step in range(7)])
    )


@pytest.mark.parametrize("step", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_a_run_goes_on_bit_for_bit_where_its_batch_grows(grown, arguments, tmp_path, step):
    """From the very step of the first change, and from within the stretch before the second."""
    workdir = shutil.copytree(grown, tmp_path / "run")
    for entry in RunFolder(workdir).checkpoints.iterdir():
        if int(entry.name) > step:
            shutil.rmtree(entry)
    assert main(["train", f"--workdir={workdir}", *arguments, *RAMP]) == 0
    assert f"going on from the checkpoint of step {step}" in messages(workdir)
    jax.tree.map(
        np.testing.assert_array_equal, load_run(grown).parameters, load_run(workdir).parameters
    )
    keys = ("step", "loss", "exit_loss", "layers_run", "tokens", "batches")
    first, second = (read_json_lines(RunFolder(run).metrics_file) for run in (grown, workdir))
    assert [[r[k] for k in keys] for r in first] == [[r[k] for k in keys] for r in second]


def test_another_ramp_is_another_run_and_passes_over_the_data_give_its_steps(
    grown, arguments, tmp_path, capsys
):
    flags = [flag for flag in RAMP if "ramp" not in flag]
    other = [*arguments, *flags, "--config.training.batch_ramp=(3, 5)"]
    assert main(["train", f"--workdir={grown}", *other]) == 2
    assert "config.training.batch_ramp: [2, 5] -> [3, 5]" in capsys.readouterr().err
    # 64 windows in the first five steps, and the rest of the epoch by 32.
    count = json.loads((grown / "data.json").read_text())["train"]["windows"]
    epoch = [*arguments, *RAMP, "--config.training.epochs=1", f"--workdir={grown}"]
    assert main(["train", *epoch]) == 2
    steps = 5 + -(-(count - 64) // 32)
    assert f"cannot become one of {steps}" in capsys.readouterr().err


def ramped(**changes) -> RunConfig:
    return with_training(small_run(), batch_ramp=(2, 5), **changes)


@pytest.mark.parametrize(
    "accumulation, rows, microbatches",
    [(1, 0, {4: 1, 8: 1, 16: 1}), (4, 0, {4: 1, 8: 2, 16: 4}), (0, 2, {4: 1, 8: 2, 16: 4})],
)
def test_microbatches_are_as_few_as_are_no_larger_than_the_full_ones(
    accumulation, rows, microbatches
):
    config = ramped(gradient_accumulation=accumulation, rows_per_device=rows)
    dropout = LayerDropoutConfig(p_max=0.5, row_groups=4, execution="mask")
    config = dataclasses.replace(config, layer_dropout=dropout)
    setup = make_setup(config, jax.devices()[: 1 if accumulation else 2])
    for size, count in microbatches.items():
        of_size = setup.of_batch(size)
        assert of_size.abstract_batch(12).tokens.shape == (count, size // count, 12)
        assert len(of_size.placement.rows) == size
        assert of_size.config.training.gradient_accumulation == count


@pytest.mark.parametrize(
    "config, devices, message",
    [
        (ramped(), 1, r"has batches of 4 windows: .*row_groups=8 must divide the batch of 4 rows"),
        (
            dataclasses.replace(ramped(), layer_dropout=LayerDropoutConfig()), 8,
            r"batch_ramp=\(2, 5\) has batches of 4 windows: .* not divisible by the 8 batch shards",
        ),
    ],
)  # fmt: skip
def test_a_ramp_that_does_not_fit_is_refused_by_name(config, devices, message):
    with pytest.raises(ConfigError, match=message):
        make_setup(config, jax.devices()[:devices])


@pytest.mark.parametrize(
    "ramp, message",
    [
        ((5, 2), r"batch_ramp=\(5, 2\) must name later and later steps"),
        ((2, 2), "must name later and later steps"),
        ((0, 2), "batch_ramp=0 must be at least 1"),
        ((1, 2, 3, 4, 5), "batch_size=16 cannot be reached by the 5 doublings"),
    ],
)
def test_steps_of_a_ramp_are_checked(ramp, message):
    with pytest.raises(ConfigError, match=message):
        with_training(small_run(), batch_ramp=ramp)


def test_a_plan_is_of_the_full_batch():
    topology = parse_topology("h100:8")
    mesh = MeshConfig(MeshShape(data=4, fsdp=2))
    config = dataclasses.replace(small_run(), mesh=mesh)
    with_ramp, without = (
        calculate_step(with_training(config, batch_ramp=ramp), topology, 16) for ramp in ((2,), ())
    )
    assert with_ramp.memory == without.memory
    assert with_ramp.flops_needed == without.flops_needed


def test_a_branch_says_where_its_batches_are_others(finished, tmp_path, caplog):
    """Five steps of 24 windows; twice as many from there on go on from them."""
    config = load_run(finished).config
    config = dataclasses.replace(config, init_from=str(finished), init_step=5, init_state="all")
    for ramp, warned in (((5,), False), ((), True)):
        branch = with_training(config, batch_size=48, batch_ramp=ramp)
        setup = make_setup(branch, jax.devices())
        assert int(open_initial(branch, tmp_path / "new").branch(setup).step) == 5
        text = "the 5 steps before this branch have 240 windows by its own batch sizes, and had 120"
        assert (text in caplog.text) == warned
