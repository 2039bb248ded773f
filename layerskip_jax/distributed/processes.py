"""Several processes as one run: starting, agreeing, stopping together, and who reads what."""

import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NoReturn, TypeVar

import jax
import numpy as np
from jax._src.distributed import global_state
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from layerskip_jax.distributed.cluster_env import VARIABLES, distributed_arguments
from layerskip_jax.distributed.cpu_threads import spare_threads_for_waiting
from layerskip_jax.distributed.mesh import parts
from layerskip_jax.distributed.roll_call import begin_roll_calls
from layerskip_jax.schema import UserError

BatchT = TypeVar("BatchT", bound=tuple)
ItemT = TypeVar("ItemT")
logger = logging.getLogger(__name__)

# EX_TEMPFAIL: the run ended before its last step, and the same command goes on with it.
RESTART_EXIT_CODE = 75
_AGREEMENT_SECONDS = 300


def start_processes(environment: Mapping[str, str] = os.environ) -> None:
    """Joins the other processes of the run, where the launcher or the engine names them.

    `clusters.distributed_arguments` says where it looks. Call it before any use of a device.

    Raises:
      UserError: the variables are incomplete, or one cannot work.
    """
    arguments = distributed_arguments(environment)
    if arguments is None:
        return
    spare_threads_for_waiting(several_processes=True)
    # What CPU devices exchange arrays with; GPUs and TPUs have their own and do not ask.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(**arguments)
    _begin_roll_calls()


def _begin_roll_calls() -> None:
    count, address = global_state.num_processes, global_state.coordinator_address
    if count > 1:
        coordinator = address.rpartition(":")[0]
        begin_roll_calls(_client(), global_state.process_id, count, coordinator)


def _client():
    """Returns the client of the coordinator, which knows all processes of the run."""
    if global_state.client is None:
        raise UserError(
            f"the devices belong to {jax.process_count()} processes that no engine has named to "
            f"each other; start them by a script of launch/, or set {', '.join(VARIABLES)}"
        )
    return global_state.client


def require_agreement(facts: Mapping[str, object]) -> None:
    """Checks that all processes state the same facts, before they compute anything together.

    Args:
      facts: plain values by name, of which nests are compared leaf by leaf.

    Raises:
      UserError: on every process, with each fact that differs and who says what.
    """
    if jax.process_count() == 1:
        return
    # Through the coordinator, not by a collective: what differs may be the devices themselves.
    client, name = _client(), "layerskip/facts/{}"
    client.key_value_set(name.format(jax.process_index()), json.dumps(_flat(facts)))
    stated = [
        json.loads(client.blocking_key_value_get(name.format(i), _AGREEMENT_SECONDS * 1000))
        for i in range(jax.process_count())
    ]
    lines = []
    for key in sorted(set().union(*stated)):
        values = [repr(one.get(key)) for one in stated]
        if len(set(values)) > 1:
            said = ", ".join(f"process {i}: {value}" for i, value in enumerate(values))
            lines.append(f"  {key}: {said}")
    # None may leave before all have read: the coordinator lives in process 0.
    wait_for_all("facts are compared")
    if lines:
        raise UserError(
            "the processes of this run disagree:\n" + "\n".join(lines) + "\nStart all of them "
            "from the same code, command and data"
        )


def _flat(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    flat = {}
    for key, value in values.items():
        nested = isinstance(value, Mapping)
        flat.update(_flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value})
    return flat


def first_decides(what: str, decide: Callable[[], str]) -> str:
    """Returns what process 0 comes to, in all processes.

    Args:
      what: names it; used once in a run.
      decide: called in process 0 only.
    """
    if jax.process_count() == 1:
        return decide()
    client, name = _client(), f"layerskip/{what}"
    if jax.process_index() == 0:
        client.key_value_set(name, decide())
    decided = client.blocking_key_value_get(name, _AGREEMENT_SECONDS * 1000)
    wait_for_all(f"{what} is known")  # the coordinator lives in process 0
    return decided


def wait_for_all(what: str) -> None:
    """Returns once every process has come here with the same words."""
    if jax.process_count() > 1:
        _client().wait_at_barrier(f"layerskip/{what}", _AGREEMENT_SECONDS * 1000)


def end_for_restart(why: str) -> NoReturn:
    """Ends this process at once with `RESTART_EXIT_CODE`, and so the whole run.

    For where the others cannot be told: they wait in a collective, and the launcher ends them.
    """
    logger.error("%s; this process ends so that the launcher restarts the run", why)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(RESTART_EXIT_CODE)


class Stopped(Exception):
    """Ends what a stop that was asked for leaves undone."""


class StopRequest:
    """Whether the run was asked to stop; with several processes, all hear it at one place.

    Attributes:
      received: the signals that this process has caught itself.
    """

    def __init__(self):
        self.received: list[int] = []
        self._asked, self._is_due = 0, False

    def due(self) -> bool:
        """Returns whether to stop here; every process asks at the same places, in one order."""
        if jax.process_count() == 1:
            return bool(self.received)
        if not self._is_due:
            self._asked += 1
            # The service agrees on a number that no process has reached yet.
            self._is_due = multihost_utils.reached_preemption_sync_point(self._asked)
            if self._is_due:
                # From here on a second signal is obeyed at once.
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
        return self._is_due

    def each(self, items: Iterable[ItemT]) -> Iterator[ItemT]:
        """Yields the items, and asks before each.

        Raises:
          Stopped: it is due.
        """
        for item in items:
            if self.due():
                raise Stopped
            yield item

    @property
    def reason(self) -> str:
        """What asked for it."""
        if self.received:
            return signal.Signals(self.received[0]).name
        return "SIGTERM to one of the processes"


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Collects SIGTERM and SIGINT instead of dying of them; a second one is obeyed at once.

    With several processes jax's own service receives SIGTERM and agrees on the step.
    """
    request = StopRequest()

    def receive(number, frame):
        if request.received:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        request.received.append(number)

    caught = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else ()
    old = {number: signal.signal(number, receive) for number in caught}
    try:
        yield request
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


class BatchPlacement:
    """Lays rows of the global batch out on the mesh as `[accumulation, rows, ...]` arrays.

    Microbatch a is the a-th run of consecutive rows, split over the batch axes of the mesh,
    so each step of the accumulation finds its rows where they are.

    Attributes:
      rows: the global row numbers this process has to read, ascending.
    """

    def __init__(
        self,
        mesh: Mesh,
        batch_axes: tuple[str, ...],
        sequence_axes: tuple[str, ...],
        batch_size: int,
        accumulation: int,
    ):
        spec = PartitionSpec(None, batch_axes or None, sequence_axes or None)
        self.sharding = NamedSharding(mesh, spec)
        self._shape = (accumulation, batch_size // accumulation)
        numbers = np.arange(batch_size).reshape(self._shape)
        devices = self.sharding.addressable_devices_indices_map(
            (*self._shape, parts(mesh, sequence_axes))
        )
        wanted = [numbers[index[:2]] for index in devices.values()]
        self.rows: Sequence[int] = np.unique(np.concatenate([w.ravel() for w in wanted])).tolist()
        self._local = np.full(batch_size, -1)
        self._local[self.rows] = np.arange(len(self.rows))
        self._numbers = numbers

    def place(self, batch: BatchT) -> BatchT:
        """Returns global arrays for a tuple of arrays that hold exactly `rows`, in that order."""

        def one(array: np.ndarray) -> jax.Array:
            def shard(index):
                rows = self._local[self._numbers[index[:2]]]
                return array[(rows, *index[2:])]

            shape = (*self._shape, *array.shape[1:])
            return jax.make_array_from_callback(shape, self.sharding, shard)

        return type(batch)(*map(one, batch))
