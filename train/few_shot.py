"""Tasks as conversations: what to learn from a task's own demonstrations, and what to ask."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lutjax.io import Tokenizer
from train.examples import NOTHING, Example, encode_record
from train.tasks import Pair, Task, Value, to_text
from train.transformations import SYMMETRIES, Transformation, recolouring

_PLAIN_CHAT = """{{ bos_token }}{% for message in messages %}{% if message.role == "user" %}Input:
{{ message.content }}
Output:
{% else %}{{ message.content }}{{ eos_token }}

{% endif %}{% endfor %}"""
"""For models without a chat template, in which inputs and outputs just follow each other."""


class Format(NamedTuple):
    """How a model is shown a task.

    Attributes:
      tokenizer: With a chat template.
      separator: Between the cells of a grid's row, so that each cell is a token.
      ends: Tokens that end an answer.
    """

    tokenizer: Tokenizer
    separator: str
    ends: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Format:
        """The format for a model: turns of its chat, or inputs and outputs one after the other.

        The latter is for models without a chat template, and for templates that write an answer
        differently when others follow, or do not end it with a token of its own.

        Raises:
          ValueError: If no token ends a text either.
        """
        digits = tokenizer.encode("0123456789", add_special_tokens=False)
        separator = "" if len(digits) == 10 else " "
        for template in (tokenizer.chat_template, _PLAIN_CHAT):
            chat = dataclasses.replace(tokenizer, chat_template=template)
            end = _end_of_answers(chat)
            if end is not None:
                return cls(chat, separator, (end, *tokenizer.eos_ids))
        raise ValueError(
            "the tokenizer has neither a chat template that can be used nor an end-of-text token, "
            "so answers have no end; add an eos_token to tokenizer_config.json"
        )

    def text(self, value: Value) -> str:
        """A value as the model reads it."""
        return to_text(value, self.separator)

    def length(self, value: Value) -> int:
        """Tokens of a value."""
        return len(self.tokenizer.encode(self.text(value), add_special_tokens=False))

    def example(self, pairs: Sequence[Pair]) -> Example:
        """Pairs one after the other; every output but the first is learnt.

        The last output is learnt from all other pairs, which is what leaving it out means, and
        those before from the pairs before them. The first one cannot be told from anything.
        """
        tokens, targets = encode_record({"messages": self._turns(pairs)}, self.tokenizer)
        learnt = targets != NOTHING
        begin = int(np.argmax(learnt))
        first = begin + int(np.argmin(np.append(learnt[begin:], False)))
        return Example(tokens, np.where(np.arange(len(targets)) < first, NOTHING, targets))

    def prompt(self, pairs: Sequence[Pair], query: Value) -> list[int]:
        """The tokens that an answer to the query follows."""
        messages = [*self._turns(pairs), {"role": "user", "content": self.text(query)}]
        return self.tokenizer.encode(self.tokenizer.render_chat(messages), add_special_tokens=False)

    def _turns(self, pairs: Sequence[Pair]) -> list[dict[str, str]]:
        return _turns([(self.text(pair.input), self.text(pair.output)) for pair in pairs])


def _turns(pairs: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    turns = []
    for text, answer in pairs:
        turns.append({"role": "user", "content": text})
        turns.append({"role": "assistant", "content": answer})
    return turns


def _end_of_answers(tokenizer: Tokenizer) -> int | None:
    """The token that ends an answer; None if the chat template cannot be used."""
    if tokenizer.chat_template is None:
        return None
    turns = _turns([("a", "b"), ("c", "d")])
    try:
        encode_record({"messages": turns}, tokenizer)
        before = tokenizer.render_chat(turns[:1])
        through = tokenizer.render_chat(turns[:2], add_generation_prompt=False)
    except ValueError:  # the template refuses a turn, or changes it later
        return None
    end = through.removeprefix(before + "b")
    ids = tokenizer.encode(end, add_special_tokens=False)
    if end == through or not ids:
        return None
    # What is blank is no end: a line break stands between the rows of a grid, too.
    return ids[0] if tokenizer.decode(ids[:1], skip_special_tokens=False).strip() else None


class Question(NamedTuple):
    """One way to ask a query.

    Attributes:
      query: Its number.
      transformation: Undo it on the answer.
      prompt: Tokens.
    """

    query: int
    transformation: Transformation
    prompt: list[int]


def variant(task: Task, rng: np.random.Generator) -> tuple[Pair, ...]:
    """The demonstrations in a random order; grids turned, mirrored and recoloured at random."""
    if task.has_grids:
        task = recolouring(rng).task(SYMMETRIES[rng.integers(len(SYMMETRIES))].task(task))
    return tuple(task.demonstrations[i] for i in rng.permutation(len(task.demonstrations)))


def longest_variant(task: Task, format: Format) -> int:
    """Tokens of the longest :func:`variant`, which is that in one of a grid's eight positions."""
    positions = SYMMETRIES if task.has_grids else SYMMETRIES[:1]
    texts = (format.example(turned.task(task).demonstrations) for turned in positions)
    return max(len(text.tokens) for text in texts)


def questions(
    task: Task, format: Format, rng: np.random.Generator, *, orders: int, symmetries: bool
) -> list[Question]:
    """Every query under every symmetry of a grid and in several orders of the demonstrations.

    The first order is the one given; text has no symmetry but the identity.
    """
    transformations = SYMMETRIES if symmetries and task.has_grids else SYMMETRIES[:1]
    count = len(task.demonstrations)
    ranks = {tuple(range(count)): None}  # distinct ones, in order
    while len(ranks) < min(orders, math.factorial(count)):
        ranks[tuple(rng.permutation(count).tolist())] = None
    asked = []
    for transformation in transformations:
        changed = transformation.task(task)
        for number, query in enumerate(changed.queries):
            for order in ranks:
                pairs = [changed.demonstrations[i] for i in order]
                prompt = format.prompt(pairs, query.input)
                asked.append(Question(number, transformation, prompt))
    return asked
