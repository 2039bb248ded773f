"""layerskip report: one self-contained HTML page of a run."""

import argparse

from layerskip_jax.report.page import write_report


def main(argv: list[str]) -> int:
    """Runs the verb and returns its exit code."""
    parser = argparse.ArgumentParser(prog="layerskip report", description=__doc__)
    parser.add_argument("--workdir", required=True, help="folder of the run")
    parser.add_argument("--output", help="the page to write (default: report.html in the folder)")
    options = parser.parse_args(argv)
    path = write_report(options.workdir, options.output)
    print(f"{path}  {path.stat().st_size / 1e6:.2f} MB")
    return 0
