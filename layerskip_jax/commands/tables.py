"""The one way in which the verbs print tables."""

from collections.abc import Collection, Iterable, Sequence

from rich.table import Table


def make_table(
    title: str,
    headings: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    left: Collection[str] = ("",),
    styles: Sequence[str | None] = (),
    sections: Collection[int] = (),
    caption: str | None = None,
) -> Table:
    """Returns a table of figures for `Console.print`.

    Args:
      title: what it shows, above it.
      headings: one for each column.
      rows: their cells, already in words.
      left: headings of the columns of text; figures stand to the right.
      styles: of the rows, as rich has them; rows without one look plain.
      sections: rows that a line follows.
      caption: what explains it, below it.
    """
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    for heading in headings:
        table.add_column(heading, justify="left" if heading in left else "right")
    for index, row in enumerate(rows):
        style = styles[index] if index < len(styles) else None
        table.add_row(*row, style=style, end_section=index in sections)
    return table
