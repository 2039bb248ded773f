"""How each engine names the processes of a run, as arguments of `jax.distributed.initialize`."""

import logging
import os
import re
from collections.abc import Mapping

from layerskip_jax.schema import UserError

logger = logging.getLogger(__name__)

COORDINATOR, NUM_PROCESSES, PROCESS_ID = VARIABLES = (
    "LAYERSKIP_COORDINATOR",
    "LAYERSKIP_NUM_PROCESSES",
    "LAYERSKIP_PROCESS_ID",
)
_STEP_TASKS, _STEP_NODES, _TASK, _JOB = SLURM_VARIABLES = (
    "SLURM_STEP_NUM_TASKS",
    "SLURM_STEP_NODELIST",
    "SLURM_PROCID",
    "SLURM_JOB_ID",
)
_TASKS_PER_NODE, _JOB_TASKS = "SLURM_STEP_TASKS_PER_NODE", "SLURM_NTASKS"
_TPU_HOSTS, _TPU_WORKER = "TPU_WORKER_HOSTNAMES", "TPU_WORKER_ID"
_SLICES, _SLICE = "MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID"
# The ports from here to 65535 are not registered for anything; jobs on one node rarely meet.
_FIRST_PORT, _PORTS = 61440, 4096


def distributed_arguments(environment: Mapping[str, str] = os.environ) -> dict | None:
    """Returns what `jax.distributed.initialize` needs here, or None for one process alone.

    Looked for in this order, and what is found is logged:

    1. `LAYERSKIP_COORDINATOR`, `LAYERSKIP_NUM_PROCESSES`, `LAYERSKIP_PROCESS_ID`: set by
       launch/local.py, by the Kubernetes GPU JobSet, or by hand.
    2. A SLURM step of several tasks.
    3. TPUs under GKE: `TPU_WORKER_HOSTNAMES`, `TPU_WORKER_ID`, and `MEGASCALE_NUM_SLICES`,
       `MEGASCALE_SLICE_ID` for several slices. What they say is checked; jax turns it into
       addresses.
    4. TPU VMs, whose metadata server jax asks.

    Args:
      environment: variables of this process.

    Raises:
      UserError: an engine was recognised whose variables are incomplete or cannot work.
    """
    for find in (_explicit, _slurm, _gke_tpu, _tpu_vm):
        found = find(environment)
        if found is not None:
            engine, arguments = found
            logger.info("processes as named by %s: %s", engine, _sentence(arguments))
            return arguments
    return None


def _sentence(arguments: dict) -> str:
    if "process_id" not in arguments:
        return f"jax finds the others ({arguments['cluster_detection_method']})"
    return "{process_id} of {num_processes}, coordinator {coordinator_address}".format(**arguments)


def _arguments(coordinator: str, count: int, number: int) -> dict:
    return {
        "coordinator_address": coordinator,
        "num_processes": count,
        "process_id": number,
        # Otherwise jax, inside a SLURM step, lets each task see only one of its node's GPUs.
        "cluster_detection_method": "deactivate",
    }


def _whole(environment: Mapping[str, str], name: str) -> int:
    # Not int() alone, which takes the 12_3 of a task of a job array for 123.
    if not re.fullmatch(r"[0-9]+", environment[name]):
        raise UserError(f"{name}={environment[name]!r} must be a whole number")
    return int(environment[name])


def _place(number_name: str, number: int, count_name: str, count: int) -> None:
    if not 0 <= number < count:
        raise UserError(f"{number_name}={number} must be from 0 to {count_name}={count} less 1")


def _explicit(environment: Mapping[str, str]) -> tuple[str, dict] | None:
    given = [name for name in VARIABLES if name in environment]
    if not given:
        return None
    if missing := [name for name in VARIABLES if name not in given]:
        raise UserError(
            f"{', '.join(given)} is set and {', '.join(missing)} is not; set all three for a run "
            "of several processes, none for one process"
        )
    coordinator = environment[COORDINATOR]
    if not re.fullmatch(r".+:\d+", coordinator):
        raise UserError(
            f"{COORDINATOR}={coordinator!r} must be host:port of process 0, such as node1:8476"
        )
    count, number = _whole(environment, NUM_PROCESSES), _whole(environment, PROCESS_ID)
    _place(PROCESS_ID, number, NUM_PROCESSES, count)
    return "LAYERSKIP_*", _arguments(coordinator, count, number)


def _slurm(environment: Mapping[str, str]) -> tuple[str, dict] | None:
    # The variables of the step, not of the job: a shell inside an allocation for several tasks
    # is itself one process. So is a batch script, though it has a task's number.
    of_job, batch = environment.get(_JOB_TASKS, "1"), environment.get("ENVIRONMENT") == "BATCH"
    alone = _TASK not in environment or of_job == "1" or (batch and environment[_TASK] == "0")
    if _STEP_TASKS not in environment and not alone:
        raise UserError(
            f"{_TASK}={environment[_TASK]} of {_JOB_TASKS}={of_job} is set and {_STEP_TASKS} is "
            "not, so that each task would train alone; start the tasks with srun, set "
            f"{', '.join(VARIABLES)}, or unset {_TASK} for one process"
        )
    if _STEP_TASKS not in environment or _whole(environment, _STEP_TASKS) == 1:
        return None
    if missing := [name for name in SLURM_VARIABLES if name not in environment]:
        raise UserError(
            f"{_STEP_TASKS}={environment[_STEP_TASKS]} is set and {', '.join(missing)} is not; "
            "start the tasks with srun, or set LAYERSKIP_COORDINATOR, LAYERSKIP_NUM_PROCESSES "
            "and LAYERSKIP_PROCESS_ID"
        )
    if environment.get("SLURM_HET_SIZE", "1") != "1":
        raise UserError(
            f"SLURM_HET_SIZE={environment['SLURM_HET_SIZE']}: the components of a heterogeneous "
            "job number their tasks apart; request one component"
        )
    per_node = environment.get(_TASKS_PER_NODE, "1")
    several = any(int(n) > 1 for n in re.findall(r"(?:^|,)(\d+)", per_node))
    own_devices = "SLURM_GPUS_PER_TASK" in environment
    if several and not own_devices and environment.get("JAX_PLATFORMS") != "cpu":
        raise UserError(
            f"{_TASKS_PER_NODE}={per_node}: tasks that share a node would share its GPUs; run one "
            "task a node (--ntasks-per-node=1), or give each its own (--gpus-per-task=1)"
        )
    count, number = _whole(environment, _STEP_TASKS), _whole(environment, _TASK)
    _place(_TASK, number, _STEP_TASKS, count)
    port = _FIRST_PORT + _whole(environment, _JOB) % _PORTS
    coordinator = f"{first_host(environment[_STEP_NODES])}:{port}"
    return "SLURM", _arguments(coordinator, count, number)


def first_host(nodes: str) -> str:
    """Returns the first name of a SLURM node list such as `a[03-05,9]-ib,b1`: `a03-ib`."""
    first = re.match(r"((?:[^,\[\]]|\[\d[\d,-]*\])+)(?:,|$)", nodes)
    if not first:
        raise UserError(f"{_STEP_NODES}={nodes!r} is no list of nodes")
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first[1])


def _gke_tpu(environment: Mapping[str, str]) -> tuple[str, dict] | None:
    if _TPU_HOSTS not in environment or not _wants_tpu(environment):
        return None
    hosts = environment[_TPU_HOSTS].split(",")
    # Empty when a machine outside of any cluster sets it.
    slices = _whole(environment, _SLICES) if environment.get(_SLICES) else 1
    if len(hosts) * slices == 1:
        return None
    for name, count_name, count in (
        (_TPU_WORKER, _TPU_HOSTS, len(hosts)),
        (_SLICE, _SLICES, slices),
    ):
        if count > 1:
            if name not in environment:
                raise UserError(
                    f"{count_name} names {count} and {name} is not set; GKE sets both in pods of "
                    "a Job or JobSet with a headless service"
                )
            _place(name, _whole(environment, name), count_name, count)
    return "GKE for TPUs", {"cluster_detection_method": "gketpu"}


def _tpu_vm(environment: Mapping[str, str]) -> tuple[str, dict] | None:
    if not _wants_tpu(environment):
        return None
    from jax._src.clusters.cloud_tpu_cluster import GceTpuCluster

    try:
        if not GceTpuCluster.is_env_present() or GceTpuCluster.get_process_count() == 1:
            return None
    except OSError as error:
        logger.warning("TPUs, and no metadata server that names other hosts: %s", error)
        return None
    return "the metadata of the TPU VM", {"cluster_detection_method": "gcetpu"}


def _wants_tpu(environment: Mapping[str, str]) -> bool:
    platforms = environment.get("JAX_PLATFORMS")
    return not platforms or "tpu" in platforms.split(",")
