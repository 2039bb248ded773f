"""Fills a JobSet template of this folder and prints it; the Kubernetes launch scripts call it.

usage: python3 launch/jobset.py TEMPLATE NAME=VALUE ... -- COMMAND ...

A `${name}` stands where a value goes; a line whose value is missing is left out, and one with
`${each_env}` is repeated for each variable. Values are written as JSON, which YAML reads as it
stands, so no quote, colon or newline of an argument can change the manifest. Standard library
only: it runs where the scripts run.
"""

import json
import re
import string
import sys
from pathlib import Path

NUMBERS = ("nodes", "slices", "hosts", "restarts", "grace")
MULTIPLE = ("env", "limit", "node_selector")


def main(argv: list[str]) -> int:
    """Prints the manifest."""
    split = argv.index("--")
    template, *settings = argv[:split]
    given: dict[str, str] = {}
    lists: dict[str, dict[str, str]] = {name: {} for name in MULTIPLE}
    for setting in settings:
        name, value = setting.split("=", 1)
        if name in MULTIPLE:
            key, value = value.split("=", 1)
            lists[name][key] = value
        elif value:
            given[name] = value
    text = (Path(__file__).parent / template).read_text()
    print(render(text, values(given, lists, argv[split + 1 :])), end="")
    return 0


def values(given: dict[str, str], lists: dict[str, dict[str, str]], command: list[str]) -> dict:
    """Returns what the templates ask for, None for what is to be left out."""
    numbers = {name: int(given[name]) for name in NUMBERS if name in given}
    found = {**dict.fromkeys(("namespace", "account")), **given, **numbers}
    name = found["name"] = given["name"]
    found["command"] = [
        given.get("python", "python3"),
        "-m",
        "layerskip_jax",
        # Kubernetes replaces $(NAME) in commands, and reads $$ as one $.
        *(word.replace("$", "$$") for word in command),
    ]
    queue = given.get("queue")
    found["labels"] = {"kueue.x-k8s.io/queue-name": queue} if queue else None
    found["env"] = [
        {"name": key, "value": value.replace("$", "$$")} for key, value in lists["env"].items()
    ]
    secret = given.get("secret")
    found["env_from"] = [{"secretRef": {"name": secret}}] if secret else None
    claim, _, mount = given.get("pvc", "").partition(":")
    found["volumes"] = [{"name": "workdir", "persistentVolumeClaim": {"claimName": claim}}] * bool(
        claim
    )
    found["mounts"] = [{"name": "workdir", "mountPath": mount}] * bool(claim)
    found["node_selector"] = lists["node_selector"]
    found["coordinator"] = f"{name}-worker-0-0.{name}:8476"
    if "gpus" in given:
        found["limits"] = {"nvidia.com/gpu": given["gpus"], **lists["limit"]}
        # Memory that a network adapter reads itself has to be locked.
        found["security"] = {"capabilities": {"add": ["IPC_LOCK"]}} if lists["limit"] else None
        # NCCL exchanges through /dev/shm between GPUs without a link; a pod's own is 64 MiB.
        found["volumes"].append({"name": "shm", "emptyDir": {"medium": "Memory"}})
        found["mounts"].append({"name": "shm", "mountPath": "/dev/shm"})
        found["env"] = [{"name": "NCCL_DEBUG", "value": "WARN"}] * (
            "NCCL_DEBUG" not in lists["env"]
        ) + found["env"]
    else:
        found["limits"] = {"google.com/tpu": given["chips"]}
        found["node_selector"] = {
            "cloud.google.com/gke-tpu-accelerator": given["accelerator"],
            "cloud.google.com/gke-tpu-topology": given["topology"],
            **({"cloud.google.com/gke-spot": "true"} if "spot" in given else {}),
            **(
                {"cloud.google.com/reservation-name": given["reservation"]}
                if "reservation" in given
                else {}
            ),
            **found["node_selector"],
        }
        found["tolerations"] = [
            {
                "key": "cloud.google.com/gke-spot",
                "operator": "Equal",
                "value": "true",
                "effect": "NoSchedule",
            }
        ] * ("spot" in given)
    return found


def render(template: str, found: dict) -> str:
    """Returns the template with every `${name}` replaced by the JSON of its value, in one pass."""
    lines = []
    for line in template.splitlines(keepends=True):
        if "${each_env}" in line:
            lines += [line.replace("${each_env}", _json(pair)) for pair in found["env"]]
            continue
        names = re.findall(r"\$\{(\w+)\}", line)
        if any(found[name] in (None, [], {}) for name in names):
            continue
        lines.append(string.Template(line).substitute({n: _json(found[n]) for n in names}))
    return "".join(lines)


def _json(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    # JSON leaves these as they are, and YAML refuses them unless they are escaped.
    return re.sub(
        r"[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]", lambda m: f"\\u{ord(m[0]):04x}", text
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
