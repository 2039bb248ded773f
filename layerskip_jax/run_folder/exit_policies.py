"""What `layerskip calibrate` found, in the folder of a run: one threshold for each kind of exit."""

import json
from typing import Any

from layerskip_jax.run_folder.atomic import named_writes, remedy, write_json
from layerskip_jax.run_folder.paths import RunFolder
from layerskip_jax.schema import ConfigError, UserError

# What tells one entry from another.
_KEY = ("policy", "kv", "exits")


def read_policies(folder: RunFolder) -> list[dict[str, Any]]:
    """Returns the entries of `exit_policies_file`, none where there is no such file.

    Raises:
      UserError: it cannot be read, or is damaged.
    """
    file = folder.shown(folder.exit_policies_file)
    try:
        found = json.loads(folder.exit_policies_file.read_bytes())
        entries = found["policies"]
        whole = all({*_KEY, "threshold", "step"} <= entry.keys() for entry in entries)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error}){remedy(error)}") from error
    except (ValueError, LookupError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise UserError(f"{file} is damaged; remove it and run `layerskip calibrate` again")
    return entries


def store_policy(folder: RunFolder, entry: dict[str, Any]) -> None:
    """Writes an entry beside those that are there, in place of one of the same kind of exit.

    Args:
      folder: of the run.
      entry: with `policy`, `kv`, `exits`, `threshold`, `step`, and what else is worth knowing.

    Raises:
      UserError: the file that is there is damaged, or it cannot be written.
    """
    key = [entry[name] for name in _KEY]
    kept = [old for old in read_policies(folder) if [old[name] for name in _KEY] != key]
    with named_writes(folder.exit_policies_file):
        write_json(folder.exit_policies_file, {"policies": [*kept, entry]})


def load_threshold(
    folder: RunFolder, policy: str, kv: str, exits: tuple[int, ...], step: int
) -> int | float:
    """Returns the threshold that `layerskip calibrate` found.

    Args:
      folder: of the run.
      policy: its name.
      kv: `propagate` or `deferred`.
      exits: the candidate exits.
      step: the checkpoint that decodes.

    Raises:
      ConfigError: it found none for these, or for another checkpoint; with the command that does.
      UserError: the file is damaged.
    """
    listed = ",".join(map(str, exits))
    command = f"layerskip calibrate --workdir={folder.home} --exit-when={policy}"
    command += f" --kv={kv} --exits={listed} --step={step} --risk=0.05"
    for entry in read_policies(folder):
        if [entry[name] for name in _KEY] != [policy, kv, list(exits)]:
            continue
        if entry["step"] != step:
            raise ConfigError(
                f"exit_when={policy!r} was calibrated for step {entry['step']}, and this is step "
                f"{step}; run `{command}`, or give a threshold yourself, as in {policy}:NUMBER"
            )
        return entry["threshold"]
    raise ConfigError(
        f"exit_when={policy!r} has no threshold, and none was calibrated for kv={kv} and exits "
        f"{listed}; run `{command}`, or give one yourself, as in {policy}:NUMBER"
    )
