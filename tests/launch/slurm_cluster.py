"""A SLURM cluster of two nodes on this machine, of which nothing is left when it ends.

Debian's packages are unpacked, not installed. Controller, nodes and jobs run in namespaces of their
own, which see the packages laid over /usr, and /etc with the names of the nodes and a slurm.conf.
They end with the process that started them, however that ends.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.launch.scripts import REPOSITORY

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
# Addresses that are nobody's (RFC 5737).
NODES = {"n1": "192.0.2.1", "n2": "192.0.2.2"}
HOST = "slurm"
SECONDS = 300  # until what does not come is an error; other tests may load the machine
# How the daemons find each other; nodes notice quickly what in a real cluster takes minutes.
CONFIG = """
ClusterName=layerskip
SlurmctldHost={host}
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
# the process that started it ends, is its own. It kills all others first, and removes the folder.
FIRST = r"""
set -eu
trap 'kill -KILL -1; rm -rf "$1"' EXIT
read -r _
mount -t overlay overlay -o "lowerdir=$1/packages/usr:/usr" /usr
mount -t overlay overlay -o "lowerdir=$1/etc:/etc" /etc
mount -t tmpfs tmpfs /run
hostname "$2"
"${@:3}"
mkdir -m 755 /run/munge
munged --log-file="$1/munged.log" --seed-file="$1/munge.seed"
echo ready
while read -r _; do :; done
"""
# Brings the loopback up, as `ip link` and `ip address` do, with the addresses of the nodes: where
# there are no others than the loopback's, names are not resolved.
LOOPBACK = """
import fcntl, socket, struct, sys
SIOCSIFFLAGS, SIOCSIFADDR, IFF_UP = 0x8914, 0x8916, 1
lo = socket.socket()
fcntl.ioctl(lo, SIOCSIFFLAGS, struct.pack("16sh", b"lo", IFF_UP))
for number, address in enumerate(sys.argv[1:]):
    name, packed = b"lo:%d" % number, socket.inet_aton(address)
    fcntl.ioctl(lo, SIOCSIFADDR, struct.pack("16sHH4s8x", name, socket.AF_INET, 0, packed))
"""


class NoSlurm(Exception):
    """Why there can be no cluster here."""


def unpack(folder: Path) -> None:
    """Unpacks the packages, and what they need that is not installed here.

    Raises:
      NoSlurm: they cannot be had.
    """
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
        command = ["apt-get", *private, *more, *install]
        done = subprocess.run(command, capture_output=True, text=True)
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
      namespace: which all that runs in it shares.
    """

    def __init__(self, folder: Path):
        """Starts what the daemons and jobs run in.

        Args:
          folder: an empty one, which the cluster removes when it ends.

        Raises:
          NoSlurm: it cannot be had.
        """
        self.folder = folder
        apart = ["--mount", "--uts", "--ipc", "--net"]
        self._first = subprocess.Popen(
            ["unshare", *apart, "--pid", "--fork", "--mount-proc", "bash", "-c", FIRST, "first"]
            + [str(folder), HOST, sys.executable, "-c", LOOPBACK, *NODES.values()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            unpack(folder)
            self._write()
            with contextlib.suppress(BrokenPipeError):
                print("go", file=self._first.stdin, flush=True)
            if self._first.stdout.readline() != "ready\n":
                raise NoSlurm(f"no namespaces to run it in: {self._first.stderr.read().strip()}")
        except BaseException:
            self.end()
            raise
        pid = self._first.pid
        self.namespace = _namespace(Path(f"/proc/{pid}"))
        self._enter = [
            "nsenter", f"--target={pid}", *apart,
            f"--pid=/proc/{pid}/ns/pid_for_children", "--", "env", f"--chdir={REPOSITORY}",
        ]  # fmt: skip

    def _write(self) -> None:
        for name in ("state", "etc/slurm", "etc/munge", *(f"spool.{node}" for node in NODES)):
            (self.folder / name).mkdir(parents=True)
        nodes = [
            f"NodeName={node} NodeHostname={HOST} NodeAddr={address} Port={17000 + i} CPUs=1 "
            "RealMemory=1000"
            for i, (node, address) in enumerate(NODES.items())
        ]
        etc = self.folder / "etc"
        (etc / "slurm/slurm.conf").write_text(
            CONFIG.format(host=HOST, folder=self.folder, nodes="\n".join(nodes))
        )
        hosts = {"localhost": "127.0.0.1", HOST: NODES["n1"], **NODES}
        lines = [f"{address} {name}\n" for name, address in hosts.items()]
        (etc / "hosts").write_text("".join(lines))
        (etc / "munge").chmod(0o700)
        key = etc / "munge/munge.key"
        key.touch(0o600)
        key.write_bytes(os.urandom(128))

    def end(self) -> None:
        """Ends everything that runs in the cluster, and removes its folder."""
        with contextlib.suppress(BrokenPipeError):
            self._first.stdin.close()
        self._first.wait(SECONDS)
        self._first.stdout.close()
        self._first.stderr.close()

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
        return self.run("sinfo", "-h", f"--nodes={node}", "--partition=main", "-o%t").strip()

    def kill_daemon(self, name: str) -> None:
        """Kills slurmctld, or slurmd.NODE."""
        self.run("bash", "-c", f"kill -KILL $(cat /run/{name}.pid)")

    def task(self, job: str, rank: int) -> int:
        """The process of a rank of a job that runs."""
        wanted = {f"SLURM_JOB_ID={job}".encode(), f"SLURM_PROCID={rank}".encode()}
        (found,) = [
            int(process.name)
            for process in processes_in(self.namespace)
            if _read(process / "comm").startswith(b"python")
            and wanted.issubset(_read(process / "environ").split(b"\0"))
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


def processes_in(namespace: str) -> list[Path]:
    """The folders in /proc of all that runs in a cluster."""
    return [process for process in Path("/proc").glob("[0-9]*") if _namespace(process) == namespace]


def _namespace(process: Path) -> str:
    """Which namespace of host names a process is in; each cluster has one of its own."""
    try:
        return os.readlink(process / "ns/uts")
    except OSError:
        return ""  # the process has ended


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:
        return b""  # the process has ended


@contextlib.contextmanager
def slurm_cluster() -> Iterator[SlurmCluster]:
    """Yields a cluster whose nodes are idle.

    Raises:
      NoSlurm: it cannot be had.
    """
    if os.geteuid() != 0:
        raise NoSlurm("its daemons want root")
    for program in ("apt-get", "dpkg", "unshare", "nsenter"):
        if not shutil.which(program):
            raise NoSlurm(f"there is no {program}")
    # Not pytest's folder, which outlives the tests.
    cluster = SlurmCluster(Path(tempfile.mkdtemp(prefix="slurm-")))
    try:
        cluster.start_controller()
        for node in NODES:
            cluster.start_node(node)
        yield cluster
    finally:
        cluster.end()
