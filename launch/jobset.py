"""What the launch programs for Kubernetes share: checks, and the manifest to kubectl.

In jobset.yaml a `${name}` stands where a value goes; a line whose value is missing is left out,
one with `${each_env}` is repeated for each variable, and one that ends with `#only gpu` or
`#only tpu` is of that kind of JobSet. Values are written as JSON, which YAML reads as it stands,
so no quote, colon or newline of an argument can change the manifest.
"""

from __future__ import annotations

import json
import re
import string
import subprocess
import sys
from pathlib import Path

import bucket
from options import NAME, Options, quoted, refuse, require, say


def check(options: Options) -> None:
    """Refuses what Kubernetes would refuse, and a workdir that would be lost."""
    options.matching("name", *NAME)
    options.matching("namespace", "[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", "the name of a namespace")
    options.whole(0, "restarts")
    options.whole(1, "grace")
    options.matching(
        "pvc", "[a-z0-9][-a-z0-9.]*:/.+", "CLAIM:/PATH, a volume claim and where to mount it"
    )
    folder, mount = options.workdir(), options.pvc.partition(":")[2]
    # Anything else is in the container, and gone with it at the first restart.
    kept = "://" in folder or (mount and f"{folder}/".startswith(f"{mount}/"))
    if folder and not kept:
        refuse(
            f"--workdir={folder} would be lost with the pod; give gs://..., s3://..., or a folder "
            "under the path of a --pvc=CLAIM:/PATH"
        )
    if mount and mount == options.data_mount:
        refuse(f"--pvc={options.pvc} and --data-mount={mount} are one path; give two")


def values(options: Options) -> dict:
    """Returns what both kinds ask for: the options, and what is made of them."""
    claim, _, mount = options.pvc.partition(":")
    env = dict(pair.split("=", 1) for pair in options.env)
    # Kubernetes replaces $(NAME) in commands and variables, and reads $$ as one $.
    words = [word.replace("$", "$$") for word in options.command]
    volume = {"name": "workdir", "persistentVolumeClaim": {"claimName": claim}}
    data = bucket.volume(options)
    return {
        **vars(options),
        **data,
        "command": [options.python or "python3", "-m", "layerskip_jax", *words],
        "labels": {"kueue.x-k8s.io/queue-name": options.queue} if options.queue else None,
        "env": [{"name": name, "value": env[name].replace("$", "$$")} for name in env],
        "env_from": [{"secretRef": {"name": options.secret}}] if options.secret else None,
        "volumes": [volume] * bool(claim) + data["volumes"],
        "mounts": [{"name": "workdir", "mountPath": mount}] * bool(claim) + data["mounts"],
        "node_selector": dict(pair.split("=", 1) for pair in options.node_selector),
    }


def submit(options: Options, kind: str, found: dict) -> None:
    """Prints the manifest, or has kubectl create its JobSet."""
    folder = Path(__file__).parent
    manifest = render((folder / "jobset.yaml").read_text(), kind, found)
    volume = ""
    if found["volume"]:
        volume = render((folder / "mountpoint.yaml").read_text(), kind, found)
    if options.dry_run:
        print(volume + manifest, end="")
        return
    require("kubectl", "--dry-run prints the manifest for one elsewhere")
    if volume:
        # Of an earlier JobSet of that name it may be there, and is right if it is the same.
        done = subprocess.run(["kubectl", "apply", "--filename=-"], input=volume.encode())
        if done.returncode:
            say(f"the volume is not there as asked for; to make it anew: {_delete(options, found)}")
            sys.exit(done.returncode)
    # Not apply: over a JobSet of that name it would change nothing, or fail on what is immutable.
    done = subprocess.run(["kubectl", "create", "--filename=-"], input=manifest.encode())
    if done.returncode:
        sys.exit(done.returncode)
    say(" ".join(["to follow it: kubectl get jobset", options.name, *options.given("namespace")]))
    if volume:
        say(f"its volume stays when it is deleted; to delete that: {_delete(options, found)}")


def _delete(options: Options, found: dict) -> str:
    # Both: a volume whose claim is gone is bound to no other.
    what = [f"pvc/{found['claim']}", f"pv/{found['volume']}"]
    return quoted("kubectl", "delete", *what, *options.given("namespace"))


def render(template: str, kind: str, found: dict) -> str:
    """Returns the template with every `${name}` replaced by the JSON of its value, in one pass."""
    lines = []
    for line in template.splitlines():
        line, marked, only = line.partition("  #only ")
        if marked and only != kind:
            continue
        if "${each_env}" in line:
            lines += [line.replace("${each_env}", _json(pair)) for pair in found["env"]]
            continue
        names = re.findall(r"\$\{(\w+)\}", line)
        if any(found[name] in (None, "", [], {}) for name in names):
            continue
        lines.append(string.Template(line).substitute({n: _json(found[n]) for n in names}))
    return "\n".join(lines) + "\n"


def _json(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    # JSON leaves these as they are, and YAML refuses them unless they are escaped.
    return re.sub(
        r"[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]", lambda m: f"\\u{ord(m[0]):04x}", text
    )
