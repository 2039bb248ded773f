"""A trained model, read back from the folder of its run."""

from pathlib import PurePath
from typing import NamedTuple

import jax

from layerskip_jax.config import RunConfig
from layerskip_jax.model.definition import ModelDefinition, Parameters
from layerskip_jax.model.transformer import Transformer
from layerskip_jax.run_folder.paths import RunFolder, open_run
from layerskip_jax.training.checkpoint import Checkpoints


class TrainedRun(NamedTuple):
    """A run read back from its folder.

    Attributes:
      folder: its paths.
      config: its resolved config.
      definition: the model's structure.
      parameters: the checkpoint's parameters, float32, on the first device.
      step: the checkpoint's step.
    """

    folder: RunFolder
    config: RunConfig
    definition: ModelDefinition
    parameters: Parameters
    step: int

    @property
    def model(self) -> Transformer:
        """The model with these parameters."""
        return self.definition.model(self.parameters)


def load_run(workdir: str | PurePath, step: int | None = None) -> TrainedRun:
    """Reads a run's config and the parameters of a checkpoint.

    Args:
      workdir: the run's folder.
      step: the checkpoint; None takes the newest.

    Raises:
      UserError: no such run or checkpoint.
    """
    folder, config = open_run(workdir)
    definition = ModelDefinition(config.model)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    template = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
        definition.shapes,
    )
    checkpoints = Checkpoints(folder.checkpoints)
    step = checkpoints.require_step(step)
    parameters = checkpoints.restore_parameters(step, template)
    checkpoints.close()
    return TrainedRun(folder, config, definition, parameters, step)
