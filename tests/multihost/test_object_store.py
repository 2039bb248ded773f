"""Several processes that share a folder on an object store, and one of which is killed."""

import json
import os
import signal

import pytest

from layerskip_jax.run_folder.paths import open_run, read_json_lines
from tests.multihost.test_processes import FSDP, SAME, SETTINGS, interrupt, launch, run
from tests.stores import s3_store

pytestmark = pytest.mark.slow


def test_processes_share_a_folder_on_a_store(tmp_path, arguments):
    recipe, data, _ = arguments
    train = ["train", recipe, data, *SETTINGS, *FSDP]
    run(launch(2, 2, [*train, f"--workdir={tmp_path / 'whole'}"]))
    with s3_store() as address:
        workdir = f"{address}/run"
        command = launch(2, 2, [*train, f"--workdir={workdir}"], "--restarts=1")
        code, errors = interrupt(
            command, "step 7/12", lambda pids: os.kill(pids[1], signal.SIGKILL)
        )
        assert code == 0, errors
        assert "restarting all processes" in errors
        sums, lines = [], []
        for path in (workdir, tmp_path / "whole"):
            folder, _ = open_run(path)
            record = folder.checkpoints / "12" / "record" / "metadata"
            sums.append(json.loads(record.read_text())["checksums"])
            lines.append(
                [[line[key] for key in SAME] for line in read_json_lines(folder.metrics_file)]
            )
            assert {p.name for p in (folder.home / "logs").iterdir()} == {
                "process-0.jsonl", "process-1.jsonl", "heartbeat-0.json", "heartbeat-1.json",
                "process-0.stderr", "process-1.stderr",
            }  # fmt: skip
        assert sums[0] == sums[1]
        # What is lost with a killed machine are lines of steps that the run does not go back to.
        steps = [line[0] for line in lines[0]]
        assert [line for line in lines[1] if line[0] in steps] == lines[0]
        assert steps[-1] == 12
