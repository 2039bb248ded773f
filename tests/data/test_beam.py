"""Units done by Beam's own engines, and by workers of a portable job service: the same bytes."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import filelock
import pytest

from layerskip_jax.commands import prepare as command
from layerskip_jax.data import beam_runner
from layerskip_jax.data.prepare import prepare
from layerskip_jax.schema import UserError
from tests.data.conftest import small_request
from tests.data.test_output_places import downloaded, names_in
from tests.data.test_units import REPOSITORY, UNIT_BYTES, broken_corpus, contents
from tests.stores import s3_store

BEAM = "apache-beam==2.77.*"
SITE = REPOSITORY / ".cache" / "beam-2.77"


def test_without_beam_it_says_how_to_install_it(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "apache_beam" else find(name)
    )
    with pytest.raises(UserError, match=r"needs Apache Beam.*pip install .\[beam\]"):
        beam_runner.BeamRunner()


def test_options_of_one_runner_are_no_options_of_the_other(tmp_path):
    line = [f"--output={tmp_path / 'data'}", "--source=none"]
    with pytest.raises(UserError, match="--beam-options='--a' needs --runner=beam"):
        command.main([*line, "--beam-options=--a"])
    with pytest.raises(UserError, match="--workers=2 is of this machine's processes"):
        command.main([*line, "--runner=beam", "--workers=2"])


@pytest.fixture(scope="module")
def beam_environment():
    """The variables by which Beam is found, which needs older packages than some tests."""
    SITE.parent.mkdir(exist_ok=True)
    with filelock.FileLock(f"{SITE}.lock"):
        if not (SITE / "whole").is_file():
            install = [sys.executable, "-m", "pip", "install", "--quiet", f"--target={SITE}", BEAM]
            done = subprocess.run(install, capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"{BEAM} CANNOT BE INSTALLED HERE: {done.stderr.strip()[-300:]}")
            (SITE / "whole").touch()
    path = f"{SITE}{os.pathsep}{REPOSITORY}"
    return {
        **os.environ,
        "PYTHONPATH": path,
        # Its pool of workers starts whatever is called `python`.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }


@pytest.fixture(scope="module")
def expected(tmp_path_factory, corpus_folder):
    output = tmp_path_factory.mktemp("expected") / "data"
    prepare(small_request(corpus_folder, unit_bytes=UNIT_BYTES, keep_documents=True), output)
    return contents(output)


def prepare_line(corpus, output, options):
    return [
        sys.executable, "-m", "layerskip_jax", "prepare", f"--source={corpus}",
        "--sequence-length=16", "--vocab-size=300", "--validation-fraction=0.2",
        f"--unit-bytes={UNIT_BYTES}", "--keep-documents", f"--output={output}", "--runner=beam",
        f"--beam-options={options}",
    ]  # fmt: skip


def run(environment, *arguments):
    done = subprocess.run(
        prepare_line(*arguments), env=environment, cwd=REPOSITORY, capture_output=True, text=True,
        check=False, timeout=300,
    )  # fmt: skip
    return done.returncode, done.stderr


@pytest.mark.slow  # Beam is installed, and its processes take seconds to start
@pytest.mark.parametrize(
    "options",
    [
        "--runner=FnApiRunner",
        "--runner=FnApiRunner --direct_running_mode=multi_processing --direct_num_workers=2",
    ],
    ids=["in memory", "processes"],
)
def test_beams_own_engine_gives_the_same_bytes(
    beam_environment, corpus_folder, tmp_path, expected, options
):
    output = tmp_path / "data"
    code, said = run(beam_environment, corpus_folder, output, options)
    assert code == 0, said
    assert contents(output) == expected
    assert os.listdir(tmp_path) == ["data"]
    assert "the Beam pipeline ended (DONE): documents 40, tokens " in said


@pytest.fixture
def job_service(beam_environment, tmp_path):
    """A job service that pipelines are sent to, and workers of its own; yields Beam's options."""
    folder = tmp_path / "service"
    folder.mkdir()
    main = [sys.executable, "-m", "apache_beam.runners.portability.local_job_service_main"]
    pid = f"--pid_file={folder / 'pid'}"
    files = [pid, f"--port_file={folder / 'port'}", f"--stdout_file={folder / 'log'}"]
    subprocess.run(
        [*main, "--background", *files], env=beam_environment, check=True, capture_output=True
    )
    port = (folder / "port").read_text().strip()
    worker_port = 50500 + os.getpid() % 400
    workers = subprocess.Popen(
        [
            sys.executable, "-m", "apache_beam.runners.worker.worker_pool_main",
            f"--service_port={worker_port}",
        ],
        env=beam_environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield (
            f"--runner=PortableRunner --job_endpoint=localhost:{port} "
            f"--environment_type=EXTERNAL --environment_config=localhost:{worker_port}"
        )
    finally:
        workers.terminate()
        workers.wait()
        subprocess.run(
            [*main, "--stop", pid], env=beam_environment, check=True, capture_output=True
        )


@pytest.mark.slow  # as above
def test_a_portable_job_service_gives_the_same_bytes(
    beam_environment, corpus_folder, tmp_path, expected, job_service
):
    code, said = run(beam_environment, corpus_folder, tmp_path / "data", job_service)
    assert code == 0, said
    assert contents(tmp_path / "data") == expected


@pytest.mark.slow  # as above
def test_workers_share_a_store_with_who_submits(
    beam_environment, corpus_folder, tmp_path, expected
):
    with s3_store() as address:
        environment = beam_environment | {
            name: value for name, value in os.environ.items() if name.startswith("AWS_")
        }
        options = "--runner=FnApiRunner --direct_running_mode=multi_processing"
        options += " --direct_num_workers=2"
        code, said = run(environment, corpus_folder, f"{address}/beam", options)
        assert code == 0, said
        assert contents(downloaded(f"{address}/beam", tmp_path)) == expected
        assert not names_in(f"{address}/.beam.units")


@pytest.mark.slow  # as above
def test_a_pipeline_that_is_killed_goes_on(beam_environment, corpus_folder, tmp_path, expected):
    output = tmp_path / "data"
    line = prepare_line(corpus_folder, output, "--runner=FnApiRunner")
    process = subprocess.Popen(
        line, env=beam_environment, cwd=REPOSITORY, stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    units = tmp_path / ".data.units"
    deadline = time.monotonic() + 120
    while process.poll() is None and len(list(units.glob("*/record.json"))) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL and not output.exists()
    code, said = run(beam_environment, corpus_folder, output, "--runner=FnApiRunner")
    assert code == 0 and "units are done already" in said
    assert contents(output) == expected


@pytest.mark.slow  # as above
def test_bad_input_is_named_as_by_other_runners(beam_environment, corpus_folder, tmp_path):
    texts = broken_corpus(corpus_folder, tmp_path)
    code, said = run(beam_environment, texts, tmp_path / "data", "--runner=FnApiRunner")
    assert code == 2 and said.strip().splitlines()[-1].endswith("or pass --skip-bad-files")
    assert "20.txt is not UTF-8 text" in said
    code, said = run(beam_environment, texts, tmp_path / "data", "--runner=FnApiRunner --no_such=1")
    assert code == 2 and "Beam 2.77.0 knows no option --no_such" in said
