"""The folder of a run: what lies where."""

import dataclasses
import json
from pathlib import Path, PurePath
from typing import Any

from layerskip_jax.config import RunConfig, is_run_config
from layerskip_jax.run_folder.atomic import remedy, require_text_name
from layerskip_jax.run_folder.object_store import AnyPath, Spool, as_path, is_remote
from layerskip_jax.schema import UserError

_DATA_KEYS = {"end_token", "end_token_id"}


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """Paths inside a run's folder.

    Attributes:
      path: where its files are read and written: the folder given as `--workdir`, or the local
        side of it where that is on an object store.
      spool: what keeps the two alike; None for a folder on a disk.
    """

    path: Path
    spool: Spool | None = None

    @property
    def home(self) -> AnyPath:
        """The folder given as `--workdir`."""
        return self.path if self.spool is None else self.spool.remote

    def shown(self, file: Path) -> AnyPath:
        """Returns where the user has one of these files, to be named in messages."""
        return self.home / file.relative_to(self.path)

    def upload(self) -> None:
        """Brings what was written to an object store, if the folder is on one.

        Raises:
          UserError: that failed.
        """
        if self.spool is not None:
            self.spool.upload()

    def upload_soon(self, urgent: bool = False) -> None:
        """Does the same in the background, see `Spool.upload_soon`."""
        if self.spool is not None:
            self.spool.upload_soon(urgent)

    def close(self) -> None:
        """Brings the rest to an object store, see `Spool.close`."""
        if self.spool is not None:
            self.spool.close()

    @property
    def config_file(self) -> Path:
        """The whole `RunConfig`, resolved, as JSON."""
        return self.path / "config.json"

    @property
    def data_file(self) -> Path:
        """The manifest of the data the run trains on."""
        return self.path / "data.json"

    def data(self) -> dict[str, Any]:
        """Returns what `data_file` holds: `end_token`, its id, and what else the manifest has.

        Raises:
          UserError: it is missing or damaged.
        """
        file = self.shown(self.data_file)
        try:
            values = json.loads(self.data_file.read_bytes())
        except FileNotFoundError as error:
            raise UserError(
                f"{file} is missing; without it the end token and the tokenizer are unknown. Put "
                "a copy back: it is the manifest.json of the data that the run trained on"
            ) from error
        except OSError as error:
            raise UserError(f"{file} cannot be read ({error}){remedy(error)}") from error
        except ValueError as error:
            raise UserError(f"{file} is damaged ({error}); put a copy back") from error
        lacking = _DATA_KEYS - values.keys() if isinstance(values, dict) else _DATA_KEYS
        if lacking:
            keys = ", ".join(sorted(lacking))
            raise UserError(f"{file} is damaged (it lacks {keys}); put a copy back")
        return values

    @property
    def tokenizer_file(self) -> Path:
        """The tokenizer of that data."""
        return self.path / "tokenizer.json"

    @property
    def published(self) -> Path:
        """Small files of the published model the run began from; an export carries them along."""
        return self.path / "published"

    def published_files(self) -> dict[str, bytes]:
        """Returns the files of `published` by name."""
        if not self.published.is_dir():
            return {}
        return {path.name: path.read_bytes() for path in sorted(self.published.iterdir())}

    @property
    def checkpoints(self) -> AnyPath:
        """Orbax checkpoints, one folder a step; on an object store they lie there alone."""
        return self.home / "checkpoints"

    @property
    def compiled(self) -> AnyPath:
        """Compiled programs, which jax reads and writes itself."""
        return self.home / "compiled"

    @property
    def metrics_file(self) -> Path:
        """One JSON object a logged step; after a resumption the last line of a step counts.

        A number that is not finite is null, here and in the other files.
        """
        return self.path / "metrics.jsonl"

    @property
    def evaluations_file(self) -> Path:
        """One JSON object an evaluation: step, and loss and perplexity by exit.

        `sets` has the same of each of `config.data.validation`, by name, where there are any.
        """
        return self.path / "evaluations.jsonl"

    @property
    def tasks_file(self) -> Path:
        """One JSON object an evaluation on tasks: step, documents by task, metrics by exit."""
        return self.path / "tasks.jsonl"

    @property
    def speculation_file(self) -> Path:
        """What `layerskip sweep` measured, as JSON."""
        return self.path / "speculation.json"

    @property
    def exit_policies_file(self) -> Path:
        """The thresholds that `layerskip calibrate` found, as JSON."""
        return self.path / "exit_policies.json"

    @property
    def choices_figure(self) -> Path:
        """The figure of `layerskip evaluate --choices`."""
        return self.path / "choices.svg"

    @property
    def layers_needed_file(self) -> Path:
        """What `layerskip inspect` measured on the validation set, as JSON."""
        return self.path / "layers_needed.json"

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


# What other processes and later ones read of a run, beside its checkpoints.
FILES_READ = (
    "config.json", "data.json", "tokenizer.json", "metrics.jsonl", "evaluations.jsonl",
    "tasks.jsonl", "speculation.json", "skipped_batches.json", "wandb_run.txt", "plain.json",
    "layers_needed.json", "exit_policies.json", "published/",
)  # fmt: skip


def run_folder(workdir: str | PurePath, more: tuple[str, ...] = ()) -> RunFolder:
    """Returns a run's folder, its small files downloaded if it is on an object store.

    Args:
      workdir: the folder, which need not exist.
      more: files to download beside `FILES_READ`.

    Raises:
      UserError: the store cannot be reached, or the folder's name is no text.
    """
    path = as_path(workdir)
    if not is_remote(path):
        require_text_name(path.absolute())
        return RunFolder(path)
    spool = Spool(path, last="config.json")
    spool.fetch((*FILES_READ, *more))
    return RunFolder(spool.local, spool)


def is_run(path: AnyPath) -> bool:
    """Returns whether a folder is a run's: its config.json tells it from Hugging Face's.

    Raises:
      UserError: there is a config.json, and the system does not let it be read.
    """
    file = path / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error}){remedy(error)}") from error
    return is_run_config(config)


def require_own_folder(workdir: str | PurePath) -> None:
    """Refuses to train in a folder of another program's, such as a published model's.

    Raises:
      UserError: it is one.
    """
    path = as_path(workdir)
    if (path / "config.json").is_file() and not is_run(path):
        raise UserError(
            f"--workdir={workdir} holds another program's config.json, and no run; take a new "
            f"folder, and start from a model there with --config.init_from={workdir}"
        )


def open_run(workdir: str | PurePath) -> tuple[RunFolder, RunConfig]:
    """Returns the folder and config of an existing run.

    Raises:
      UserError: `workdir` holds no run.
    """
    folder = run_folder(workdir)
    if not is_run(folder.path):
        raise UserError(
            f"--workdir={workdir} holds no run ({folder.shown(folder.config_file)} is missing or "
            "another program's); train one with `layerskip train`, or bring one in with "
            "`layerskip import`"
        )
    return folder, RunConfig.of_run(json.loads(folder.config_file.read_text()))


def read_prompt(path: Path, option: str = "--prompt-file") -> str:
    """Returns a file's text, without the byte-order mark that some editors put before it.

    Args:
      path: the file.
      option: what named it.

    Raises:
      UserError: it cannot be read as UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8").removeprefix("\ufeff")
    except OSError as error:
        raise UserError(f"{option}={path} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{option}={path} is not UTF-8 text ({error})") from error


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
