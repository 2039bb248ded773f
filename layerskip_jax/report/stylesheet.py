"""The page's CSS; in Python, so that no package can be built without it."""

CSS = """
:root { --ink: #1b1b1f; --muted: #55555e; --line: #d9d9e0; --soft: #f5f5f8; --blue: #00588a; }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0 auto; padding: 1.5rem 1.25rem 3rem; max-width: 72rem; background: #fff;
  color: var(--ink); line-height: 1.5; font-size: 1rem; overflow-wrap: anywhere;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 {
  font-size: 1.25rem; margin: 2.6rem 0 .6rem; padding-top: .9rem;
  border-top: 1px solid var(--line);
}
p { margin: .5rem 0; max-width: 46rem; }
a { color: var(--blue); }
nav { margin: .9rem 0 0; font-size: .95rem; line-height: 1.9; }
nav a { display: inline-block; margin-right: 1rem; }
p code, dd code { display: inline-block; max-width: 100%; }
code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: .92em; }
.lead { font-size: 1.1rem; }
.muted, figcaption p { color: var(--muted); }
.grid + .table { margin-top: 1.6rem; }
.table > p { font-size: .9rem; }
.note { background: var(--soft); border-left: 4px solid var(--blue); padding: .6rem .9rem; }
.tiles {
  display: grid; gap: .8rem; margin: 1.2rem 0 0; padding: 0;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr));
}
.tiles div { border: 1px solid var(--line); border-radius: .4rem; padding: .7rem .9rem; }
.tiles dt { font-size: .95rem; font-weight: 600; }
.tiles dd { margin: 0; }
.tiles .value { font-size: 1.55rem; font-weight: 650; line-height: 1.25; color: var(--blue); }
.tiles .what { font-size: .9rem; color: var(--muted); }
.grid {
  display: grid; gap: 1.6rem 2rem; margin-top: 1rem; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 27rem), 1fr));
}
.grid > * { min-width: 0; }
figure { margin: 0; max-width: 36rem; }
figure h3, .table h3 { font-size: 1.05rem; margin: 0 0 .35rem; }
figure svg { display: block; width: 100%; height: auto; }
/* matplotlib names its own font on every text; the page's is what the reader's device has. */
figure svg text { font-family: inherit !important; }
figcaption p { font-size: .9rem; margin: .3rem 0 0; }
.scroll { overflow-x: auto; overflow-wrap: normal; }
table { border-collapse: collapse; font-size: .95rem; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .8rem .28rem 0; border-bottom: 1px solid var(--line); }
th { text-align: left; vertical-align: bottom; font-weight: 600; }
.number { text-align: right; }
tbody th { font-weight: 400; }
tr.changed > *, tr.best > * { font-weight: 700; }
tr.best { background: var(--soft); }
details { margin-top: .8rem; }
summary { cursor: pointer; padding: .4rem 0; font-weight: 600; }
footer { margin-top: 3rem; color: var(--muted); font-size: .9rem; }
@media (max-width: 30rem) {
  body { padding: 1rem .8rem 2rem; }
  th, td { padding-right: .6rem; }
}
@media print {
  @page { size: A4; margin: 14mm 13mm; }
  html { font-size: 10.5pt; }
  body { max-width: none; padding: 0; }
  nav { display: none; }
  a { color: inherit; text-decoration: none; }
  .grid { grid-template-columns: 1fr 1fr; gap: 1.1rem 1.4rem; }
  .tiles { grid-template-columns: repeat(3, 1fr); }
  section, figure, .tiles div, .note, tr { break-inside: avoid; }
  p { orphans: 3; widows: 3; }
  h1, h2, h3, summary { break-after: avoid; }
  h2 { margin-top: 1.6rem; }
  thead { display: table-header-group; }
  section > p { break-after: avoid; }
  .scroll { overflow: visible; }
  table { font-size: .85rem; }
  th, td { padding-top: .18rem; padding-bottom: .18rem; }
  details table { font-size: .78rem; line-height: 1.25; }
  .tiles div, .note, tr.best { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  details::details-content { content-visibility: visible; display: block; height: auto; }
}
"""
