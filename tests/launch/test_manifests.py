"""The JobSets: against the schemas, and what their policies and variables come to in a cluster."""

import copy
import json
import re

import jsonschema
import kubernetes_validate
import pytest
import yaml

from layerskip_jax.distributed.cluster_env import distributed_arguments
from tests.launch.jobset_schema import JOBSET
from tests.launch.scripts import AWKWARD, Fakes, run
from tests.launch.test_scripts import DRY_RUNS, GOLDEN, GPU, GS, S3, TPU, TRAIN

MANIFESTS = sorted(
    case for case in DRY_RUNS if case.startswith(("kube", "gke")) and "xpk" not in case
)
CONTAINER = ("spec", "template", "spec", "containers", 0)


def manifest(script, *arguments):
    done = run(script, *arguments)
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout)


def validate(jobset):
    jsonschema.validate(jobset, JOBSET)
    for replicated in jobset["spec"]["replicatedJobs"]:
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "job"}}
        kubernetes_validate.validate(job | replicated["template"], "1.33", strict=True)


def job(jobset):
    (replicated,) = jobset["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


def container(jobset):
    (only,) = job(jobset)["template"]["spec"]["containers"]
    return only


def golden(case):
    """The JobSet; what it needs beside it comes before it."""
    return [*yaml.safe_load_all((GOLDEN / f"{case}.txt").read_text())][-1]


@pytest.mark.parametrize("case", MANIFESTS)
def test_manifests_fit_the_schemas_of_jobset_and_kubernetes(case):
    validate(golden(case))


@pytest.mark.parametrize(
    "path, value, said",
    [
        (("spec", "failurePolicy", "maxRestart"), 1, "maxRestart"),
        (("spec", "failurePolicy", "rules", 0, "action"), "Fail", "'Fail' is not one of"),
        (("spec", "replicatedJobs", 0, "parallelism"), 2, "parallelism"),
        (("spec", "replicatedJobs", 0, "template", "spec", "paralelism"), 2, "paralelism"),
        (("spec", "replicatedJobs", 0, "template", *CONTAINER, "resource"), {}, "resource"),
        (
            ("spec", "replicatedJobs", 0, "template", *CONTAINER, "env", 0, "value"),
            3,
            "3 is not of type",
        ),
    ],
)
def test_the_schemas_refuse_mistakes(path, value, said):
    wrong = copy.deepcopy(golden("kubernetes_gpu"))
    place = wrong
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    errors = (jsonschema.ValidationError, kubernetes_validate.ValidationError)
    with pytest.raises(errors, match=said):
        validate(wrong)


def expanded(text, variables):
    """What Kubernetes makes of a command's word or a variable's value."""

    def one(match):
        if match[0] == "$$":
            return "$"
        return variables.get(match[1], match[0])

    return re.sub(r"\$\$|\$\((\w+)\)", one, text)


def variables(jobset, annotations):
    """The environment that the kubelet gives to the process."""
    found = {}
    for entry in container(jobset).get("env", []):
        if "value" in entry:
            found[entry["name"]] = expanded(entry["value"], found)
        else:
            field = entry["valueFrom"]["fieldRef"]["fieldPath"]
            (name,) = re.fullmatch(r"metadata\.annotations\['(.+)'\]", field).groups()
            found[entry["name"]] = annotations[name]
    return found


@pytest.mark.parametrize("script, options", [("kubernetes_gpu.sh", GPU), ("gke_tpu.sh", TPU)])
def test_arguments_and_variables_reach_the_process_unchanged(script, options):
    value = AWKWARD[2] + AWKWARD[3]
    jobset = manifest(
        script, *options, f"--env=X={value}", "--env=HOME=/x", "--dry-run", "--", *AWKWARD
    )
    validate(jobset)
    found = variables(jobset, {"batch.kubernetes.io/job-completion-index": "0"})
    assert found["X"] == value
    words = [expanded(word, found) for word in container(jobset)["command"]]
    assert words == ["python3", "-m", "layerskip_jax", *AWKWARD]


def test_names_that_look_like_numbers_stay_names():
    jobset = manifest(
        "kubernetes_gpu.sh", *GPU, "--namespace=007", "--image=123", "--dry-run", *TRAIN
    )
    assert jobset["metadata"]["namespace"] == "007"
    assert container(jobset)["image"] == "123"


@pytest.mark.parametrize("number", range(4))
def test_each_gpu_pod_is_the_process_of_its_index(number):
    jobset = golden("kubernetes_gpu")
    found = variables(jobset, {"batch.kubernetes.io/job-completion-index": str(number)})
    assert distributed_arguments(found) == {
        # <jobset>-<replicated job>-<job index>-<pod index>.<subdomain, as the jobset>
        "coordinator_address": "run-worker-0-0.run:8476",
        "num_processes": 4,
        "process_id": number,
        "cluster_detection_method": "deactivate",
    }
    assert job(jobset)["parallelism"] == job(jobset)["completions"] == 4
    assert job(jobset)["completionMode"] == "Indexed"


@pytest.mark.parametrize(
    "case, slices, hosts, chips",
    [("gke_tpu", 1, 4, "4"), ("gke_tpu_all_options", 2, 4, "4")],
)
def test_a_tpu_slice_is_a_job_and_a_host_a_pod(case, slices, hosts, chips):
    jobset = golden(case)
    assert jobset["spec"]["replicatedJobs"][0]["replicas"] == slices
    assert job(jobset)["parallelism"] == job(jobset)["completions"] == hosts
    assert container(jobset)["resources"]["limits"] == {"google.com/tpu": chips}
    selector = job(jobset)["template"]["spec"]["nodeSelector"]
    assert selector["cloud.google.com/gke-tpu-topology"] == "4x4"
    assert jobset["metadata"]["annotations"] == {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
    }


def failure_of_the_job(spec, code, evicted):
    """Reason and message of a Job one of whose pods ended with `code`, as Kubernetes words them."""
    for index, rule in enumerate(spec["podFailurePolicy"]["rules"]):
        assert rule["action"] == "FailJob"
        matching = f"matching FailJob rule at index {index}"
        codes = rule.get("onExitCodes")
        if codes and code in codes["values"]:
            name = codes["containerName"]
            said = f"Container {name} for pod team/run-0 failed with exit code {code} {matching}"
            return "PodFailurePolicy", said
        for condition in rule.get("onPodConditions", []):
            if evicted and condition == {"type": "DisruptionTarget", "status": "True"}:
                said = f"Pod team/run-0 has condition DisruptionTarget {matching}"
                return "PodFailurePolicy", said
    assert spec["backoffLimit"] == 0
    return "BackoffLimitExceeded", "Job has reached the specified backoff limit"


@pytest.mark.parametrize("case", MANIFESTS)
@pytest.mark.parametrize(
    "code, evicted, action",
    [
        (2, False, "FailJobSet"),
        (75, False, "RestartJobSetAndIgnoreMaxRestarts"),
        (75, True, "RestartJobSetAndIgnoreMaxRestarts"),
        (137, True, "RestartJobSetAndIgnoreMaxRestarts"),
        (1, False, "RestartJobSet"),
        (22, False, "RestartJobSet"),
        (137, False, "RestartJobSet"),
        (175, False, "RestartJobSet"),
    ],
)
def test_what_becomes_of_the_run_by_exit_code(case, code, evicted, action):
    jobset = golden(case)
    reason, message = failure_of_the_job(job(jobset), code, evicted)
    # The default of JobSet, which counts towards maxRestarts.
    chosen = "RestartJobSet"
    for rule in jobset["spec"]["failurePolicy"]["rules"]:
        patterns = rule["onJobFailureMessagePatterns"]
        if reason in rule["onJobFailureReasons"] and any(re.search(p, message) for p in patterns):
            chosen = rule["action"]
            break
    assert chosen == action


@pytest.mark.parametrize("script, options", [("kubernetes_gpu.sh", GPU), ("gke_tpu.sh", TPU)])
def test_kubectl_is_given_the_manifest_of_the_dry_run(script, options, tmp_path):
    fakes = Fakes(tmp_path / "fakes", "kubectl")
    done = run(script, *options, "--namespace=team", *TRAIN, fakes=fakes)
    assert done.returncode == 0, done.stderr
    text = run(script, *options, "--namespace=team", "--dry-run", *TRAIN).stdout
    assert fakes.calls() == [["kubectl", "create", "--filename=-", text]]
    assert "kubectl get jobset run --namespace=team" in done.stderr


def pod(jobset):
    return job(jobset)["template"]["spec"]


@pytest.mark.parametrize("script, options", [("kubernetes_gpu.sh", GPU), ("gke_tpu.sh", TPU)])
def test_a_bucket_of_google_is_mounted_by_the_driver_of_gke(script, options):
    jobset = manifest(script, *options, GS, "--data-cache-gib=100", "--dry-run", *TRAIN)
    validate(jobset)
    annotations = job(jobset)["template"]["metadata"]["annotations"]
    assert annotations["gke-gcsfuse/volumes"] == "true"
    mount, volume = container(jobset)["volumeMounts"][0], pod(jobset)["volumes"][0]
    assert mount == {"name": volume["name"], "mountPath": "/data", "readOnly": True}
    assert volume["csi"]["driver"] == "gcsfuse.csi.storage.gke.io" and volume["csi"]["readOnly"]
    attributes = volume["csi"]["volumeAttributes"]
    words = attributes["mountOptions"].split(",")
    assert attributes["bucketName"] == "my-bucket"
    assert {"implicit-dirs", "only-dir=corpora/web", "file-cache:max-size-mb:102400"} <= {*words}
    # The sidecar's cache has room for it, and pods come only to nodes that have.
    cache = pod(jobset)["volumes"][1]
    assert cache == {"name": "gke-gcsfuse-cache", "emptyDir": {"sizeLimit": "101Gi"}}
    assert annotations["gke-gcsfuse/ephemeral-storage-request"] == "101Gi"


def test_without_a_cache_none_is_asked_for():
    jobset = manifest("gke_tpu.sh", *TPU, "--data-bucket=gs://my-bucket", "--dry-run", *TRAIN)
    (volume,) = pod(jobset)["volumes"]
    options = volume["csi"]["volumeAttributes"]["mountOptions"]
    assert "cache:max" not in options and "only-dir" not in options
    assert not any("request" in name for name in job(jobset)["template"]["metadata"]["annotations"])


def volume_and_claim(*arguments):
    done = run("kubernetes_gpu.sh", *GPU, *arguments, "--dry-run", *TRAIN)
    volume, claim, jobset = yaml.safe_load_all(done.stdout)
    for one in (volume, claim):
        kubernetes_validate.validate(one, "1.33", strict=True)
    validate(jobset)
    return volume, claim, jobset


def test_a_bucket_of_s3_is_a_volume_with_its_claim():
    arguments = [S3, "--namespace=team", "--data-cache-gib=100"]
    volume, claim, jobset = volume_and_claim(*arguments)
    assert claim["metadata"] == {"name": "run-data", "namespace": "team"}
    assert claim["spec"]["volumeName"] == volume["metadata"]["name"] == "team-run-data"
    # Neither looks for a class; both allow what the other asks for.
    for spec in (volume["spec"], claim["spec"]):
        assert spec["storageClassName"] == "" and spec["accessModes"] == ["ReadOnlyMany"]
    source = pod(jobset)["volumes"][0]["persistentVolumeClaim"]
    assert source == {"claimName": "run-data", "readOnly": True}
    assert volume["spec"]["mountOptions"][:2] == ["read-only", "prefix corpora/web/"]
    assert volume["spec"]["csi"]["driver"] == "s3.csi.aws.com"
    assert volume["spec"]["csi"]["volumeAttributes"] == {
        "bucketName": "my-bucket",
        "cache": "emptyDir",
        "cacheEmptyDirSizeLimit": "100Gi",
    }
    assert "metadata" not in job(jobset)["template"]


def test_a_bucket_of_s3_is_read_as_the_account_of_the_pods_if_one_is_named():
    volume, claim, _ = volume_and_claim("--data-bucket=s3://my-bucket", "--account=trainer")
    attributes = volume["spec"]["csi"]["volumeAttributes"]
    assert attributes == {"bucketName": "my-bucket", "authenticationSource": "pod"}
    assert volume["metadata"]["name"] == claim["spec"]["volumeName"] == "run-data"
    assert not any("prefix" in word for word in volume["spec"]["mountOptions"])


def test_the_volume_is_there_before_the_jobset(tmp_path):
    fakes = Fakes(tmp_path / "fakes", "kubectl")
    done = run("kubernetes_gpu.sh", *GPU, S3, *TRAIN, fakes=fakes)
    assert done.returncode == 0, done.stderr
    (*apply, volume), (*create, jobset) = fakes.calls()
    assert apply == ["kubectl", "apply", "--filename=-"] and create[1] == "create"
    text = run("kubernetes_gpu.sh", *GPU, S3, "--dry-run", *TRAIN).stdout
    assert volume + jobset == text
    assert "to delete that: kubectl delete pvc/run-data pv/run-data" in done.stderr


def test_another_volume_of_that_name_is_no_volume_of_this_jobset(tmp_path):
    fakes = Fakes(tmp_path / "fakes", "kubectl")
    fakes.answer("kubectl", (1, "spec.persistentvolumesource: Forbidden: is immutable"))
    done = run("kubernetes_gpu.sh", *GPU, S3, "--namespace=team", *TRAIN, fakes=fakes)
    assert done.returncode == 1
    assert [call[1] for call in fakes.calls()] == ["apply"]
    assert "kubectl delete pvc/run-data pv/team-run-data --namespace=team" in done.stderr


def test_an_error_of_kubectl_is_one_of_the_script(tmp_path):
    fakes = Fakes(tmp_path / "fakes", "kubectl")
    fakes.answer("kubectl", (1, "Error from server (AlreadyExists)"))
    done = run("kubernetes_gpu.sh", *GPU, *TRAIN, fakes=fakes)
    assert done.returncode == 1
    assert "AlreadyExists" in done.stderr and "to follow it" not in done.stderr


def test_xpk_is_run_with_the_printed_command(tmp_path):
    fakes = Fakes(tmp_path / "fakes", "xpk")
    _, options = DRY_RUNS["gke_tpu_xpk"]
    assert run("gke_tpu.sh", *options, *TRAIN, fakes=fakes).returncode == 0
    (call,) = fakes.calls()
    # 2 must stay out of what restarts; 75 and 1 must not.
    (codes,) = [word.partition("=")[2] for word in call if word.startswith("--restart-on")]
    restarts = set()
    for part in codes.split(","):
        first, _, last = part.partition("-")
        restarts |= set(range(int(first), int(last or first) + 1))
    assert restarts == set(range(1, 127)) - {2}
    assert call[:3] == ["xpk", "workload", "create"]


def test_the_goldens_are_what_json_and_yaml_agree_on():
    """Flow style of YAML and JSON differ in few characters; those are escaped."""
    word = "".join(map(chr, [9, 10, 34, 92, 127, 133, 160, 0x2028, 0xFEFF, 0x1F600]))
    jobset = manifest("gke_tpu.sh", *TPU, "--dry-run", "--", word)
    assert container(jobset)["command"][3] == word
    assert json.loads(json.dumps(jobset)) == jobset
