r"""Runs `layerskip` on TPU VMs: requests a queued resource, installs, runs on all workers, and
requests it anew when it was preempted.

usage: launch/tpu_vm.sh --name=NAME --zone=ZONE --type=TYPE --runtime=VERSION [options] \
           -- train --config=... --workdir=gs://... [...]

  --name=NAME        of the queued resource; one that exists already is used
  --zone=ZONE --project=NAME      (default project: that of gcloud)
  --type=TYPE        accelerator of one slice, as v6e-16
  --runtime=VERSION  of the TPU software, as v2-alpha-tpuv6e
  --slices=N         slices, joined by the data centre's network (default: 1)
  --spot             capacity that may be taken away
  --reserved         capacity of a reservation
  --network=NAME --subnetwork=NAME --account=EMAIL    as of gcloud; account: service account
  --internal         no external addresses; ssh goes through Identity-Aware Proxy
  --setup=COMMAND    run on each worker in the unpacked repository before each first start
                     (default: makes .venv by uv, with this package and jax[tpu])
  --python=PATH      that runs layerskip there (default: .venv/bin/python)
  --env=NAME=VALUE   a variable of the processes; any number of times
  --data-bucket=gs://BUCKET[/PREFIX]    prepared data, mounted read-only on each worker by gcsfuse,
                     which is installed; the service account needs to read it
  --data-mount=/PATH where (default: /data)
  --data-cache-gib=N a file cache on each worker's disk; as large as the data, or it may slow the
                     reading down (default: 0, none)
  --restarts=N       restarts after crashes (default: 3)
  --poll=SECONDS     between looks at the state of the resource (default: 30)
  --keep             leave the resource at the end; without it, it is deleted
  --dry-run          print the commands in their order, run nothing

The commit checked out here is what runs there. The workdir must be gs://..., s3://... or an
absolute path that --setup mounts: workers share no disk, and theirs go with the resource.
Exit code 75 of the run restarts it always; 2 (bad input) never; anything else --restarts times.
Several workers at once need the key in ssh's agent: ssh-add ~/.ssh/google_compute_engine.
A resource that was preempted is deleted and requested again, as often as it takes. Control-C
leaves it as it is, and the same command goes on.
"""  # noqa: D205, D415

import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import bucket
from options import BAD_INPUT, NAME, RESTART, Options, quoted, refuse, require, say

TPUS = ("gcloud", "compute", "tpus", "queued-resources")
# uv, as the system's Python is older than what this package runs on.
SETUP = (
    "python3 -m pip install --quiet --user uv && "
    "python3 -m uv venv --quiet --python=3.12 .venv && "
    'python3 -m uv pip install --quiet --python=.venv/bin/python . "jax[tpu]"'
)
ARCHIVE = "layerskip.tar.gz"
# Since gcloud returns the code of one worker only, and one of its own for lost ones.
MARKER = "layerskip-exit-code"


def main() -> None:
    """Runs on TPU VMs to the end."""
    options = Options.parse(
        __doc__,
        "name zone project type runtime slices=1 network subnetwork account".split()
        + [f"setup={SETUP}", "python=.venv/bin/python", "restarts=3", "poll=30"]
        + bucket.OPTIONS,
        lists="env",
        flags="spot reserved internal keep dry-run",
    )
    check(options)
    if options.dry_run:
        launcher = Launcher(options)
        for step in [*launcher.steps, launcher.delete][: 5 if options.keep else 6]:
            print(quoted(*step))
        return
    require("gcloud", "install the Google Cloud CLI")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            Launcher(options, scratch).launch()
    except KeyboardInterrupt:
        name = options.name
        say(f"interrupted; {name} is left as it is, and the same command goes on with it")
        sys.exit(RESTART)


def check(options: Options) -> None:
    """Refuses what would not run."""
    options.need("name zone type runtime setup python")
    options.whole(1, "slices")
    options.whole(0, "restarts poll")
    options.matching("name", *NAME)
    options.pairs("env")
    bucket.check(options, "gs", "TPU VMs")
    if options.spot and options.reserved:
        refuse("--spot and --reserved exclude each other")
    folder = options.workdir()
    if folder and "://" not in folder and not folder.startswith("/"):
        refuse(
            f"--workdir={folder} would lie on the disk of each worker and go with it; give "
            "gs://..., s3://..., or an absolute path that --setup mounts"
        )


def succeeds(command: list[str]) -> bool:
    """Runs a command, and returns whether it ended well."""
    return subprocess.run(command).returncode == 0


class Launcher:
    """One run, on as many resources as it takes; its attributes are the commands."""

    # Whether gcloud ever told of the resource, and whether it is yet to be installed on.
    seen, fresh = False, True

    def __init__(self, options: Options, scratch: str = ""):
        self.options, name = options, options.name
        where = [name, *options.given("zone project")]
        # All at once: in batches, the first would wait for processes of the next for ever.
        # --quiet: no questions, as about a first key for ssh.
        everywhere = [*where[1:], "--node=all", "--worker=all", "--batch-size=all", "--quiet"]
        everywhere += ["--tunnel-through-iap"] * options.internal
        nodes = [f"--node-count={options.slices}", f"--node-prefix={name}"]
        self.create = [
            *(*TPUS, "create", *where, f"--accelerator-type={options.type}"),
            f"--runtime-version={options.runtime}",
            *(nodes if options.slices > 1 else [f"--node-id={name}"]),
            *options.given("spot reserved network subnetwork"),
            *[f"--service-account={options.account}"] * bool(options.account),
            *["--internal-ips"] * options.internal,
        ]
        self.describe = [*TPUS, "describe", *where]
        # --force: with its nodes.
        self.delete = [*TPUS, "delete", *where, "--quiet", "--force"]
        archive, repository = Path(scratch, ARCHIVE), Path(__file__).resolve().parents[1]
        pack = ["git", "-C", f"{repository}", "archive", "--format=tar.gz", f"--output={archive}"]
        copy = [*TPUS, "scp", f"{archive}", f"{name}:{ARCHIVE}", *everywhere]
        on_all = [*TPUS, "ssh", name, *everywhere]
        install = f"rm -rf layerskip && mkdir layerskip && tar -xzf {ARCHIVE} -C layerskip"
        install = [*on_all, f"--command={install} && cd layerskip && {options.setup}"]
        # The lock waits for a process of before whose connection was lost: it would hold the chips.
        line = ["flock", "--timeout=600", "../layerskip.lock", "env", *options.env, options.python]
        if options.data_bucket:
            # Around the lock: gcsfuse stays behind, and would hold it.
            mounted = ["launch/mounted.sh", *options.given(" ".join(bucket.OPTIONS))]
            line = [*mounted, "--install", "--", *line]
        line = quoted(*line, "-m", "layerskip_jax", *options.command)
        self.run = [
            *on_all,
            f"--command=cd layerskip && {line}; code=$?; echo {MARKER} $code; exit $code",
        ]
        self.install = [[*pack, "HEAD"], copy, install]
        self.steps = [self.create, *self.install, self.run]

    def launch(self) -> None:
        """Runs, installs and requests anew until the run is done or given up."""
        name, restarts, crashes = self.options.name, self.options.restarts, 0
        while True:
            self.obtain()
            codes = self.attempt()
            if codes == [0]:
                self.finish(0, "the run is done")
            if BAD_INPUT in codes:
                self.finish(BAD_INPUT, "bad input: not tried again")
            if RESTART in codes:
                say(f"exit code {RESTART}: the run goes on")
                continue
            # Workers that are taken away look like a crash until the state tells.
            time.sleep(self.options.poll)
            now = self.state()
            if now != "ACTIVE":
                say(f"{name} is {now}: it was taken away, and is requested again")
                continue
            crashes += 1
            told = f"(exit codes: {' '.join(map(str, codes)) or 'none'})"
            if crashes > restarts:
                self.finish(1, f"crash {crashes} {told}, and --restarts={restarts}: giving up")
            say(f"crashed {told}: restarting, {crashes} of {restarts}")

    def state(self) -> str:
        """Returns the state; ABSENT if there is no resource, UNKNOWN if gcloud could not tell."""
        command = [*self.describe, "--format=value(state.state)"]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        self.error = done.stderr if done.returncode else ""
        if done.returncode:
            return "ABSENT" if "NOT_FOUND" in done.stderr else "UNKNOWN"
        return done.stdout.strip()

    def obtain(self) -> None:
        """Returns once the resource is there; requests it if it is not."""
        name, now = self.options.name, ""
        while now != "ACTIVE":
            last, now = now, self.state()
            if now != last:
                say(f"{name} is {now}")
            self.seen |= now != "UNKNOWN"
            if now == "ABSENT":
                # An error here, such as of the quota or of the arguments, is no preemption.
                if not succeeds(self.create):
                    self.finish(1, "the resource was not requested")
                self.fresh = True
            elif now == "FAILED":
                subprocess.run(self.describe, stdout=sys.stderr)
                self.finish(1, "the request failed, as said above")
            elif now == "UNKNOWN" and not self.seen:
                print(self.error, end="", file=sys.stderr)
                zone = self.options.zone
                refuse(f"gcloud does not tell of {name} in zone {zone}, as it says above")
            elif now != "ACTIVE" and not (now == "SUSPENDED" and succeeds(self.delete)):
                print(self.error, end="", file=sys.stderr)
                time.sleep(self.options.poll)

    def attempt(self) -> list[int]:
        """Runs once on all workers, and returns the exit codes that they told."""
        if self.fresh and not all(map(succeeds, self.install)):
            return []
        self.fresh, codes = False, set()
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        with subprocess.Popen(self.run, **output) as process:
            try:
                for line in process.stdout:
                    sys.stdout.buffer.write(line)
                    sys.stdout.flush()
                    codes.update(map(int, re.findall(rf"{MARKER} ([0-9]+)\s*$".encode(), line)))
            except KeyboardInterrupt:
                # It would hold the connection, and by it the lock.
                process.terminate()
                raise
        return sorted(codes)

    def finish(self, code: int, line: str) -> None:
        """Ends the launcher; deletes the resource, unless it is to be kept."""
        say(line)
        name, delete = self.options.name, self.delete
        if self.options.keep:
            say(f"{name} is kept; to delete it: {quoted(*delete)}")
        elif self.state() != "ABSENT" and not succeeds(delete):
            say(f"{name} was not deleted and costs on; to delete it: {quoted(*delete)}")
        sys.exit(code)


if __name__ == "__main__":
    main()
