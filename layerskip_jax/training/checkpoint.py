"""Orbax checkpoints of a run: asynchronous, sharded, restored onto any mesh."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
import tensorstore as ts

from layerskip_jax.schema import UserError

logger = logging.getLogger(__name__)

PARAMETERS, OPTIMIZER = "parameters", "optimizer"


# Arrays are stored in pieces of at most so many bytes, so that reading a layer of a large model
# does not mean reading a device's share of all of them.
PIECE_BYTES = 2**26


def _pieces(leaf: jax.Array) -> ocp.SaveArgs:
    return ocp.SaveArgs(chunk_byte_size=max(PIECE_BYTES, leaf.dtype.itemsize), shard_axes=(0,))


class Checkpoints:
    """The numbered checkpoints of one run.

    A checkpoint holds two items: `parameters`, a nested dict of arrays, and `optimizer`, so
    that evaluation and export read the one without the other. Its number is the count of
    optimizer steps done; that number alone fixes the next batch, so nothing else is stored.
    """

    def __init__(self, folder: Path, *, every_steps: int = 1, keep: int | None = None):
        """Opens the folder, creating it if `keep` is given (that is, to write).

        Args:
          folder: where the checkpoints are.
          every_steps: steps between two saves.
          keep: the number kept; None opens an existing folder to read.
        """
        self._writes = keep is not None
        if not self._writes and not folder.is_dir():
            raise UserError(f"{folder} does not exist; the run has saved nothing yet")
        self._every_steps = every_steps
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            create=self._writes,
            read_only=not self._writes,
            enable_async_checkpointing=self._writes,
        )
        self._folder = folder
        self._manager = ocp.CheckpointManager(
            folder.absolute(), options=options, item_names=(PARAMETERS, OPTIMIZER)
        )

    @property
    def latest_step(self) -> int | None:
        """The newest complete checkpoint's step, or None."""
        return self._manager.latest_step()

    def save(
        self, step: int, parameters: Any, optimizer: Any | None, *, force: bool = False
    ) -> bool:
        """Starts saving if `step` is due (or `force`), and returns whether it did.

        Without an optimizer the checkpoint can be evaluated and started from, not gone on from.
        A failure of an earlier asynchronous save is raised here, at the latest in `close`.
        """
        due = force or step % self._every_steps == 0
        if not due or step in self._manager.all_steps():
            return False
        items = {PARAMETERS: ocp.args.StandardSave(parameters, jax.tree.map(_pieces, parameters))}
        if optimizer is not None:
            items[OPTIMIZER] = ocp.args.StandardSave(optimizer)
        with self._named_failures():
            return self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def restore(self, step: int, parameters: Any, optimizer: Any) -> tuple[Any, Any]:
        """Restores both items, each leaf with the shape, dtype and sharding of its template."""
        items = ocp.args.Composite(
            **{
                PARAMETERS: ocp.args.StandardRestore(parameters),
                OPTIMIZER: ocp.args.StandardRestore(optimizer),
            }
        )
        restored = self._manager.restore(step, args=items)
        return restored[PARAMETERS], restored[OPTIMIZER]

    def require_step(self, step: int | None) -> int:
        """Returns `step` if there is such a checkpoint, the newest one's for None.

        Raises:
          UserError: there is none.
        """
        steps = sorted(self._manager.all_steps())
        if not steps:
            raise UserError(f"{self._folder} holds no complete checkpoint; train the run first")
        if step is not None and step not in steps:
            raise UserError(f"{self._folder} has no checkpoint of step {step}; it has {steps}")
        return steps[-1] if step is None else step

    def restore_parameters(self, step: int | None, template: Any) -> Any:
        """Restores the parameters alone, from `step` or the newest checkpoint.

        Raises:
          UserError: there is no such checkpoint.
        """
        step = self.require_step(step)
        logger.info("restoring the parameters of step %d from %s", step, self._folder)
        items = ocp.args.Composite(**{PARAMETERS: ocp.args.StandardRestore(template)})
        return self._manager.restore(step, args=items)[PARAMETERS]

    def open_parameters(self, step: int | None, template: Any) -> Any:
        """Opens the parameters where they lie, to be read piece by piece.

        Args:
          step: the checkpoint; None takes the newest.
          template: nested dict of what is in it.

        Returns:
          The same nest of tensorstore arrays, which read what they are indexed for.

        Raises:
          UserError: there is no such checkpoint.
        """
        base = (self._folder.absolute() / str(self.require_step(step)) / PARAMETERS).as_uri()

        def open_array(path, _):
            name = ".".join(key.key for key in path)
            store = {"driver": "ocdbt", "base": f"{base}/", "path": name}
            return ts.open({"driver": "zarr", "kvstore": store}, open=True, read=True).result()

        return jax.tree_util.tree_map_with_path(open_array, template)

    def close(self) -> None:
        """Waits for a save under way and raises what went wrong in it."""
        with self._named_failures():
            self._manager.wait_until_finished()
            self._manager.close()

    @contextlib.contextmanager
    def _named_failures(self) -> Iterator[None]:
        """Names the folder in what orbax and tensorstore raise of a disk that fails."""
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(
                f"a checkpoint could not be written to {self._folder} ({error}); the earlier ones "
                "are intact: free some space, and the same command goes on from them"
            ) from error
