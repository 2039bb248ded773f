r"""Runs `layerskip train` as several processes on this machine, and restarts it.

usage: python launch/local.py --processes=2 [--devices=2] [--restarts=3] [--dry-run] \
           -- train --config=configs/NAME.py --workdir=RUN [--config.a.b=value ...]

All processes end with the first one that ends otherwise than well. Exit code 75 (stopped by a
signal, as by a preemption) restarts them always, 2 (bad input) never, anything else (a crash, a
kill, a hang that the watchdog ended) `--restarts` times. SIGTERM and SIGINT to this launcher go
on to the processes, which save and end; a second one kills them.
"""

import argparse
import os
import shlex
import signal
import socket
import subprocess
import sys
import time

from options import BAD_INPUT, RESTART

POLL_SECONDS = 0.1


def main(argv: list[str] | None = None) -> int:
    """Runs the processes and returns the exit code of the run."""
    options = _parse(argv)
    command = [sys.executable, "-m", "layerskip_jax", *options.command]
    if options.dry_run:
        for variables in _environments(options, f"localhost:{options.port or 'PORT'}"):
            pairs = " ".join(f"{name}={value}" for name, value in variables.items())
            print(f"{pairs} {shlex.join(command)}")
        return 0
    requests: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: requests.append(received))
    crashes = 0
    while True:
        code = _run(options, command, requests)
        if code in (0, BAD_INPUT):
            return code
        if requests:
            return RESTART
        if code != RESTART:
            crashes += 1
            if crashes > options.restarts:
                _say(f"crash {crashes}, and --restarts={options.restarts}: giving up")
                return 1
        _say("restarting all processes")


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="launch/local.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--processes", type=int, required=True, help="how many to start")
    parser.add_argument("--devices", type=int, help="CPU devices of each (default: what jax finds)")
    parser.add_argument("--restarts", type=int, default=3, help="restarts after crashes")
    parser.add_argument(
        "--grace", type=float, default=60, help="seconds the others get when one has ended"
    )
    parser.add_argument("--port", type=int, default=0, help="of the coordinator (default: free)")
    parser.add_argument("--dry-run", action="store_true", help="print the commands only")
    parser.add_argument("command", nargs="+", help="of layerskip, after --")
    options = parser.parse_args(argv)
    for name, least in (("processes", 1), ("devices", 1), ("restarts", 0), ("grace", 0)):
        value = getattr(options, name)
        if value is not None and not least <= value < float("inf"):
            parser.error(f"--{name}={value} must be at least {least}")
    return options


def _environments(options: argparse.Namespace, coordinator: str) -> list[dict[str, str]]:
    """Returns what is added to the environment of each process."""
    common = {}
    if options.devices:
        common = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(options.devices)}
    return [
        {
            "LAYERSKIP_COORDINATOR": coordinator,
            "LAYERSKIP_NUM_PROCESSES": str(options.processes),
            "LAYERSKIP_PROCESS_ID": str(number),
            **common,
        }
        for number in range(options.processes)
    ]


def _run(options: argparse.Namespace, command: list[str], requests: list[int]) -> int:
    """Runs all processes once, and returns the code that tells how it went."""
    environments = _environments(options, f"localhost:{options.port or _free_port()}")
    processes = [subprocess.Popen(command, env={**os.environ, **e}) for e in environments]
    _say("started processes " + " ".join(str(process.pid) for process in processes))
    deadline, passed_on = None, 0
    said: set[int] = set()
    try:
        while any(process.poll() is None for process in processes):
            time.sleep(POLL_SECONDS)
            _say_ends(processes, said)
            if len(requests) > passed_on:
                passed_on += 1
                _signal(processes, signal.SIGTERM if passed_on == 1 else signal.SIGKILL)
            failed = any(process.poll() for process in processes)
            if failed and deadline is None:
                deadline = time.monotonic() + options.grace
            if deadline is not None and time.monotonic() > deadline:
                _say(f"{options.grace:g} s after the first ended: killing the others")
                _signal(processes, signal.SIGKILL)
                deadline = float("inf")
    finally:
        _signal(processes, signal.SIGKILL)
    codes = [process.wait() for process in processes]
    _say_ends(processes, said)
    return next((code for code in (BAD_INPUT, RESTART) if code in codes), max(codes, key=abs))


def _say_ends(processes: list[subprocess.Popen], said: set[int]) -> None:
    """Says which have ended otherwise than well, each once."""
    for number, process in enumerate(processes):
        if number not in said and (code := process.poll()):
            said.add(number)
            _say(f"process {number} ended with {code}")


def _signal(processes: list[subprocess.Popen], number: int) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(number)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def _say(line: str) -> None:
    print(f"launch/local.py: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
