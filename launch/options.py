"""What the launch programs share: options, refusals, quoting.

Standard library only, from Python 3.9: it runs where the programs run, such as on login nodes.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
from pathlib import Path
from typing import NoReturn

PROGRAM = f"launch/{Path(sys.argv[0]).stem}.sh"
# The exit codes of `layerskip train`: stopped, so go on; and bad input, so don't.
RESTART, BAD_INPUT = 75, 2
SAFE = re.compile(r"[A-Za-z0-9_@%+=:,./-]+")
# Pods append -worker-0-00000 to the name, and have at most 63.
NAME = (
    r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?",
    "at most 40 small letters, digits and hyphens, the first a letter",
)


def say(line: str) -> None:
    """Tells the user something beside the output."""
    print(f"{PROGRAM}: {line}", file=sys.stderr, flush=True)


def refuse(line: str) -> NoReturn:
    """Ends the program over bad input."""
    say(line)
    sys.exit(BAD_INPUT)


def require(program: str, remedy: str) -> None:
    """Refuses to go on without a program."""
    if not shutil.which(program):
        refuse(f"there is no {program} here; {remedy}")


def quoted(*words: str) -> str:
    """Returns the words as a shell would read them back."""
    return " ".join(
        word if SAFE.fullmatch(word) else "'" + word.replace("'", r"'\''") + "'" for word in words
    )


class Options(argparse.Namespace):
    """The options as attributes, the words behind `--` as `command`, and checks that refuse."""

    @classmethod
    def parse(cls, usage: str, options: list[str], lists: str, flags: str) -> Options:
        """Returns the options of the command line.

        Args:
          usage: what --help prints.
          options: NAME or NAME=DEFAULT of what is given as --NAME=VALUE.
          lists: names of what is given so any number of times.
          flags: names of what is given as --NAME.
        """
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        defaults = {name: value for name, _, value in (word.partition("=") for word in options)}
        for name, default in defaults.items():
            parser.add_argument(f"--{name}", default=default)
        for name in lists.split():
            parser.add_argument(f"--{name}", action="append", default=[])
        for name in flags.split():
            parser.add_argument(f"--{name}", action="store_true")
        found = parser.parse_args([], cls())
        words = [*sys.argv[1:], "--"]
        split = words.index("--")
        found.command = words[split + 1 : -1]
        for word in words[:split]:
            if word in ("--help", "-h"):
                print(usage.strip())
                sys.exit()
            name = word.partition("=")[0]
            # One word at a time, so that no value is taken from the next one.
            try:
                _, unknown = parser.parse_known_args([word], found)
            except argparse.ArgumentError:
                if "=" in word:
                    refuse(f"{word}: {name} takes no value")
                refuse(f"{name} needs its value behind an equals sign: {name}=VALUE")
            if unknown and word.startswith("--"):
                known = f"{' '.join(defaults)} {lists} {flags}"
                refuse(f"{name} is no option of this script; there are: {known}")
            if unknown:
                where = "the layerskip command comes behind --: -- train ..."
                refuse(f"'{word}' is no option; {where}")
        if not found.command:
            why = "no layerskip command; give it behind --, as in"
            refuse(f"{why} -- train --config=... --workdir=...")
        return found

    def _values(self, name: str) -> list:
        value = getattr(self, name.replace("-", "_"))
        return value if isinstance(value, list) else [value] * bool(value)

    def given(self, names: str) -> list[str]:
        """Returns those of the options that are given, as they were given."""
        pairs = [(name, value) for name in names.split() for value in self._values(name)]
        return [f"--{name}" if value is True else f"--{name}={value}" for name, value in pairs]

    def need(self, names: str) -> None:
        """Refuses options that are missing."""
        for name in names.split():
            if not self._values(name):
                refuse(f"--{name} is missing; --help tells what it is")

    def exclude(self, why: str, names: str) -> None:
        """Refuses options that are given."""
        for word in self.given(names):
            refuse(f"{word.partition('=')[0]} is {why}")

    def whole(self, least: int, names: str) -> None:
        """Makes options numbers; refuses what is no whole number of at least `least`."""
        for name in names.split():
            value = getattr(self, name.replace("-", "_"))
            if not re.fullmatch("0|[1-9][0-9]{0,8}", value) or int(value) < least:
                refuse(f"--{name}={value} must be a whole number of at least {least}")
            setattr(self, name.replace("-", "_"), int(value))

    def matching(self, name: str, pattern: str, what: str) -> None:
        """Refuses a value, if given, that does not match."""
        for value in self._values(name):
            if not re.fullmatch(pattern, value, re.DOTALL):
                refuse(f"--{name}={value} must be {what}")

    def pairs(self, names: str) -> None:
        """Refuses elements of lists that are not NAME=VALUE."""
        for name in names.split():
            self.matching(name, "[A-Za-z_][A-Za-z0-9_./-]*=.+", f"--{name}=NAME=VALUE")

    def workdir(self) -> str:
        """Returns the --workdir of the command, or nothing."""
        found = [word for word in self.command if word.startswith("--workdir=")]
        return found[-1].partition("=")[2] if found else ""

    def become(self, command: list[str], remedy: str) -> None:
        """Runs a command in place of this program; prints it in a dry run."""
        if self.dry_run:
            print(quoted(*command))
            return
        require(command[0], remedy)
        os.execvp(command[0], command)
