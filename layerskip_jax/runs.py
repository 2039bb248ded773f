"""The folder of a run: what lies where, and how a trained model is read back from it."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax

from layerskip_jax.config import RunConfig
from layerskip_jax.model.transformer import Transformer
from layerskip_jax.schema import UserError
from layerskip_jax.training.checkpoint import Checkpoints
from layerskip_jax.training.state import ModelDefinition, Parameters


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """Paths inside a run's folder.

    Attributes:
      path: the folder given as `--workdir`.
    """

    path: Path

    @property
    def config_file(self) -> Path:
        """The whole `RunConfig`, resolved, as JSON."""
        return self.path / "config.json"

    @property
    def data_file(self) -> Path:
        """The manifest of the data the run trains on."""
        return self.path / "data.json"

    @property
    def tokenizer_file(self) -> Path:
        """The tokenizer of that data."""
        return self.path / "tokenizer.json"

    @property
    def published(self) -> Path:
        """Small files of the published model the run began from; an export has them again."""
        return self.path / "published"

    def published_files(self) -> dict[str, bytes]:
        """Returns the files of `published` by name."""
        if not self.published.is_dir():
            return {}
        return {path.name: path.read_bytes() for path in sorted(self.published.iterdir())}

    @property
    def checkpoints(self) -> Path:
        """Orbax checkpoints, one folder a step."""
        return self.path / "checkpoints"

    @property
    def metrics_file(self) -> Path:
        """One JSON object a logged step; after a resumption the last line of a step counts."""
        return self.path / "metrics.jsonl"

    @property
    def evaluations_file(self) -> Path:
        """One JSON object an evaluation: step, and loss and perplexity by exit."""
        return self.path / "evaluations.jsonl"

    @property
    def speculation_file(self) -> Path:
        """What `layerskip sweep` measured, as JSON."""
        return self.path / "speculation.json"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard event files."""
        return self.path / "tensorboard"

    @property
    def wandb_file(self) -> Path:
        """The run's name at Weights & Biases, if it reports there."""
        return self.path / "wandb_run.txt"

    @property
    def skips_file(self) -> Path:
        """Batches left out of the order after roll-backs, see `BatchSource`."""
        return self.path / "skipped_batches.json"

    def skips(self) -> list[tuple[int, int]]:
        """Returns what `skips_file` holds."""
        if not self.skips_file.is_file():
            return []
        return [tuple(skip) for skip in json.loads(self.skips_file.read_text())]

    @property
    def logs(self) -> Path:
        """A log of JSON lines and a heartbeat of each process."""
        return self.path / "logs"

    @property
    def profiles(self) -> Path:
        """Traces of the device, one folder for each request."""
        return self.path / "profiles"

    @property
    def report_file(self) -> Path:
        """The HTML page of `layerskip report`."""
        return self.path / "report.html"


def is_run(path: Path) -> bool:
    """Returns whether a folder is a run's: its config.json tells it from Hugging Face's."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and {"model", "training"} <= config.keys()


def open_run(workdir: str | Path) -> tuple[RunFolder, RunConfig]:
    """Returns the folder and config of an existing run.

    Raises:
      UserError: `workdir` holds no run.
    """
    folder = RunFolder(Path(workdir))
    if not is_run(folder.path):
        raise UserError(
            f"--workdir={workdir} holds no run ({folder.config_file} is missing or another "
            "program's); train one with `layerskip train`, or bring one in with `layerskip import`"
        )
    return folder, RunConfig.from_dict(json.loads(folder.config_file.read_text()))


class TrainedRun(NamedTuple):
    """A run read back from its folder.

    Attributes:
      folder: its paths.
      config: its resolved config.
      definition: the model's structure.
      parameters: of the checkpoint, float32, on the first device.
      step: of the checkpoint.
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


def load_run(workdir: str | Path, step: int | None = None) -> TrainedRun:
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


def write_json(path: Path, value: Any) -> None:
    """Writes JSON beside `path` and moves it into place, so that no reader sees half of it."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text beside `path` and moves it into place."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def read_prompt(path: Path) -> str:
    """Returns a file's text.

    Raises:
      UserError: it cannot be read as UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompt-file={path} cannot be read as UTF-8 text ({error})") from error


def read_json_lines(path: Path) -> list[dict]:
    """Returns the objects of a JSON-lines file, the last one for each step, by step.

    A last line cut short by a crash is left out.
    """
    by_step = {}
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        by_step[record["step"]] = record
    return [by_step[step] for step in sorted(by_step)]
