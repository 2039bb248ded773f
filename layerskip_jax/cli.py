"""The command line: a table from verb to the module in `commands/` that runs it."""

import contextlib
import functools
import importlib
import io
import logging
import multiprocessing
import os
import select
import signal
import sys
from typing import NoReturn

from layerskip_jax.distributed.cpu_threads import spare_threads_for_waiting
from layerskip_jax.hardware.tpu_presence import leave_absent_tpu_alone
from layerskip_jax.interrupts import interrupted, interrupts_remembered, raise_if_interrupted
from layerskip_jax.schema import ConfigError, UserError, as_bytes, is_text, nearest

VERBS = {
    "prepare": "turn text into packed windows to train on",
    "data": "where the text of a window that a run trains on was found",
    "import": "make a run of a Hugging Face folder or a GGUF file",
    "plan": "memory, traffic and time of a run on devices that are not here",
    "train": "pretrain a model, or go on where a run was stopped",
    "evaluate": "loss and perplexity at every exit, or accuracy on choices",
    "calibrate": "the threshold of an exit policy that keeps its risk within bounds",
    "generate": "decode: plain, early-exit or self-speculative",
    "inspect": "what every exit predicts, and how many layers tokens need",
    "sweep": "measure self-speculation over exits and draft lengths",
    "export": "write a Hugging Face folder",
    "verify": "compare a Hugging Face folder, as read here, with transformers",
    "lm-eval": "score any exit with the lm-evaluation-harness",
    "report": "make the HTML page of a run",
    "settings": "every setting of a run: its default, its range and what it means",
    "quickstart": "all of these in order, on Python's standard library",
}

# What shells say of a program that Ctrl-C ended.
INTERRUPTED = 128 + signal.SIGINT


def main(argv: list[str] | None = None) -> int:
    """Runs `layerskip VERB ARGUMENTS...`; returns its exit code, 2 for bad input."""
    of_process = argv is None
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return 0 if argv else 2
    verb, *arguments = argv
    if verb not in VERBS:
        hint = nearest(verb, VERBS)
        print(f"layerskip: there is no verb {verb!r}.{hint}\n\n{_usage()}", file=sys.stderr)
        return 2
    for argument in arguments:
        if not is_text(argument):
            print(
                f"layerskip {verb}: the argument {as_bytes(argument)} is not UTF-8 text; files are "
                "renamed with mv, and a prompt may come from a file, --prompt-file",
                file=sys.stderr,
            )
            return 2
    logging.basicConfig(format="%(message)s", stream=sys.stderr, level=logging.WARNING)
    logging.getLogger("layerskip_jax").setLevel(logging.INFO)
    # Orbax warns through absl of each option that the other options imply.
    logging.getLogger("absl").setLevel(logging.ERROR)
    logging.getLogger("absl").addFilter(_without_traceback)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # As standard error does by itself: a terminal that lacks a character gets its number.
        sys.stdout.reconfigure(errors="backslashreplace")
    end = functools.partial(_end_at_once, verb)
    with interrupts_remembered(end) if of_process else contextlib.nullcontext():
        try:
            return _run(verb, arguments)
        except BaseException as error:
            # A library may have made another error of it.
            if not isinstance(error, KeyboardInterrupt) and not interrupted():
                raise
            if of_process:
                end()
            print(f"layerskip {verb}: interrupted", file=sys.stderr)
            return INTERRUPTED


def _without_traceback(record: logging.LogRecord) -> bool:
    """Leaves the line of an error that orbax logs, which it raises too, and we name."""
    record.exc_info = record.exc_text = None
    return True


def _run(verb: str, arguments: list[str]) -> int:
    """Runs a verb; returns its exit code, having said what a user has to mend."""
    # Imported only now: one verb need not wait for the libraries of the others.
    # `import` is a keyword, and a module's name has no hyphen.
    module = {"import": "import_model"}.get(verb, verb.replace("-", "_"))
    try:
        command = importlib.import_module(f"layerskip_jax.commands.{module}")
        leave_absent_tpu_alone()
        spare_threads_for_waiting()
        code = command.main(arguments)
        sys.stdout.flush()
        raise_if_interrupted()
        return code
    except (ConfigError, UserError) as error:
        raise_if_interrupted()
        print(f"layerskip {verb}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        if not _reader_is_gone():
            raise  # of another pipe
        # Whoever read has seen enough. What is still to be written would fail again at exit.
        with open(os.devnull, "w") as nowhere, contextlib.suppress(io.UnsupportedOperation):
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        return 1  # as rich ends a program whose tables nobody reads on


def _reader_is_gone() -> bool:
    """Whether nobody reads what this process prints any more."""
    try:
        descriptor = sys.stdout.fileno()
    except io.UnsupportedOperation:
        return False
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _end_at_once(verb: str) -> NoReturn:
    """Ends the process where it is: threads that still compute or save would crash its shutdown.

    What a verb tidies up, it has tidied up by now, unless Ctrl-C was pressed twice.
    """
    for child in multiprocessing.active_children():
        child.terminate()
    print(f"layerskip {verb}: interrupted", file=sys.stderr, flush=True)
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
    os._exit(INTERRUPTED)


def _usage() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {verb:<{width}}  {text}" for verb, text in VERBS.items()]
    head = "usage: layerskip VERB ...  (layerskip VERB --help tells more)"
    return "\n".join([head, "", *lines])
