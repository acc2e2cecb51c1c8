"""What a run looks like to a reader: the HTML page, the curves, the before/after table."""

from pathlib import Path


def write_report(run_dir: Path) -> Path:
    """`solotune.report.page.write_report`; matplotlib and jinja2 are imported when it is called."""
    from solotune.report.page import write_report as write

    return write(run_dir)


__all__ = ["write_report"]
