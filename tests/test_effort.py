"""The tests' own settings: what they save, and what they leave as it is."""

import re

import jax
import numpy as np

from layerskip_jax.layer_dropout import LayerDropoutConfig
from layerskip_jax.training.setup import make_setup
from tests.helpers import (
    REAL_EFFORT,
    REAL_PROGRAM,
    SEQUENCE,
    random_batch,
    run_with_full_effort,
    small_model,
    small_run,
)

CONFIG = small_run(model=small_model(num_layers=2), layer_dropout=LayerDropoutConfig())


def _step(effort=None):
    """Compiles the step for two devices; returns it with its setup."""
    setup = make_setup(CONFIG, jax.devices()[:2])
    with jax.set_mesh(setup.mesh):
        return setup, setup.lower_step(SEQUENCE).compile(effort)


def test_little_effort_computes_the_same():
    """So losses may be tested with either."""
    losses = []
    for effort in (None, REAL_EFFORT):
        setup, step = _step(effort)
        with jax.set_mesh(setup.mesh):
            state, losses_of = setup.init(), []
            for index in range(2):
                state, metrics = step(state, setup.placement.place(random_batch(index)))
                losses_of.append(np.asarray(metrics.loss))
        losses.append(losses_of)
    np.testing.assert_allclose(*losses, rtol=1e-6)


def _instructions(text):
    """Returns a program's text without where in the sources it comes from."""
    lines = re.sub(r", metadata=\{[^}]*\}", "", text).splitlines()
    return [line for line in lines if re.match(r"\s+(ROOT )?%|%|ENTRY", line)]


def test_what_tests_read_is_what_users_get():
    """The program of `REAL_PROGRAM` here, and the one of a process without the tests' flags."""
    _, ours = _step(REAL_PROGRAM)
    # The flags of `tests.conftest` come too late here: jax has its devices already.
    code = (
        "import jax; jax.config.update('jax_num_cpu_devices', 8); jax.devices(); "
        "from tests.test_effort import _step; _, step = _step(); "
        "print(step.memory_analysis().temp_size_in_bytes); print(step.as_text())"
    )
    temporaries, text = run_with_full_effort("-c", code).split("\n", 1)
    assert int(temporaries) == ours.memory_analysis().temp_size_in_bytes > 0
    assert _instructions(text) == _instructions(ours.as_text())
    assert len(_instructions(text)) > 100
