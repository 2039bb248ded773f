"""The environment each engine gives its processes, as arguments of jax.distributed.initialize."""

import logging

import jax
import pytest
from jax._src.clusters import ClusterEnv, cloud_tpu_cluster

from layerskip_jax.distributed import processes
from layerskip_jax.distributed.cluster_env import VARIABLES, distributed_arguments, first_host
from layerskip_jax.schema import UserError

EXPLICIT = dict(zip(VARIABLES, ("host:1", "2", "1"), strict=True))
SLURM = {
    # Of the job: another number of tasks, which does not count.
    "SLURM_NTASKS": "9",
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "gpu[07-09,12]",
    "SLURM_STEP_TASKS_PER_NODE": "1(x4)",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "0",
}
# What is left where a launcher passes the job's variables on, and not the step's.
JOB = {name: value for name, value in SLURM.items() if "STEP" not in name}
GKE = {"TPU_WORKER_HOSTNAMES": "a-0.x,a-1.x,a-2.x,a-3.x", "TPU_WORKER_ID": "2"}
SLICES = {
    "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": "1",
    "MEGASCALE_COORDINATOR_ADDRESS": "a-0.x:8080",
}


def without(environment, *names):
    return {name: value for name, value in environment.items() if name not in names}


def arguments(coordinator, count, number):
    return {
        "coordinator_address": coordinator,
        "num_processes": count,
        "process_id": number,
        "cluster_detection_method": "deactivate",
    }


@pytest.mark.parametrize(
    "environment, expected",
    [
        (EXPLICIT, arguments("host:1", 2, 1)),
        # launch/local.py inside of a SLURM step: what is said outright wins.
        ({**SLURM, **EXPLICIT}, arguments("host:1", 2, 1)),
        # 61440 + 4097 modulo 4096
        (SLURM, arguments("gpu07:61441", 4, 3)),
        (
            {**SLURM, "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_GPUS_PER_TASK": "1"},
            arguments("gpu07:61441", 4, 3),
        ),
        (
            {**SLURM, "SLURM_STEP_TASKS_PER_NODE": "1,3", "JAX_PLATFORMS": "cpu"},
            arguments("gpu07:61441", 4, 3),
        ),
        (GKE, {"cluster_detection_method": "gketpu"}),
        (
            {**SLICES, "TPU_WORKER_HOSTNAMES": "a-0.x", "TPU_WORKER_ID": "0"},
            {"cluster_detection_method": "gketpu"},
        ),
    ],
    ids="explicit explicit_in_slurm slurm slurm_gpus slurm_cpus gke gke_slices".split(),
)
def test_each_engine(environment, expected):
    assert distributed_arguments(environment) == expected


@pytest.mark.parametrize(
    "environment",
    [
        {},
        # A batch script, or a shell in an allocation for nine tasks, or a step of one.
        {**JOB, "SLURM_PROCID": "0", "ENVIRONMENT": "BATCH"},
        without(JOB, "SLURM_PROCID"),
        {**JOB, "SLURM_NTASKS": "1"},
        {**SLURM, "SLURM_STEP_NUM_TASKS": "1"},
        {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"},
        # A worker of a pod that computes something by itself, on its processor.
        {**GKE, "JAX_PLATFORMS": "cpu"},
        # An indexed Job of Kubernetes that is no run of several processes, but several runs.
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "3"},
    ],
)
def test_one_process_alone(environment):
    assert distributed_arguments(environment) is None


@pytest.mark.parametrize(
    "environment, message",
    [
        (without(EXPLICIT, "LAYERSKIP_PROCESS_ID"), "LAYERSKIP_PROCESS_ID is not; set all three"),
        ({**EXPLICIT, "LAYERSKIP_COORDINATOR": "host"}, "'host' must be host:port of process 0"),
        ({**EXPLICIT, "LAYERSKIP_PROCESS_ID": "2"}, "=2 must be from 0 to .*=2 less 1"),
        ({**EXPLICIT, "LAYERSKIP_NUM_PROCESSES": "two"}, "'two' must be a whole number"),
        (JOB, "SLURM_PROCID=3 of SLURM_NTASKS=9 is set .* would train alone; start .* with srun"),
        ({**JOB, "SLURM_PROCID": "0"}, "SLURM_PROCID=0 of SLURM_NTASKS=9 is set"),
        ({**JOB, "ENVIRONMENT": "BATCH"}, "SLURM_PROCID=3 of SLURM_NTASKS=9 is set"),
        (without(SLURM, "SLURM_PROCID"), "SLURM_PROCID is not; start the tasks with srun"),
        ({**SLURM, "SLURM_PROCID": "4"}, "SLURM_PROCID=4 must be from 0"),
        ({**SLURM, "SLURM_STEP_NODELIST": "gpu[07"}, "'gpu\\[07' is no list of nodes"),
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "8(x4)"}, "would share its GPUs; run one task"),
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "1,8"}, "would share its GPUs; run one task"),
        ({**SLURM, "SLURM_HET_SIZE": "2"}, "SLURM_HET_SIZE=2: .* request one component"),
        ({**SLURM, "SLURM_JOB_ID": "4097_1"}, "SLURM_JOB_ID='4097_1' must be a whole number"),
        (without(GKE, "TPU_WORKER_ID"), "names 4 and TPU_WORKER_ID is not set"),
        ({**GKE, "TPU_WORKER_ID": "4"}, "TPU_WORKER_ID=4 must be from 0"),
        ({**GKE, **without(SLICES, "MEGASCALE_SLICE_ID")}, "MEGASCALE_SLICE_ID is not set"),
        ({**GKE, **SLICES, "MEGASCALE_SLICE_ID": "2"}, "MEGASCALE_SLICE_ID=2 must be from 0"),
    ],
)
def test_an_environment_that_cannot_work_is_refused(environment, message):
    with pytest.raises(UserError, match=message):
        distributed_arguments(environment)


@pytest.mark.parametrize(
    "nodes, first",
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("node[001-015],other", "node001"),
        ("node[7,009-015]", "node7"),
        ("rack[2-3]-node[04-09,11]-ib,b1", "rack2-node04-ib"),
        ("10.0.0.7,10.0.0.8", "10.0.0.7"),
    ],
)
def test_the_first_host_of_a_node_list(nodes, first):
    assert first_host(nodes) == first


def resolved(monkeypatch, method):
    """What jax itself makes of the environment, without devices or a network."""
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cloud_tpu_cluster.socket, "gethostbyname", lambda host: "10.0.0.1")
    coordinator, count, number, devices = ClusterEnv.auto_detect_unset_distributed_params(
        None, None, None, None, method, 1
    )
    assert devices is None
    return coordinator, count, number


@pytest.mark.parametrize(
    "environment, expected",
    [(GKE, ("a-0.x:8482", 4, 2)), ({**GKE, **SLICES}, ("a-0.x:8482", 8, 6))],
    ids=["slice", "slices"],
)
def test_jax_finds_the_processes_of_gke(environment, expected, monkeypatch):
    for name, value in {"MEGASCALE_COORDINATOR_ADDRESS": "", **environment}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MEGASCALE_NUM_SLICES", environment.get("MEGASCALE_NUM_SLICES", "1"))
    monkeypatch.setenv("MEGASCALE_SLICE_ID", environment.get("MEGASCALE_SLICE_ID", "0"))
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", lambda key: ("", 404))
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    found = distributed_arguments(environment)
    assert resolved(monkeypatch, found["cluster_detection_method"]) == expected


def metadata_of(monkeypatch, hosts, **tpu_env):
    answers = {
        "agent-worker-number": "1",
        "worker-network-endpoints": ",".join(f"unused:unused:{host}" for host in hosts),
        "tpu-env": "\n".join(f"{name}: '{value}'" for name, value in tpu_env.items()),
    }
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", lambda key: (answers[key], 200))
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    for name in ("TPU_SKIP_MDS_QUERY", "TPU_WORKER_HOSTNAMES", "JAX_PLATFORMS"):
        monkeypatch.delenv(name, raising=False)


def test_jax_finds_the_processes_of_tpu_vms(monkeypatch):
    metadata_of(monkeypatch, ["10.0.0.5", "10.0.0.6"])
    found = distributed_arguments({})
    assert found == {"cluster_detection_method": "gcetpu"}
    assert resolved(monkeypatch, "gcetpu") == ("10.0.0.5:8482", 2, 1)


def test_jax_finds_the_processes_of_tpu_vms_in_several_slices(monkeypatch):
    slices = {
        "MEGASCALE_NUM_SLICES": "3",
        "MEGASCALE_SLICE_ID": "2",
        "MEGASCALE_COORDINATOR_ADDRESS": "10.0.0.1:8080",
    }
    metadata_of(monkeypatch, ["10.0.0.5", "10.0.0.6"], **slices)
    assert distributed_arguments({}) == {"cluster_detection_method": "gcetpu"}
    assert resolved(monkeypatch, "gcetpu") == ("10.0.0.1:8482", 6, 5)


def test_a_tpu_vm_alone_is_one_process(monkeypatch):
    metadata_of(monkeypatch, ["10.0.0.5"])
    assert distributed_arguments({}) is None


def test_tpus_without_a_metadata_server_are_one_process(monkeypatch, caplog):
    metadata_of(monkeypatch, ["10.0.0.5", "10.0.0.6"])

    def unreachable(key):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", unreachable)
    assert distributed_arguments({}) is None
    assert "no metadata server that names other hosts: no route to host" in caplog.text


@pytest.mark.parametrize(
    "environment, line",
    [
        (EXPLICIT, "processes as named by LAYERSKIP_*: 1 of 2, coordinator host:1"),
        (SLURM, "processes as named by SLURM: 3 of 4, coordinator gpu07:61441"),
        (GKE, "processes as named by GKE for TPUs: jax finds the others (gketpu)"),
    ],
)
def test_the_engine_is_logged(environment, line, caplog):
    caplog.set_level(logging.INFO, "layerskip_jax")
    distributed_arguments(environment)
    assert caplog.messages == [line]


def test_the_arguments_are_those_that_initialize_is_called_with(monkeypatch):
    called, configured = [], []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **given: called.append(given))
    monkeypatch.setattr(jax.config, "update", lambda *given: configured.append(given))
    processes.start_processes({})
    assert called == configured == []
    processes.start_processes(SLURM)
    assert called == [arguments("gpu07:61441", 4, 3)]
    assert configured == [("jax_cpu_collectives_implementation", "gloo")]


def test_devices_of_processes_that_nothing_joined_are_an_error(monkeypatch):
    """As on a TPU slice of several hosts whose launcher was not recognised."""
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(UserError, match="belong to 4 processes that no engine has named"):
        processes.require_agreement({"seed": 1})
    with pytest.raises(UserError, match="start them by a script of launch/"):
        processes.wait_for_all("start")
