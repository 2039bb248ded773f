"""The tests' own settings: what they save, and what they leave as it is."""

import jax

from layerskip_jax.layer_dropout import LayerDropoutConfig
from layerskip_jax.training.setup import make_setup
from tests.helpers import REAL_EFFORT, SEQUENCE, small_model, small_run


def test_little_effort_leaves_the_optimised_program_and_its_memory_as_they_are():
    """Only the code that is generated from it differs, so losses may be tested with either."""
    config = small_run(model=small_model(num_layers=2), layer_dropout=LayerDropoutConfig())
    setup = make_setup(config, jax.devices()[:2])
    with jax.set_mesh(setup.mesh):
        lowered = setup.lower_step(SEQUENCE)
        little, real = lowered.compile(), lowered.compile(REAL_EFFORT)
    assert little.as_text() == real.as_text()
    sizes = [program.memory_analysis().temp_size_in_bytes for program in (little, real)]
    assert sizes[0] == sizes[1] > 0
