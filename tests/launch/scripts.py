"""Running the launch scripts against commands that only record how they were called."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
LAUNCH = REPOSITORY / "launch"
# Arguments that a shell, YAML or Kubernetes would change if they were quoted badly.
AWKWARD = [
    "train",
    "--config=configs/quickstart.py",
    '--config.a.b=it\'s "so" {x: 1}',
    "--config.c=$HOME $(HOME) $$ `id`",
    "--config.d=two\nlines # no comment",
    "--config.e=été 你好 😀 \\n \x85",
    "--config.f=",
    "--config.g=*",
]
# Records its name, arguments and, for kubectl, what it was given to read; prints and exits with
# the next of its answers.
FAKE = """#!{python}
import json, os, sys
from pathlib import Path

folder = Path({folder!r})
name, *words = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
key = words[3] if name == "gcloud" else name
if name == "kubectl":
    words.append(sys.stdin.read())
with open(folder / "calls", "a") as log:
    print(json.dumps([name, *words]), file=log)
answers_file = folder / "answers" / key
if answers_file.exists():
    answers = json.loads(answers_file.read_text())
    code, text = answers[0]
    # The last answer holds from then on.
    answers_file.write_text(json.dumps(answers[1:] or answers))
    print(text, file=sys.stderr if code else sys.stdout)
    sys.exit(code)
"""


class Fakes:
    """Commands that record their calls and answer as told."""

    def __init__(self, folder: Path, *names: str):
        self.folder = folder
        self.bin = folder / "bin"
        for part in (self.bin, folder / "answers"):
            part.mkdir(parents=True)
        for name in names:
            command = self.bin / name
            command.write_text(FAKE.format(python=sys.executable, folder=str(folder)))
            command.chmod(0o755)

    def answer(self, key: str, *answers: tuple[int, str]) -> None:
        """Lets the calls of a command (of gcloud: of its verb) end with these codes and texts."""
        (self.folder / "answers" / key).write_text(json.dumps(answers))

    def calls(self, key: str | None = None) -> list[list[str]]:
        log = self.folder / "calls"
        calls = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        return [call for call in calls if key in (None, call[0], *call[4:5])]


def run(script, *arguments, fakes: Fakes | None = None, **environment):
    """Runs a script of launch/ and returns what it printed and its exit code."""
    path = f"{fakes.bin}:{os.environ['PATH']}" if fakes else os.environ["PATH"]
    return subprocess.run(
        [shutil.which("bash"), str(LAUNCH / script), *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "PATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
