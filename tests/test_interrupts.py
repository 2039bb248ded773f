"""Ctrl-C at moments that a verb cannot choose: in a native callback, while tidying up, twice."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from layerskip_jax import interrupts
from layerskip_jax.run_folder.atomic import staged_folder, write_text

LINE = "layerskip settings: interrupted\n"
# The verb is the case's own; nothing in it needs jax.
PROGRAM = """
import logging
import signal
import sys
import threading
import types

signal.signal(signal.SIGINT, {before})
from layerskip_jax import cli, interrupts
from layerskip_jax.schema import UserError

def ctrl_c():
    signal.raise_signal(signal.SIGINT)

def swallowed():
    try:
        ctrl_c()
    except KeyboardInterrupt:
        pass

def verb(arguments):
{body}

interrupts.AGAIN_SECONDS = 0.01
cli.leave_absent_tpu_alone = cli.spare_threads_for_waiting = lambda: None
command = types.ModuleType("layerskip_jax.commands.settings")
command.main = verb
sys.modules[command.__name__] = command
sys.argv = ["layerskip", "settings"]
sys.exit(cli.main())
"""
ENDS = {
    "in the verb's own code": "ctrl_c()",
    "swallowed, and the verb goes on": """
swallowed()
while True:
    pass
""",
    "swallowed, and the verb is done": """
swallowed()
return 0
""",
    "made another error": """
try:
    ctrl_c()
except KeyboardInterrupt as error:
    raise RuntimeError("INTERNAL") from error
""",
    "made an error of the user's": """
try:
    ctrl_c()
except KeyboardInterrupt:
    raise UserError("that is no tokenizer.json")
""",
    "another thread and package fail of it": """
try:
    ctrl_c()
finally:
    thread = threading.Thread(target=lambda: 1 / 0)
    thread.start()
    thread.join()
    logging.getLogger("absl").error("failed", exc_info=True)
""",
    "in a callback of a native library": """
from layerskip_jax.data.tokenizer import train_tokenizer

def texts():
    yield "the cat"
    ctrl_c()
    yield "sat"

train_tokenizer(texts(), 300)
while True:
    pass
""",
}


def run(body, before="signal.default_int_handler"):
    indented = "\n".join(f"    {line}" for line in body.splitlines())
    program = PROGRAM.format(body=indented, before=before)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("body", ENDS.values(), ids=ENDS)
def test_an_interrupt_ends_the_verb_wherever_it_comes(body):
    assert run(body) == (130, "", LINE)


def test_nothing_interrupts_the_tidying_but_ctrl_c_again():
    tidies = """
try:
    ctrl_c()
finally:
    for _ in range(5):
        signal.pause()  # until it was looked again whether the interrupt has arrived
    print("tidied")
"""
    assert run(tidies) == (130, "tidied\n", LINE)
    assert run(tidies.replace("signal.pause()", "ctrl_c()")) == (130, "", LINE)


def test_who_started_it_may_have_it_ignore_interrupts():
    assert run("ctrl_c()\nprint('done')\nreturn 0", before="signal.SIG_IGN") == (0, "done\n", "")


@pytest.fixture
def lost_interrupt():
    """Ctrl-C came, and no exception arrived."""
    interrupts._came.set()
    yield
    interrupts._came.clear()


def test_an_interrupt_that_was_lost_puts_nothing_in_its_place(tmp_path, lost_interrupt):
    target = tmp_path / "data"
    target.mkdir()
    (target / "old").touch()
    with pytest.raises(KeyboardInterrupt), staged_folder(target, lambda folder: None) as stage:
        (stage / "new").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert [path.name for path in target.iterdir()] == ["old"]


def test_an_interrupt_within_a_replacement_leaves_the_old(tmp_path, monkeypatch):
    """Between the two renames, and while a file is written beside its place."""
    target = tmp_path / "data"
    target.mkdir()
    (target / "old").touch()
    rename = os.rename

    def interrupted(source, to):
        if Path(to) == target:
            monkeypatch.setattr(os, "rename", rename)
            raise KeyboardInterrupt
        rename(source, to)

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), staged_folder(target, lambda folder: None) as stage:
        (stage / "new").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert [path.name for path in target.iterdir()] == ["old"]

    def replaced(source, to):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", replaced)
    with pytest.raises(KeyboardInterrupt):
        write_text(target / "page.html", "text")
    assert [path.name for path in target.iterdir()] == ["old"]
