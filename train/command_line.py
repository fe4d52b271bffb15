"""How the training programs end."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any


def exit_code(program: str, run: Callable[[], Any]) -> int:
    """Runs a program.

    Bad input and losses that are not finite are one line and exit code 2, an interrupt exit code
    130.
    """
    try:
        run()
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError) as error:
        print(f"{program}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0
