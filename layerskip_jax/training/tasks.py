"""Evaluations on tasks within a run: what `train` asks of the room that knows lm-eval.

That room builds on this one, so it is handed in: `train(..., open_tasks=...)`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from layerskip_jax.config import RunConfig
from layerskip_jax.data.manifest import Manifest
from layerskip_jax.model.definition import Parameters
from layerskip_jax.schema import require
from layerskip_jax.training.setup import TrainSetup

# Yields what it is given, and is where a run may be stopped, and is seen to live.
Watch = Callable[[Iterable[Any]], Iterator[Any]]


# The tasks of a run, opened: given the parameters as they lie in training, and a `Watch` for what
# takes long, it returns in every process alike `documents`, their number by task, and `exits`: for
# each exit asked for, shallowest first, `layers` and `tasks`, by task a number by metric.
TaskScorer = Callable[[Parameters, Watch], dict[str, Any]]
# Opens the tasks of `config.evaluation` for a run, its data, and the files of the published model
# that it began from, before anything is computed; raises UserError for those that cannot be had or
# scored.
OpenTasks = Callable[[TrainSetup, Manifest, Mapping[str, bytes]], TaskScorer]


def opened_tasks(
    setup: TrainSetup,
    manifest: Manifest,
    published: Mapping[str, bytes],
    open_tasks: OpenTasks | None,
) -> TaskScorer | None:
    """Returns the tasks of a run, None where it has none.

    Raises:
      ConfigError: nothing was handed in to open them, or there is no such exit.
      UserError: they cannot be opened.
    """
    asked, layers = setup.config.evaluation, setup.config.model.num_layers
    if not asked.tasks:
        return None
    for exit_layer in asked.exits:
        require(
            exit_layer <= layers,
            f"config.evaluation.exits={asked.exits}: the model's exits are 1 to {layers}",
        )
    require(
        open_tasks is not None,
        f"config.evaluation.tasks={asked.tasks}: `layerskip train` evaluates them; a program of "
        "its own gives train() open_tasks=layerskip_jax.evaluation.training_tasks.TrainingTasks",
    )
    return open_tasks(setup, manifest, published)


def task_exits(config: RunConfig) -> tuple[int, ...]:
    """Returns the exits that the tasks are evaluated at, in layers run, shallowest first."""
    return tuple(sorted(config.evaluation.exits)) or (config.model.num_layers,)
