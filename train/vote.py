"""Which of many answers to one question to believe."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from train.tasks import Value

FINALISTS = 3
"""Answers that each transformation may put forward."""


def vote(candidates: Iterable[tuple[str, Value]]) -> list[Value]:
    """Ranks answers by a vote in two rounds.

    Each transformation puts forward its three most frequent answers, with one voice for each. Ties
    are decided by how often an answer was given at all, and then by who gave it first. (Where a
    transformation has fewer than three, the paper adds the most frequent rows and columns; of two
    answers, those are the more frequent answer's.)

    Args:
      candidates: (name of the transformation, answer with the transformation undone), the most
        trusted transformation first.

    Returns:
      The answers, the best first.

    Source: test-time training (arXiv 2411.07279, hierarchical voting).

    >>> vote([("identity", "a"), ("identity", "b"), ("flip", "b"), ("turn", "c")])
    ['b', 'a', 'c']
    """
    candidates = list(candidates)
    by_name: dict[str, Counter[Value]] = {}
    for name, value in candidates:
        by_name.setdefault(name, Counter())[value] += 1
    voices = Counter(
        value for counts in by_name.values() for value, _ in counts.most_common(FINALISTS)
    )
    given = Counter(value for _, value in candidates)
    return sorted(voices, key=lambda value: (-voices[value], -given[value]))
