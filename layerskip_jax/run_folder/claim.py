"""Claiming a folder for a run, so that a run only ever goes on with what it began with."""

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath

import jax

from layerskip_jax.config import RunConfig, differences
from layerskip_jax.run_folder.atomic import remedy, write_bytes, write_json
from layerskip_jax.run_folder.object_store import AnyPath
from layerskip_jax.run_folder.paths import RunFolder, run_folder
from layerskip_jax.schema import UserError, changeable_keys

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def opened_workdir(workdir: str | PurePath) -> Iterator[RunFolder]:
    """Yields the folder of a run to be trained; where it is on an object store, uploads the rest.

    Raises:
      UserError: the store cannot be reached, or failed in the end.
    """
    # A process goes on with its own log.
    folder = run_folder(workdir, more=(f"logs/process-{jax.process_index()}.jsonl",))
    try:
        yield folder
    except BaseException:
        try:
            folder.close()
        except UserError as error:
            logger.error("%s", error)  # what came first is what is raised
        raise
    folder.close()


# What the length of a run is set by.
LENGTH = ("config.training.steps:", "config.training.epochs:")


def check_workdir(
    folder: RunFolder,
    config: RunConfig,
    manifest: dict,
    refuse_length: Callable[[RunConfig, RunConfig, int], None] | None = None,
) -> None:
    """Checks, before anything is written, that `folder` is free or holds this very run.

    Args:
      folder: the run's folder, which need not exist.
      config: the resolved config.
      manifest: what the data is, as plain values; its `fingerprint` identifies it.
      refuse_length: raises UserError unless the run in the folder may become one of another length,
        given its config, the new one, and the steps of its newest checkpoint. Without it, it may
        not.

    Raises:
      UserError: it holds a run with another config or other data, or something else.
    """
    if folder.config_file.is_file():
        begun = _config_of(folder)
        changes = differences(begun.to_dict(), config.to_dict())
        free = tuple(key if key.endswith(".") else f"{key}:" for key in changeable_keys(RunConfig))
        lines = [line for line in changes if not line.startswith(free)]
        if lines and refuse_length and all(line.startswith(LENGTH) for line in lines):
            refuse_length(begun, config, _steps_done(folder))
            lines = []
        if lines:
            raise UserError(
                f"--workdir={folder.home} holds a run with another config:\n  "
                + "\n  ".join(lines)
                + "\nTake another --workdir for the new config, or set these back to go on."
            )
        old = json.loads(folder.data_file.read_text())
        if old["fingerprint"] != manifest["fingerprint"]:
            raise UserError(
                f"--workdir={folder.home} holds a run on other data (fingerprint "
                f"{old['fingerprint'][:12]}, not {manifest['fingerprint'][:12]}); point "
                "--config.data.path at the data it began with, or take another --workdir"
            )
        return
    home = folder.home
    if home.is_dir():
        ours = {folder.data_file.name, folder.tokenizer_file.name, folder.published.name}
        others = sorted(p.name for p in home.iterdir() if not _is_temporary(p))
        if not ours.issuperset(others):
            raise UserError(
                f"--workdir={home} is not empty and holds no run (it has "
                f"{', '.join(others[:3])}); take a new folder"
            )
    elif home.exists():
        raise UserError(f"--workdir={home} is a file; take a folder")


def _steps_done(folder: RunFolder) -> int:
    """Returns the step of the newest checkpoint; 0 without one."""
    saved = folder.checkpoints.iterdir() if folder.checkpoints.is_dir() else ()
    return max((int(entry.name) for entry in saved if entry.name.isdigit()), default=0)


def _config_of(folder: RunFolder) -> RunConfig:
    """Returns the run's config; settings newer than the run take their defaults."""
    return RunConfig.of_run(json.loads(folder.config_file.read_text()))


def claim_workdir(
    folder: RunFolder,
    config: RunConfig,
    manifest: dict,
    tokenizer_file: Path,
    published: dict[str, bytes] | None = None,
) -> None:
    """Creates the folder and writes what identifies the run, the config last.

    Args:
      folder: the run's folder.
      config: the resolved config.
      manifest: what the data is, as plain values.
      tokenizer_file: the data's tokenizer.
      published: files by name of the model that the run starts from, see `RunFolder.published`.

    Raises:
      UserError: the folder cannot be written.
    """
    with claiming(folder):
        folder.path.mkdir(parents=True, exist_ok=True)
        if not folder.tokenizer_file.exists():
            write_bytes(folder.tokenizer_file, tokenizer_file.read_bytes())
        write_published(folder, published or {})
        write_json(folder.data_file, manifest)
        write_json(folder.config_file, config.to_dict())
    folder.upload()


@contextlib.contextmanager
def claiming(folder: RunFolder) -> Iterator[None]:
    """Names the folder in what the disk refuses while it is claimed."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"--workdir={folder.home} cannot be written ({error.strerror}: {error.filename})"
            f"{remedy(error)}"
        ) from error


def write_published(folder: RunFolder, files: dict[str, bytes]) -> None:
    """Writes `RunFolder.published`, unless it is there already."""
    if not files or folder.published.exists():
        return
    temporary = folder.path / f".published.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    for name, content in files.items():
        (temporary / name).write_bytes(content)
    os.rename(temporary, folder.published)


def _is_temporary(path: AnyPath) -> bool:
    return path.name.startswith(".")
