"""Small models, configs and batches that several tests share."""

import dataclasses
import functools
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
from jax.extend.core import jaxprs_in_params

from layerskip_jax.config import RunConfig, TrainingConfig
from layerskip_jax.early_exit_loss import EarlyExitConfig
from layerskip_jax.layer_dropout import LayerDropoutConfig
from layerskip_jax.model.config import ModelConfig
from layerskip_jax.run_folder.paths import RunFolder
from layerskip_jax.training.setup import TrainSetup, make_setup
from layerskip_jax.training.step import Batch

SEQUENCE = 12
# How programs are compiled whose text or memory is read: to what users get, up to the code that is
# generated from it, as `tests/test_effort.py` shows.
REAL_PROGRAM = {"xla_cpu_use_fusion_emitters": True}
REAL_EFFORT = {
    **REAL_PROGRAM,
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
    "xla_cpu_parallel_codegen_split_count": 32,
}
# Of a run of 12 steps with a save every fifth, which many tests stop, damage or go on with.
RUN_RECIPE = """
from layerskip_jax.config import as_variant, default_config


def get_config(variant=""):
    config = default_config()
    config.model.num_layers = 4
    config.model.model_dim = 32
    config.model.ffn_dim = 48
    config.model.num_heads = 4
    config.model.num_kv_heads = 2
    config.model.max_sequence_length = 64
    config.model.dtype = "float32"
    config.layer_dropout.p_max = 0.4
    config.layer_dropout.time_schedule = "exp"
    config.layer_dropout.row_groups = 8
    config.early_exit.curriculum = "rotational"
    config.early_exit.rotation_interval = 2
    config.optimizer.learning_rate = 3e-3
    config.training.steps = 12
    config.training.batch_size = 24
    config.training.log_every = 1
    config.checkpoint.every_steps = 5
    return as_variant(config, variant)
"""
QUICKSTART_RECIPE = """
from layerskip_jax.config import as_variant, default_config


def get_config(variant=""):
    config = default_config()
    config.model.num_layers = 4
    config.model.model_dim = 48
    config.model.ffn_dim = 96
    config.model.num_heads = 4
    config.model.num_kv_heads = 2
    config.model.max_sequence_length = 256
    config.model.dtype = "float32"
    config.layer_dropout.p_max = 0.2
    config.layer_dropout.row_groups = 8
    config.early_exit.curriculum = "rotational"
    config.early_exit.rotation_interval = 2
    config.optimizer.learning_rate = 1e-2
    config.training.batch_size = 8
    config.training.evaluate_every = 40
    config.training.evaluate_batches = 2
    return as_variant(config, variant)
"""


def go_back(workdir: Path) -> None:
    """Takes the last two checkpoints of a run by `RUN_RECIPE` away: it goes on from step 5."""
    for step in (10, 12):
        shutil.rmtree(RunFolder(workdir).checkpoints / str(step))


def small_model(**changes) -> ModelConfig:
    """A float32 grouped-query model of four layers."""
    settings = {
        "vocab_size": 64,
        "num_layers": 4,
        "model_dim": 32,
        "ffn_dim": 64,
        "num_heads": 4,
        "num_kv_heads": 2,
        "dtype": "float32",
    }
    return ModelConfig(**{**settings, **changes})


def small_run(**changes) -> RunConfig:
    """A run with layer dropout and rotating exits on `small_model`, 16 rows a step."""
    settings = {
        "model": small_model(),
        "layer_dropout": LayerDropoutConfig(p_max=0.5, row_groups=8),
        "early_exit": EarlyExitConfig("rotational", rotation_interval=2),
        "training": TrainingConfig(steps=20, batch_size=16),
    }
    return RunConfig(**{**settings, **changes})


def with_training(config: RunConfig, **changes) -> RunConfig:
    """The run with some of its training settings changed."""
    return dataclasses.replace(config, training=dataclasses.replace(config.training, **changes))


def random_batch(seed: int, rows: int = 16, vocab: int = 64, length: int = SEQUENCE):
    """Random packed rows with uneven numbers of valid tokens, as `BatchSource` gives them."""
    random = np.random.default_rng(seed)
    tokens = random.integers(0, vocab, (rows, length + 1)).astype(np.int32)
    segments = np.sort(random.integers(1, 4, (rows, length)), axis=1).astype(np.int32)
    starts = np.diff(segments, axis=1, prepend=0) != 0
    index = np.arange(length)
    first = np.maximum.accumulate(np.where(starts, index, 0), axis=1)
    share = random.uniform(0.1, 1, (rows, 1))
    return Batch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        valid=random.random((rows, length)) < share,
        segment_ids=segments,
        positions=(index - first).astype(np.int32),
    )


@functools.lru_cache(maxsize=4)
def _compiled(config: RunConfig, devices: int):
    """Several tests in turn begin with the same run."""
    setup: TrainSetup = make_setup(config, jax.devices()[:devices])
    with jax.set_mesh(setup.mesh):
        return setup, setup.compile_step(SEQUENCE)


def run_steps(config: RunConfig, steps: int, devices: int = 1, batch=random_batch):
    """Trains on random batches and returns the setup, the last state and all metrics."""
    setup, step = _compiled(config, devices)
    history = []
    with jax.set_mesh(setup.mesh):
        state = setup.init()
        for index in range(steps):
            rows = batch(index, rows=config.training.batch_size)
            rows = Batch(*(array[setup.placement.rows] for array in rows))
            state, metrics = step(state, setup.placement.place(rows))
            history.append(jax.device_get(metrics))
    return setup, state, history


def run_with_full_effort(*arguments) -> str:
    """Runs python with these arguments, its programs compiled as users have them.

    For tests that compute much: what little effort makes of bfloat16 takes six times as long.
    Returns what it prints.
    """
    repository = Path(__file__).parents[1]
    environment = {
        **os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(repository),
    }  # fmt: skip
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def products_of(jaxpr, trips):
    """FLOPs of the matrix products in a jaxpr; `trips` are turned in loops of unknown length."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            a = equation.invars[0].aval.shape
            total += 2 * equation.outvars[0].aval.size * math.prod(a[d] for d in contracted)
        factor = {"scan": equation.params.get("length", 1), "while": trips}
        for inner in jaxprs_in_params(equation.params):
            total += factor.get(equation.primitive.name, 1) * products_of(inner, trips)
    return total
