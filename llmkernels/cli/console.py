"""The terminal that all commands print to."""

import sys

from rich.console import Console


def make_console() -> Console:
    """Tables as wide as the terminal; in a file or a pipe, wide enough that nothing is folded."""
    return Console(width=None if sys.stdout.isatty() else 160)
