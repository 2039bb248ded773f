"""A SLURM cluster of two nodes on this machine, of which nothing is left when it ends.

Debian's packages are unpacked, not installed. Controller, nodes and jobs run in namespaces of their
own, which see the packages laid over /usr, and /etc with the names of the nodes and a slurm.conf.
They end with the process that started them, however that ends.
"""

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.launch.scripts import REPOSITORY

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
NODES = ("n1", "n2")
HOST = "slurm"
SECONDS = 120  # after which a state that does not come is an error; other tests may load the machine
# How the daemons find each other; nodes notice quickly what in a real cluster takes minutes.
CONFIG = """
ClusterName=layerskip
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
CryptoType=crypto/munge
# A requeued job waits until its old credentials have expired, two minutes otherwise.
AuthInfo=cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
SlurmdTimeout=15
MessageTimeout=10
MinJobAge=100000
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
{nodes}
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""
# The first process within: whoever loses its parent becomes its child. The end of its input, when
# the process that started it ends, is its own, and with it the kernel ends all others.
FIRST = r"""
set -eu
mount -t overlay overlay -o "lowerdir=$1/packages/usr:/usr" /usr
mount -t overlay overlay -o "lowerdir=$1/etc:/etc" /etc
mount -t tmpfs tmpfs /run
hostname "$2"
mkdir -m 755 /run/munge
munged --log-file="$1/munged.log" --seed-file="$1/munge.seed"
echo ready
while read -r _; do :; done
"""


class NoSlurm(Exception):
    """Why there can be no cluster here."""


def unpack(folder: Path) -> None:
    """Unpacks the packages, and what they need that is not installed here.

    Raises:
      NoSlurm: they cannot be had.
    """
    if not shutil.which("apt-get"):
        raise NoSlurm("there is no apt-get to get slurmctld with")
    archives = folder / "archives"
    (archives / "partial").mkdir(parents=True)
    private = [f"-oDir::Cache::archives={archives}", "-oDebug::NoLocking=1"]
    install = ["install", "-qq", "--yes", "--download-only", "--reinstall"]
    install += ["--no-install-recommends", *PACKAGES]
    lists = folder / "lists"
    (lists / "partial").mkdir(parents=True)
    # A machine's own lists of packages may be missing or old; new ones do not touch them.
    for more in ([], [f"-oDir::State::lists={lists}"]):
        if more and subprocess.run(["apt-get", *private, *more, "update", "-qq"]).returncode:
            continue
        done = subprocess.run(["apt-get", *private, *more, *install], capture_output=True, text=True)
        if done.returncode == 0:
            break
    else:
        raise NoSlurm(f"apt-get has no {', '.join(PACKAGES)}: {done.stderr.strip()}")
    for archive in archives.glob("*.deb"):
        subprocess.run(["dpkg", "-x", archive, folder / "packages"], check=True)


class SlurmCluster:
    """A controller and the nodes n1 and n2, of one CPU each, all on this machine.

    Attributes:
      folder: of the cluster, its logs, and the runs of its jobs.
    """

    def __init__(self, folder: Path, port: int):
        self.folder = folder
        self._write(port)
        command = ["unshare", "--mount", "--uts", "--ipc", "--pid", "--fork", "--mount-proc"]
        self._first = subprocess.Popen(
            [*command, "bash", "-c", FIRST, "first", str(folder), HOST],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        if self._first.stdout.readline() != "ready\n":
            self.end()
            raise NoSlurm(f"no namespaces to run it in: {self._first.stderr.read().strip()}")
        pid = self._first.pid
        self._enter = [
            "nsenter", f"--target={pid}", "--mount", "--uts", "--ipc",
            f"--pid=/proc/{pid}/ns/pid_for_children", "--", "env", f"--chdir={REPOSITORY}",
        ]  # fmt: skip

    def _write(self, port: int) -> None:
        for name in ("state", "etc/slurm", "etc/munge", *(f"spool.{node}" for node in NODES)):
            (self.folder / name).mkdir(parents=True)
        nodes = [
            f"NodeName={node} NodeHostname={HOST} NodeAddr=127.0.0.1 Port={port + 1 + i} CPUs=1 "
            "RealMemory=1000"
            for i, node in enumerate(NODES)
        ]
        etc = self.folder / "etc"
        (etc / "slurm/slurm.conf").write_text(
            CONFIG.format(host=HOST, port=port, folder=self.folder, nodes="\n".join(nodes))
        )
        (etc / "hosts").write_text(f"127.0.0.1 localhost {HOST} {' '.join(NODES)}\n")
        (etc / "munge").chmod(0o700)
        key = etc / "munge/munge.key"
        key.touch(0o600)
        key.write_bytes(os.urandom(128))

    def end(self) -> None:
        """Ends everything that runs in the cluster."""
        self._first.stdin.close()
        self._first.wait(SECONDS)

    def run(self, *command: str, codes: tuple[int, ...] = (0,), **environment: str) -> str:
        """Runs a command on the cluster, and returns what it prints."""
        done = subprocess.run(
            [*self._enter, *command],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        assert done.returncode in codes, f"{command}: {done.returncode} {done.stderr}{done.stdout}"
        return done.stdout

    def start_controller(self) -> None:
        self.run("slurmctld-wlm")
        wait_for("the controller", lambda: " UP" in self.run("scontrol", "ping", codes=(0, 1)))

    def start_node(self, node: str) -> None:
        self.run("slurmd-wlm", "-N", node, "-d", "/usr/sbin/slurmstepd-wlm")
        wait_for(f"node {node}", lambda: self.node_state(node) == "idle")

    def node_state(self, node: str) -> str:
        """Its state as sinfo has it, such as idle, alloc or down*."""
        return self.run("sinfo", "--noheader", f"--nodes={node}", "--partition=main", "-o%t").strip()

    def kill_daemon(self, name: str) -> None:
        """Kills slurmctld, or slurmd.NODE."""
        self.run("bash", "-c", f"kill -KILL $(cat /run/{name}.pid)")

    def task(self, rank: int) -> int:
        """The process of a rank of the one job that runs."""
        (found,) = [
            int(process.name)
            for process in Path("/proc").glob("[0-9]*")
            if str(self.folder).encode() in _read(process / "cmdline")
            and _read(process / "comm").startswith(b"python")
            and f"SLURM_PROCID={rank}".encode() in _read(process / "environ").split(b"\0")
        ]
        return found

    def job(self, number: str) -> dict[str, str]:
        """What scontrol tells of a job."""
        text = self.run("scontrol", "show", "--oneliner", "job", number)
        return dict(word.partition("=")[::2] for word in text.split() if "=" in word)


def wait_for(what: str, is_so: Callable[[], bool], seconds: float = SECONDS) -> None:
    """Waits until something is so.

    Raises:
      TimeoutError: it is not, for so many seconds.
    """
    end = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {seconds} s")
        time.sleep(0.1)


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:
        return b""  # the process has ended


@contextlib.contextmanager
def slurm_cluster(port: int) -> Iterator[SlurmCluster]:
    """Yields a cluster whose nodes are idle.

    Raises:
      NoSlurm: it cannot be had.
    """
    if os.geteuid() != 0:
        raise NoSlurm("its daemons want root")
    # Not pytest's folder, which outlives the tests.
    with tempfile.TemporaryDirectory(prefix="slurm-") as name:
        folder = Path(name)
        unpack(folder)
        cluster = SlurmCluster(folder, port)
        try:
            cluster.start_controller()
            for node in NODES:
                cluster.start_node(node)
            yield cluster
        finally:
            cluster.end()
