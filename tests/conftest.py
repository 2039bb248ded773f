"""What every test runs under, and what several files share.

Eight virtual CPU devices, and every public signature's shapes checked in every test. Tests ask
what is computed, not how fast: programs are compiled with little effort. They are kept in one
cache for all workers, for the processes that tests start, and for the next time. Tests that read a
program, its memory or collectives, compile it with `REAL_PROGRAM`.
"""

import contextlib
import io
import json
import logging
import os
import sysconfig
from pathlib import Path
from unittest import mock

REPOSITORY = Path(__file__).parents[1]
CACHE = REPOSITORY / ".cache" / "jax"
CACHE_BYTES = 2**30
# Without the emitters for fusions a train step compiles three times as fast.
LITTLE_EFFORT = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)
# Eight devices share two cores with another worker: the last to come to a collective may be late,
# and XLA ends the process when it has waited for 40 s.
PATIENCE = "--xla_cpu_collective_call_terminate_timeout_seconds=120"

# Read once a process; the processes that tests start have them as well.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {LITTLE_EFFORT} {PATIENCE}".strip()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax  # noqa: E402
import pytest  # noqa: E402
from filelock import FileLock  # noqa: E402
from jax.experimental.compilation_cache import compilation_cache  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

from layerskip_jax.distributed.cpu_threads import spare_threads_for_waiting  # noqa: E402

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
with mock.patch.dict(os.environ):  # the processes that tests start choose for themselves
    spare_threads_for_waiting()
    jax.devices()
install_import_hook("layerskip_jax", "beartype.beartype")


def pytest_sessionstart(session):
    """Keeps the cache from growing for ever: the programs used longest ago make room.

    jax can do so itself, by looking at every entry whenever it adds one, which takes longer than
    compiling small programs. Workers start after this.
    """
    if hasattr(session.config, "workerinput") or not CACHE.exists():
        return
    stats = {entry: entry.stat() for entry in CACHE.iterdir()}
    room = CACHE_BYTES
    for entry in sorted(stats, key=lambda entry: stats[entry].st_atime, reverse=True):
        room -= stats[entry].st_size
        if room < 0:
            entry.unlink(missing_ok=True)


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """Returns a function that calls `make(folder)` once for all workers, and returns the folder.

    What lies in it is for reading; a test that changes something works on a copy.
    """
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent

    def made(name, make):
        folder, done = shared / name, shared / f"{name}.done"
        with FileLock(shared / f"{name}.lock"):
            if not done.exists():
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return made


@pytest.fixture
def uncached(monkeypatch):
    """For programs of TPUs: without a TPU jax keeps them, but cannot read them back."""
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "false")  # of processes
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def prepared(made_once):
    """Forty small documents, prepared by the real command into windows of 12 tokens."""
    from layerskip_jax.commands import prepare  # the import hook must come first

    def make(folder):
        texts = folder / "texts"
        texts.mkdir()
        for number in range(40):
            words = " ".join(f"word{(number * k) % 17}" for k in range(20 + number))
            (texts / f"{number:02d}.txt").write_text(f"Document {number}. {words}\n")
        arguments = ["--vocab-size=300", "--sequence-length=12", "--validation-fraction=0.2"]
        assert prepare.main([f"--source={texts}", f"--output={folder / 'data'}", *arguments]) == 0

    return made_once("prepared", make) / "data"


@pytest.fixture(scope="session")
def arguments(made_once, prepared):
    """What `layerskip train` is given, beside a folder, for `RUN_RECIPE` on eight devices."""
    from tests.helpers import RUN_RECIPE

    folder = made_once("recipe", lambda folder: (folder / "small.py").write_text(RUN_RECIPE))
    return [
        f"--config={folder / 'small.py'}",
        f"--config.data.path={prepared}",
        "--config.mesh.shape.data=8",
    ]


@pytest.fixture(scope="session")
def finished(made_once, arguments):
    """The folder of such a run of 12 steps that nothing interrupted.

    Beside it, `compiled.json` has what jax logged of its compilations.
    """
    from layerskip_jax.cli import main

    def make(folder):
        records = []
        handler = logging.Handler()
        handler.emit = lambda record: records.append(record.getMessage())
        compiler = logging.getLogger("jax._src.dispatch")
        compiler.addHandler(handler)
        with jax.log_compiles():
            assert main(["train", f"--workdir={folder / 'whole'}", *arguments]) == 0
        compiler.removeHandler(handler)
        (folder / "compiled.json").write_text(json.dumps(records))

    return made_once("finished", make) / "whole"


@pytest.fixture(scope="session")
def quickstart(made_once):
    """The folder of a quickstart on a small corpus and model, and the command that made it.

    Beside it lies what it printed, in printed.txt.
    """
    from layerskip_jax.cli import main
    from tests.helpers import QUICKSTART_RECIPE

    def command(folder):
        return [
            "quickstart",
            f"--workdir={folder / 'run'}",
            f"--config={folder / 'recipe.py'}",
            f"--source={Path(sysconfig.get_path('stdlib')) / 'email'}",
            "--vocab-size=512",
            "--sequence-length=64",
            "--validation-fraction=0.2",
            "--steps=80",
            "--plain-steps=5",
        ]

    def make(folder):
        (folder / "recipe.py").write_text(QUICKSTART_RECIPE)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            assert main(command(folder)) == 0
        (folder / "printed.txt").write_text(printed.getvalue())

    folder = made_once("quickstart", make)
    return folder / "run", command(folder)
