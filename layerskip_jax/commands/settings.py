"""layerskip settings: every setting of a run, with its default, its range and what it means.

usage: layerskip settings [GROUP|WORD]

GROUP is a dotted prefix such as layer_dropout or mesh.rules; WORD is looked for in names and
meanings. A recipe sets them, and so does the command line: --config.layer_dropout.p_max=0.2.
"""

import dataclasses

from rich.box import SIMPLE_HEAD
from rich.text import Text

from layerskip_jax.commands.arguments import make_parser
from layerskip_jax.commands.tables import FigureTable, make_console, make_table
from layerskip_jax.schema import UserError, nearest
from layerskip_jax.settings import Group, setting_groups

MARKDOWN_COMMAND = "layerskip settings --markdown > docs/settings.md"
HEADINGS = ("setting", "default", "meaning")


def main(argv: list[str]) -> int:
    """Runs the verb and returns its exit code."""
    parser = make_parser("settings", __doc__)
    parser.add_argument("which", nargs="?", metavar="GROUP|WORD", help="(default: all)")
    parser.add_argument(
        "--markdown", action="store_true", help="print a page, as docs/settings.md is one"
    )
    options = parser.parse_args(argv)
    groups = setting_groups()
    if options.which is not None:
        groups = select(groups, options.which)
    if options.markdown:
        print(markdown(groups))
        return 0
    console = make_console()
    for group in groups:
        console.print(_table(group))
    return 0


def select(groups: list[Group], which: str) -> list[Group]:
    """Returns the groups of that name and those inside them, or the settings that mention it.

    Raises:
      UserError: there are none; the message has the nearest.
    """
    name = which.removeprefix("config.").strip(".")
    inside = [g for g in groups if name and f"{g.name}.".startswith(f"{name}.")]
    if inside:
        return inside
    word = name.lower()
    found = []
    for group in groups:
        settings = [s for s in group.settings if word in f"{s.name} {s.meaning}".lower()]
        exact = [s for s in settings if s.name == name]
        if exact:
            return [dataclasses.replace(group, settings=tuple(exact))]
        if settings:
            found.append(dataclasses.replace(group, settings=tuple(settings)))
    if not found:
        names = [setting.name for group in groups for setting in group.settings]
        known = {*names, *(n.rsplit(".", 1)[-1] for n in names), *(g.name for g in groups)} - {""}
        raise UserError(
            f"no group or setting is named {which!r}, and none mentions it.{nearest(name, known)}"
        )
    return found


def _title(group: Group) -> str:
    return f"config.{group.name}" if group.name else "config"


def _table(group: Group) -> FigureTable:
    return make_table(
        Text.assemble((_title(group), "bold"), f"  {group.summary}"),
        HEADINGS,
        [(s.name.rsplit(".", 1)[-1], s.shown_default, s.meaning) for s in group.settings],
        left=HEADINGS,
        caption=group.details,
        box=SIMPLE_HEAD,
    )


def markdown(groups: list[Group]) -> str:
    """Returns the groups as a page of Markdown tables."""
    lines = [
        f"<!-- Made by `{MARKDOWN_COMMAND}`; change the docstrings, not this file. -->",
        "# Settings",
        "",
        "Every setting of a run. A recipe sets it (`config.layer_dropout.p_max = 0.2`), and so "
        "does the command line (`--config.layer_dropout.p_max=0.2`). `layerskip settings "
        "[GROUP|WORD]` prints the same in a terminal.",
    ]
    for group in groups:
        lines += ["", f"## `{_title(group)}`", "", group.summary]
        lines += ["", group.details] if group.details else []
        lines += ["", "| setting | default | meaning |", "|---|---|---|"]
        for s in group.settings:
            meaning = s.meaning.replace("|", "\\|")
            lines.append(f"| `config.{s.name}` | `{s.shown_default}` | {meaning} |")
    return "\n".join(lines)
