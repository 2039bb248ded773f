"""layerskip report: one self-contained HTML page of a run, or a single figure of it."""

import webbrowser

from layerskip_jax.commands.arguments import make_parser
from layerskip_jax.report.page import FIGURES, save_figure, write_report
from layerskip_jax.run_folder.object_store import require_local


def main(argv: list[str]) -> int:
    """Runs the verb and returns its exit code."""
    parser = make_parser("report", __doc__)
    parser.add_argument("--workdir", required=True, help="folder of the run")
    parser.add_argument("--output", help="the page to write (default: report.html in the folder)")
    parser.add_argument(
        "--figure",
        choices=FIGURES,
        metavar="NAME",
        help=f"write only this figure to --output=FILE.svg or .png: {', '.join(FIGURES)}",
    )
    parser.add_argument("--open", action="store_true", help="show it in the browser")
    options = parser.parse_args(argv)
    if options.open:
        require_local(options.output or options.workdir, "what a browser opens")
    if options.figure is None:
        path = write_report(options.workdir, options.output)
    else:
        path = save_figure(
            options.workdir, options.figure, options.output or f"{options.figure}.svg"
        )
    print(f"{path}  {len(path.read_bytes()) / 1e6:.2f} MB")
    if options.open:
        address = path.resolve().as_uri()
        if not webbrowser.open(address):
            print(f"no browser was found here; open {address} in one")
    return 0
