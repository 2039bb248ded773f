"""The pieces of HTML that a report is made of; everything given to them is escaped."""

import html
import re
from collections.abc import Callable, Sequence

from layerskip_jax.report.drawing import inline_svg
from layerskip_jax.report.run_record import MissingPiece, RunRecord


def escape(text: str) -> str:
    """Escapes plain text; what stands between backticks becomes `<code>`."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(text))


def paragraph(text: str, kind: str = "") -> str:
    """Returns a paragraph, of CSS class `kind` if given."""
    attribute = f' class="{kind}"' if kind else ""
    return f"<p{attribute}>{escape(text)}</p>"


def figures(run: RunRecord, named: Sequence[tuple[str, Callable]], *beside: str) -> str:
    """Returns a grid of figures; a note stands for each that the run cannot fill.

    Args:
      run: the run.
      named: the name and the drawing function of each figure.
      beside: finished HTML that takes the cells after the figures.
    """
    cells, notes = [], []
    for name, draw in named:
        try:
            cells.append(figure(name, draw(run)))
        except MissingPiece as missing:
            note = paragraph(str(missing), "note")
            if note not in notes:
                notes.append(note)
    cells += [part for part in beside if part]
    grid = '<div class="grid">\n' + "\n".join(cells) + "\n</div>" if cells else ""
    return "\n".join([*notes, grid])


def figure(name: str, drawing) -> str:
    """Returns a `<figure>` with its title, picture and definitions."""
    return (
        f'<figure id="figure-{name}">\n<h3>{escape(drawing.title)}</h3>\n'
        f"{inline_svg(drawing, name)}\n"
        f"<figcaption>{paragraph(drawing.caption)}</figcaption>\n</figure>"
    )


def table(
    title: str,
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    note: str = "",
    marked: Sequence[int] = (),
    text_columns: Sequence[int] = (),
    kind: str = "best",
) -> str:
    """Returns a table that scrolls inside its own box.

    Args:
      title: heading above it, or "".
      headings: the columns' headings.
      rows: cells as text; the first cell heads its row.
      note: definitions, printed under it.
      marked: indices of rows to set off, with the CSS class `kind`.
      text_columns: indices of columns that hold words, not numbers.
      kind: the kind of row, as in `marked`.
    """

    def cell(tag: str, column: int, text: str, scope: str = "") -> str:
        align = "" if column in text_columns else ' class="number"'
        return f"<{tag}{scope}{align}>{escape(text)}</{tag}>"

    head = "".join(cell("th", i, h, ' scope="col"') for i, h in enumerate(headings))
    body = []
    for index, row in enumerate(rows):
        first = cell("th", 0, row[0], ' scope="row"')
        rest = "".join(cell("td", i, text) for i, text in enumerate(row[1:], start=1))
        mark = f' class="{kind}"' if index in marked else ""
        body.append(f"<tr{mark}>{first}{rest}</tr>")
    heading = f"<h3>{escape(title)}</h3>\n" if title else ""
    label = html.escape(title or headings[0])
    # Focusable, so that a keyboard can scroll it too.
    return (
        f'<div class="table">{heading}<div class="scroll" tabindex="0" role="region" '
        f'aria-label="{label}">\n<table><thead><tr>{head}</tr></thead>\n<tbody>\n'
        + "\n".join(body)
        + f"\n</tbody></table></div>\n{paragraph(note, 'muted') if note else ''}</div>"
    )


def tiles(entries: Sequence[tuple[str, str, str]]) -> str:
    """Returns headline numbers: name, value and definition of each."""
    cells = [
        f'<div><dt>{escape(name)}</dt><dd class="value">{escape(value)}</dd>'
        f'<dd class="what">{escape(what)}</dd></div>'
        for name, value, what in entries
    ]
    return '<dl class="tiles">\n' + "\n".join(cells) + "\n</dl>"
