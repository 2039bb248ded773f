"""layerskip train: pretrain a model, or go on where a run was stopped.

usage: layerskip train --workdir=RUN --config=RECIPE[:VARIANT] [--config.a.b=value ...]

The same command goes on from the newest checkpoint in RUN, with the batches the run would
have seen. It exits with 75 when a signal stopped it before the last step.
The scripts of `launch/` start several processes of it, on one machine or a cluster, and restart
them.
"""

import os

from layerskip_jax.commands.arguments import split_config_arguments
from layerskip_jax.commands.lm_eval import lm_eval_needed
from layerskip_jax.config import RunConfig, load_config
from layerskip_jax.distributed.processes import start_processes
from layerskip_jax.hardware.chips import GPU_MEMORY
from layerskip_jax.run_folder.paths import require_own_folder
from layerskip_jax.training.initialize import open_initial
from layerskip_jax.training.tasks import OpenTasks
from layerskip_jax.training.train import train


def main(argv: list[str]) -> int:
    """Runs the verb and returns its exit code."""
    parser, config_arguments, arguments = split_config_arguments("train", __doc__, argv)
    parser.add_argument("--workdir", required=True, help="folder of the run")
    options = parser.parse_args(arguments)
    # Read when jax first looks for devices: of a GPU's memory it takes three quarters otherwise.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(GPU_MEMORY))
    start_processes()
    config = load_config(config_arguments)
    require_own_folder(options.workdir)
    initial = open_initial(config, options.workdir) if config.init_from else None
    return train(config, options.workdir, initial, _open_tasks(config))


def _open_tasks(config: RunConfig) -> OpenTasks | None:
    """Returns what opens the run's tasks; lm-eval is imported only where there are any."""
    if not config.evaluation.tasks:
        return None
    with lm_eval_needed(f"config.evaluation.tasks={config.evaluation.tasks}: lm-eval"):
        from layerskip_jax.evaluation.training_tasks import TrainingTasks
    return TrainingTasks
