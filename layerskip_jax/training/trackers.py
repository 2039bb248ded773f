"""Where the curves of a run go: TensorBoard, and Weights & Biases where that is asked for."""

import contextlib
import importlib.util
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from layerskip_jax.run_folder.paths import RunFolder
from layerskip_jax.schema import UserError


def check_wandb(project: str) -> None:
    """Checks that `config.training.wandb` can be obeyed.

    Raises:
      UserError: a project is named and the package is missing.
    """
    if project and importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"config.training.wandb={project} needs the package wandb, which is not installed; "
            "`pip install wandb`, or leave it empty"
        )


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
    """Lets tensorboardX be imported without torch.

    It would import torch wherever that is installed, in two seconds, for tensors that it is never
    given here.
    """
    hide = "torch" not in sys.modules
    if hide:
        sys.modules["torch"] = None  # type: ignore[assignment]  # as the import system has it
    try:
        yield
    finally:
        if hide:
            del sys.modules["torch"]


class _EventFile:
    """An event file of TensorBoard, written as the values come.

    tensorboardX's own writer hands them to a thread, and waits for it for ever once a full disk has
    ended that.
    """

    def __init__(self, folder: Path, first_step: int):
        """Begins a file; what earlier ones have from `first_step` on is not shown any more."""
        with _without_torch():
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto import event_pb2, summary_pb2
        self._event, self._summary = event_pb2, summary_pb2
        folder.mkdir(parents=True, exist_ok=True)
        self._file = EventsWriter(str(folder / "events"))
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(first_step, session_log=start)

    def add(self, values: Mapping[str, float], step: int) -> None:
        value = self._summary.Summary.Value
        points = [value(tag=name, simple_value=float(number)) for name, number in values.items()]
        self._write(step, summary=self._summary.Summary(value=points))

    def _write(self, step: int, **what: Any) -> None:
        self._file.write_event(self._event.Event(wall_time=time.time(), step=step, **what))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class Boards:
    """Curves by step, written where the run's folder and its config say."""

    def __init__(
        self, folder: RunFolder, *, first_step: int, project: str = "", config: dict | None = None
    ):
        """Opens both; a run that goes on continues its curves.

        Args:
          folder: the run's.
          first_step: the step gone on from.
          project: the project at Weights & Biases; empty for TensorBoard alone.
          config: the run's settings, to be shown there.

        Raises:
          UserError: Weights & Biases refuses, for want of a login for instance.
        """
        self._board = _EventFile(folder.tensorboard, first_step)
        self._wandb = None
        if not project:
            return
        import wandb

        if not folder.wandb_file.is_file():
            folder.wandb_file.write_text(uuid.uuid4().hex[:8])
        try:
            self._wandb = wandb.init(
                project=project,
                id=folder.wandb_file.read_text(),
                name=folder.home.name,
                resume="allow",
                dir=str(folder.path),
                config=config,
            )
        except wandb.errors.Error as error:
            self._board.close()
            raise UserError(
                f"config.training.wandb={project}: {error}. Log in, set WANDB_MODE=offline, or "
                "leave it empty"
            ) from error
        # By our own step: theirs may not go back to a checkpoint.
        self._wandb.define_metric("*", step_metric="step")

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Adds a point to each named curve."""
        self._board.add(values, step)
        if self._wandb:
            self._wandb.log({**values, "step": step})

    def close(self) -> None:
        """Writes what is left and closes both."""
        self._board.close()
        if self._wandb:
            self._wandb.finish()
