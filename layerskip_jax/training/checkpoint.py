"""Orbax checkpoints of a run: asynchronous, sharded, restored onto any mesh, and verified."""

import contextlib
import datetime
import errno
import json
import logging
import os
import time
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
import tensorstore as ts

from layerskip_jax import __version__
from layerskip_jax.distributed.processes import end_for_restart
from layerskip_jax.model.definition import Parameters
from layerskip_jax.ops.checksum import tree_checksums
from layerskip_jax.run_folder.atomic import remedy
from layerskip_jax.run_folder.object_store import (
    AnyPath,
    absolute,
    is_remote,
    kvstore,
    move_folder,
    named_failures,
)
from layerskip_jax.run_folder.orbax_s3 import teach_orbax_s3
from layerskip_jax.schema import UserError, require_whole

logger = logging.getLogger(__name__)

AtomicityMode = ocp.options.AtomicityMode
PARAMETERS, OPTIMIZER, RECORD = "parameters", "optimizer", "record"

# Arrays are stored in pieces of at most so many bytes, so that reading a layer of a large model
# does not mean reading a device's share of all of them.
PIECE_BYTES = 2**26


# What errors say that are not of a checkpoint, but of the machine or the network that reads it.
_NUMBERS = (
    errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE,
    errno.ETIMEDOUT, errno.ECONNREFUSED, errno.ECONNRESET,
)  # fmt: skip
_NO_DAMAGE = (
    "RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "PERMISSION_DENIED",
    "UNAUTHENTICATED", *map(os.strerror, _NUMBERS),
)  # fmt: skip


def _pieces(leaf: jax.Array) -> ocp.SaveArgs:
    return ocp.SaveArgs(chunk_byte_size=max(PIECE_BYTES, leaf.dtype.itemsize), shard_axes=(0,))


class Checkpoints:
    """The numbered checkpoints of one run.

    A checkpoint holds two items: `parameters`, a nested dict of arrays, and `optimizer`, so
    that evaluation and export read the one without the other. Its number is the count of
    optimizer steps done; that number alone fixes the next batch. Beside them lies a `record`:
    the version of this package, what the run says of itself, and a checksum of every array,
    which `restore_newest` holds what it reads against.
    """

    def __init__(
        self,
        folder: AnyPath,
        *,
        every_steps: int = 1,
        keep: int | None = None,
        keep_every_steps: int = 0,
        keep_every_hours: float = 0.0,
        on_failure: str = "stop",
        about: dict | None = None,
    ):
        """Opens the folder, creating it if `keep` is given (that is, to write).

        Args:
          folder: where the checkpoints are.
          every_steps: steps between two saves.
          keep: the number kept; None opens an existing folder to read.
          keep_every_steps: checkpoints of multiples of it are kept beside those; 0 keeps none.
          keep_every_hours: the first checkpoint so many hours after the last one kept for this
            reason stays too; 0 keeps none.
          on_failure: `stop` raises what goes wrong in a save, `continue` logs it.
          about: plain values for the record.
        """
        self._writes = keep is not None
        if not self._writes and not folder.is_dir():
            raise UserError(f"{folder} does not exist; the run has saved nothing yet")
        self._every_steps, self._on_failure = every_steps, on_failure
        self._about = about or {}
        atomicity, self._failures = None, (OSError, ValueError, RuntimeError)
        if is_remote(folder):
            teach_orbax_s3()
            # Nothing is renamed there: a checkpoint counts once it holds a file that says so.
            atomicity = ocp.options.AtomicityOptions(mode=AtomicityMode.COMMIT_FILE)
            self._failures = (Exception,)  # the packages that reach a store share no class
        interval = datetime.timedelta(hours=keep_every_hours)
        self._options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            keep_period=keep_every_steps or None,
            keep_time_interval=interval or None,
            create=self._writes,
            read_only=not self._writes,
            enable_async_checkpointing=self._writes,
            atomicity_options=atomicity,
            # Made before the loop goes on: orbax's writers would wait ten minutes, past the end of
            # the process, for a folder that a background thread was not allowed to make.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        )
        self._folder = folder
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(
            absolute(self._folder),
            options=self._options,
            item_names=(PARAMETERS, OPTIMIZER, RECORD),
        )

    @property
    def latest_step(self) -> int | None:
        """The newest complete checkpoint's step, or None."""
        return self._manager.latest_step()

    def is_due(self, step: int) -> bool:
        """Returns whether `save` would save this step without being forced to."""
        return step % self._every_steps == 0 and step not in self._manager.all_steps()

    def save(
        self,
        step: int,
        parameters: Parameters,
        optimizer: Any | None,
        *,
        force: bool = False,
        counts: dict | None = None,
    ) -> bool:
        """Starts saving if `step` is due (or `force`), and returns whether it did.

        Without an optimizer the checkpoint can be evaluated and started from, not gone on from.
        `counts` are further plain values for the record. A failure of an earlier asynchronous save
        shows here, at the latest in `close`.

        Raises:
          UserError: this save or the one before failed, unless failures are only logged. One that
            is forced, and so the run's last, is never only logged.
        """
        if step in self._manager.all_steps() or not (force or self.is_due(step)):
            return False
        items = {PARAMETERS: ocp.args.StandardSave(parameters, jax.tree.map(_pieces, parameters))}
        if optimizer is not None:
            items[OPTIMIZER] = ocp.args.StandardSave(optimizer)
            record = {"version": __version__, "step": step, **self._about, **(counts or {})}
            record["checksums"] = tree_checksums((parameters, optimizer))
            items[RECORD] = ocp.args.JsonSave(record)
        stops = self._on_failure == "stop"
        with self._named_failures(stops):
            self._manager.wait_until_finished()  # the save before, whose end may have failed
        with self._named_failures(stops or force):
            return self._manager.save(step, args=ocp.args.Composite(**items), force=True)
        return False

    def restore(self, step: int, parameters: Parameters, optimizer: Any) -> tuple[Parameters, Any]:
        """Restores both items, each leaf with the shape, dtype and sharding of its template.

        Raises:
          UserError: what was read is not what was saved.
        """
        items = ocp.args.Composite(
            **{
                PARAMETERS: ocp.args.StandardRestore(parameters),
                OPTIMIZER: ocp.args.StandardRestore(optimizer),
            }
        )
        # A checkpoint of an earlier version has no record; a later one without it is damaged.
        expected = None
        if self._record_file(step).parent.exists() or RECORD in self._listed_items(step):
            expected = self.record(step)["checksums"]
        restored = self._manager.restore(step, args=items)
        if expected is not None:
            actual = tree_checksums((restored[PARAMETERS], restored[OPTIMIZER]))
            wrong = [path for path in expected if actual.get(path) != expected[path]]
            if wrong or actual.keys() != expected.keys():
                raise UserError(f"checksums differ for {', '.join(wrong[:3]) or 'other arrays'}")
        return restored[PARAMETERS], restored[OPTIMIZER]

    def record(self, step: int) -> dict:
        """Returns the record of a checkpoint, empty where it has none."""
        file = self._record_file(step)
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}

    def _record_file(self, step: int) -> AnyPath:
        return self._folder / str(step) / RECORD / "metadata"

    def _listed_items(self, step: int) -> list[str]:
        """Returns the items that orbax's own metadata of a checkpoint names."""
        file = self._folder / str(step) / "_CHECKPOINT_METADATA"
        return list(json.loads(file.read_text(encoding="utf-8")).get("item_handlers") or ())

    def restore_newest(
        self, parameters: Parameters, optimizer: Any
    ) -> tuple[int, Parameters, Any] | None:
        """Restores the newest checkpoint that is whole, and moves damaged newer ones aside.

        They go to a folder beside the checkpoints, so that their steps can be saved again.

        Args:
          parameters: template, see `restore`.
          optimizer: template.

        Returns:
          The step and both items, or None where there is no checkpoint at all.

        Raises:
          UserError: there are checkpoints and all of them are damaged, or one cannot be read for
            another reason, such as the network or the memory; nothing was moved.
        """
        damaged: dict[int, str] = {}
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            try:
                restored = self.restore(step, parameters, optimizer)
            # A damaged file can raise nearly anything, depending on which one it is and where.
            except Exception as error:
                self._require_damage(step, error)
                damaged[step] = f"{type(error).__name__}: {error}".splitlines()[0]
                logger.warning("the checkpoint of step %d is damaged: %s", step, damaged[step])
                if jax.process_count() > 1 and step != steps[-1]:
                    # The other processes may wait for this one within the restore, and have
                    # perhaps read their part without a fault: all begin anew without it.
                    self._set_aside(step)
                    end_for_restart(f"the checkpoint of step {step} is moved aside")
                continue
            for bad in damaged:
                self._set_aside(bad)
            if damaged:
                self._manager.close()
                self._manager = self._open()
            return step, *restored
        if not damaged:
            return None
        listed = "\n".join(f"  step {step}: {reason}" for step, reason in damaged.items())
        raise UserError(
            f"all checkpoints in {self._folder} are damaged:\n{listed}\nNothing was changed. Put "
            "back a copy of one, or begin again with another --workdir"
        )

    def _require_damage(self, step: int, error: Exception) -> None:
        """Raises unless an error of a restore is one of what lies there, not of how it is read."""
        if is_remote(self._folder):
            with named_failures(self._folder, "cannot be reached"):
                self._folder.exists()
        elsewhere = isinstance(error, MemoryError | ConnectionError | TimeoutError)
        elsewhere |= isinstance(error, OSError) and error.errno in _NUMBERS
        if elsewhere or any(words in str(error) for words in _NO_DAMAGE):
            cause = remedy(error) if isinstance(error, OSError) else ""
            raise UserError(
                f"the checkpoint of step {step} in {self._folder} cannot be read "
                f"({type(error).__name__}: {error}){cause}. It need not be damaged, and nothing "
                "was moved; give the same command again once it can be read"
            ) from error

    @contextlib.contextmanager
    def _named_damage(self, step: int) -> Iterator[None]:
        """Names the checkpoint in whatever a library raises of one that it cannot read."""
        try:
            yield
        except Exception as error:
            self._require_damage(step, error)
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise UserError(
                f"the checkpoint of step {step} in {self._folder} is damaged ({reason}); put a "
                "copy back, or read another by --step"
            ) from error

    def set_aside_from(self, step: int) -> int | None:
        """Moves the checkpoints of `step` and later aside, after `close`; returns what is left.

        Returns:
          The newest step that stays, or None.
        """
        steps = sorted(int(path.name) for path in self._folder.iterdir() if path.name.isdigit())
        for later in steps:
            if later >= step:
                self._set_aside(later, "rolled_back")
        return max((earlier for earlier in steps if earlier < step), default=None)

    def _set_aside(self, step: int, why: str = "damaged") -> None:
        aside = self._folder.with_name(f"{self._folder.name}_{why}")
        target = aside / f"{step}-{time.time_ns()}"
        try:
            move_folder(self._folder / str(step), target)
        except FileNotFoundError:
            return  # another process was first
        logger.warning("moved it to %s, to be looked at or removed", target)

    def require_step(self, step: int | None) -> int:
        """Returns `step` if there is such a checkpoint, the newest one's for None.

        Raises:
          ConfigError: it is no whole number.
          UserError: there is none.
        """
        if step is not None:
            require_whole("step", step)
        steps = sorted(self._manager.all_steps())
        if not steps:
            raise UserError(f"{self._folder} holds no complete checkpoint; train the run first")
        if step is not None and step not in steps:
            raise UserError(f"{self._folder} has no checkpoint of step {step}; it has {steps}")
        return steps[-1] if step is None else step

    def restore_parameters(self, step: int | None, template: Parameters) -> Parameters:
        """Restores the parameters alone, from `step` or the newest checkpoint.

        Raises:
          UserError: there is no such checkpoint, or it is damaged or cannot be read.
        """
        step = self.require_step(step)
        logger.info("restoring the parameters of step %d from %s", step, self._folder)
        items = ocp.args.Composite(**{PARAMETERS: ocp.args.StandardRestore(template)})
        with self._named_damage(step):
            return self._manager.restore(step, args=items)[PARAMETERS]

    def open_parameters(self, step: int | None, template: Parameters) -> Parameters:
        """Opens the parameters where they lie, to be read piece by piece.

        Args:
          step: the checkpoint; None takes the newest.
          template: nested dict of what is in it.

        Returns:
          The same nest of tensorstore arrays, which read what they are indexed for.

        Raises:
          UserError: there is no such checkpoint, or it is damaged or cannot be read.
        """
        step = self.require_step(step)
        base = kvstore(self._folder / str(step) / PARAMETERS)

        def open_array(path, _):
            name = ".".join(key.key for key in path)
            store = {"driver": "ocdbt", "base": base, "path": name}
            return ts.open({"driver": "zarr", "kvstore": store}, open=True, read=True).result()

        with self._named_damage(step):
            return jax.tree_util.tree_map_with_path(open_array, template)

    def close(self) -> None:
        """Waits for a save under way and raises what went wrong in it, come what may."""
        with self._named_failures():
            self._manager.wait_until_finished()
            self._manager.close()

    @contextlib.contextmanager
    def _named_failures(self, raises: bool = True) -> Iterator[None]:
        """Names the folder in what orbax and tensorstore raise of a disk that fails, or logs it."""
        try:
            yield
        except self._failures as error:
            what = f"a checkpoint could not be written to {self._folder} ({error})"
            if raises:
                # Tensorstore's and orbax's errors have the system's words, and no number.
                helps = remedy(error if isinstance(error, OSError) else OSError(str(error)))
                raise UserError(
                    f"{what}{helps}. The earlier ones are intact, and the same command goes on "
                    "from them"
                ) from error
            logger.error("%s; going on, as config.checkpoint.on_failure has it", what)
