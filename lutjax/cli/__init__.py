"""The command line: `lutjax`, or `python -m lutjax.cli`."""

from lutjax.cli.main import main

__all__ = ["main"]
