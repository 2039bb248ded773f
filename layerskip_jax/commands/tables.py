"""The one way in which the verbs print figures: none is cut, however narrow the terminal is."""

import dataclasses
import os
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence

from rich.box import HEAVY_HEAD, Box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

# Of what is written to a file or a pipe, where nothing else is asked for.
FILE_WIDTH = 120
# A longer word in a column of text, such as a path, may go on in the next line.
LONGEST_WORD = 24


def make_console() -> Console:
    """Returns what the verbs print on: text is printed as it is, and brackets are no markup."""
    given = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(width=None if given else FILE_WIDTH, markup=False, emoji=False, highlight=False)


def make_table(
    title: str | Text,
    headings: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    left: Collection[str] = ("",),
    styles: Sequence[str | None] = (),
    sections: Collection[int] = (),
    caption: str | None = None,
    box: Box | None = None,
) -> "FigureTable":
    """Returns a table of figures for `Console.print`.

    Args:
      title: what it shows, above it.
      headings: one for each column.
      rows: their cells, already in words.
      left: headings of the columns of text; figures stand to the right.
      styles: of the rows, as rich has them; rows without one look plain.
      sections: rows that a line follows.
      caption: what explains it, below it.
      box: its lines; None takes all.
    """
    rows = [list(row) for row in rows]
    styles = [*styles, *[None] * (len(rows) - len(styles))]
    return FigureTable(title, list(headings), rows, left, styles, sections, caption, box)


@dataclasses.dataclass
class FigureTable:
    """See `make_table`: a table where it fits, and else a list of the figures of each row."""

    title: str | Text
    headings: list[str]
    rows: list[list[str]]
    left: Collection[str]
    styles: list[str | None]
    sections: Collection[int]
    caption: str | None
    box: Box | None

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:
        """Yields what rich then prints."""
        edges = 3 * len(self.headings) + (1 if self.box is None else -1)
        widths = self._widths(options.max_width - edges)
        if widths is None:
            yield from self._listed(options.max_width)
        else:
            yield self._table(widths)

    def _widths(self, room: int) -> list[int] | None:
        """Returns the columns' widths, at least those of their longest words; None: no room."""
        least, most = [], []
        for index, heading in enumerate(self.headings):
            cells = [heading, *(row[index] for row in self.rows)]
            longest = max(cell_len(word) for cell in cells for word in cell.split() or [""])
            least.append(min(longest, LONGEST_WORD) if heading in self.left else longest)
            most.append(max(cell_len(line) for cell in cells for line in cell.splitlines() or [""]))
        spare = room - sum(least)
        if spare < 0:
            return None
        widths, waiting = list(least), len(least)
        for index in sorted(range(len(least)), key=lambda i: most[i] - least[i]):
            more = min(most[index] - least[index], spare // waiting)
            widths[index] += more
            spare -= more
            waiting -= 1
        return widths

    def _table(self, widths: list[int]) -> Table:
        table = Table(
            title=self.title, title_justify="left", caption=self.caption, caption_justify="left",
            box=self.box or HEAVY_HEAD, pad_edge=self.box is None,
        )  # fmt: skip
        if isinstance(self.title, Text):
            table.title_style = ""
        for heading, width in zip(self.headings, widths, strict=True):
            justify = "left" if heading in self.left else "right"
            table.add_column(heading, justify=justify, width=width, overflow="fold")
        for index, (row, style) in enumerate(zip(self.rows, self.styles, strict=True)):
            table.add_row(*row, style=style, end_section=index in self.sections)
        return table

    def _listed(self, width: int) -> Iterator[RenderableType]:
        """Yields the figures of each row one below the other, their headings before them."""
        yield self.title if isinstance(self.title, Text) else Text(self.title, "table.title")
        indent = max(map(cell_len, self.headings)) + 2
        for row, style in zip(self.rows, self.styles, strict=True):
            yield Text("")
            for heading, cell in zip(self.headings, row, strict=True):
                if not cell:
                    continue
                start = heading.ljust(indent) if heading else ""
                if "\n" not in cell and cell_len(start + cell) <= width:
                    yield Text(start + cell, style or "")
                    continue
                yield Text(heading, style or "")
                yield Padding(Text(cell, style or "", overflow="fold"), (0, 0, 0, 4))
        yield Text("")
        if self.caption:
            yield Text(self.caption, "table.caption")
