"""Progress bars."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def progress_bar(
    items: Iterable[T], what: str, unit: str, *, show: bool, total: int | None = None
) -> Iterable[T]:
    """The items, with a bar on standard error if it is to be shown (needs `tqdm`).

    >>> list(progress_bar([1, 2], "costs", "matrix", show=False))
    [1, 2]
    """
    if not show:
        return items
    from tqdm import tqdm

    return tqdm(items, desc=what, unit=unit, total=total)
