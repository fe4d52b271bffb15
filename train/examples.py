"""Texts and conversations as tokens, of which some are learnt, packed into rows of one length."""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lutjax.io import Tokenizer

_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


class Example(NamedTuple):
    """A tokenised text.

    Attributes:
      tokens: `int32[n]`.
      learnt: `bool[n]`, which of them the model learns to predict.
    """

    tokens: np.ndarray
    learnt: np.ndarray


def read_records(source: str) -> list[dict[str, Any]]:
    """Records of a local file, or of a dataset of the Hugging Face hub.

    Args:
      source: Path of a .json, .jsonl, .parquet or .csv file, of any other file as one plain text,
        or ``dataset:config:split`` on the hub.

    Returns:
      One dictionary a record; a plain text is ``{"text": …}``.

    Raises:
      FileNotFoundError: For a path that does not exist.
      ValueError: If there is no record.
    """
    path = Path(source)
    if path.is_file() and path.suffix not in _FORMATS:
        return [{"text": path.read_text(encoding="utf-8")}]
    from datasets import load_dataset  # an extra; slow to import

    if path.is_file():
        rows = load_dataset(_FORMATS[path.suffix], data_files=str(path), split="train")
    elif path.suffix in _FORMATS or path.suffix in (".txt", ".md") or source.startswith("."):
        raise FileNotFoundError(f"{source} does not exist")
    else:
        name, config, split = (*source.split(":"), "", "train")[:3]
        rows = load_dataset(name, config or None, split=split or "train")
    if not len(rows):
        raise ValueError(f"{source} has no records")
    return list(rows)


def encode_record(record: Mapping[str, Any], tokenizer: Tokenizer) -> Example:
    """Tokenises a record.

    * ``{"messages": [{"role", "content"}, …]}``: the chat template; the assistant's answers, with
      what ends them, are learnt.
    * ``{"prompt", "completion"}``: the completion is learnt.
    * ``{"text"}``: all of it is learnt.

    Texts and completions end with the tokenizer's end-of-text token.

    Raises:
      ValueError: If the record is of none of these kinds, or the template cannot be followed.
    """
    end = tokenizer.eos_token or ""
    if record.get("messages") is not None:
        return _encode_chat(record["messages"], tokenizer)
    if record.get("prompt") is not None and record.get("completion") is not None:
        prompt = record["prompt"]
        return _encode_spans(
            prompt + record["completion"] + end, [(len(prompt), None)], tokenizer, special=True
        )
    if record.get("text") is not None:
        return _encode_spans(record["text"] + end, [(0, None)], tokenizer, special=True)
    raise ValueError(
        f"a record has the fields {sorted(record)}; it needs 'messages', 'prompt' and "
        "'completion', or 'text'"
    )


def _encode_chat(messages: Sequence[Mapping[str, str]], tokenizer: Tokenizer) -> Example:
    rendered = tokenizer.render_chat(messages, add_generation_prompt=False)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = tokenizer.render_chat(messages[:i], add_generation_prompt=True)
        through = tokenizer.render_chat(messages[: i + 1], add_generation_prompt=False)
        if not (through.startswith(before) and rendered.startswith(through)):
            raise ValueError(
                f"the chat template writes message {i} differently when others follow, so that its "
                "answer cannot be told from the prompt; use 'prompt' and 'completion' instead"
            )
        spans.append((len(before), len(through)))
    return _encode_spans(rendered, spans, tokenizer, special=False)


def _encode_spans(
    text: str, spans: Sequence[tuple[int, int | None]], tokenizer: Tokenizer, *, special: bool
) -> Example:
    """Tokens, learnt where they begin within one of the spans of characters."""
    encoding = tokenizer.backend.encode(text, add_special_tokens=special)
    starts = np.asarray([start for start, _ in encoding.offsets], np.int64)
    learnt = np.zeros(len(starts), bool)
    for begin, end in spans:
        learnt |= (starts >= begin) & (starts < (len(text) if end is None else end))
    return Example(np.asarray(encoding.ids, np.int32), learnt)


@dataclasses.dataclass(frozen=True)
class Rows:
    """Examples packed into rows of T tokens.

    Attributes:
      tokens: `int32[R, T]`, 0 where there is no text.
      segments: `int32[R, T]`, the number of the text within its row from 1, 0 for none.
      learnt: `bool[R, T]`, tokens to predict from those before them in their text.
    """

    tokens: np.ndarray
    segments: np.ndarray
    learnt: np.ndarray

    def __len__(self) -> int:
        """The number of rows, R."""
        return len(self.tokens)

    def take(self, index: Any) -> Rows:
        """Some of the rows."""
        return Rows(self.tokens[index], self.segments[index], self.learnt[index])

    @property
    def fingerprint(self) -> str:
        """Hash of everything: a resumed run must have the same."""
        digest = hashlib.sha256()
        for array in (self.tokens, self.segments, self.learnt):
            digest.update(array.tobytes())
        return digest.hexdigest()[:16]

    def batch(self, seed: int, step: int, batch_size: int) -> Rows:
        """The rows of a step: every epoch in an order of its own, a function of the arguments."""
        index = np.arange(step * batch_size, (step + 1) * batch_size)
        epochs = index // len(self)
        order = {
            epoch: np.random.default_rng((seed, int(epoch))).permutation(len(self))
            for epoch in np.unique(epochs)
        }
        rows = [order[e][int(i) % len(self)] for i, e in zip(index, epochs, strict=True)]
        return self.take(np.asarray(rows))


def cut(examples: Iterable[Example], length: int) -> list[Example]:
    """Cuts examples into pieces of at most `length` tokens; those without a target are left out.

    >>> [len(e.tokens) for e in cut([Example(np.arange(5), np.ones(5, bool))], 2)]
    [2, 2]
    """
    pieces = []
    for tokens, learnt in examples:
        for start in range(0, len(tokens), length):
            piece = Example(tokens[start : start + length], learnt[start : start + length])
            if piece.learnt[1:].any():
                pieces.append(piece)
    return pieces


def pack(examples: Sequence[Example], length: int) -> Rows:
    """Packs examples into few rows: the longest first, each into the fullest row that has room.

    Args:
      examples: Of at most `length` tokens each; see :func:`cut`.
      length: Tokens of a row, T.

    Raises:
      ValueError: If there is no example, or one is too long.

    >>> pack([Example(np.array([7, 8]), np.array([True, True]))] * 3, 5).segments.tolist()
    [[1, 1, 2, 2, 0], [1, 1, 0, 0, 0]]
    """
    if not examples:
        raise ValueError("there is no example with a token to learn")
    rows: list[list[int]] = []
    room: dict[int, list[int]] = {}  # rows by their free tokens
    sizes: list[int] = []  # its keys, ascending
    longest_first = sorted(range(len(examples)), key=lambda i: -len(examples[i].tokens))
    for i in longest_first:
        size = len(examples[i].tokens)
        if size > length:
            raise ValueError(f"an example has {size} tokens, more than a row of {length}")
        place = bisect.bisect_left(sizes, size)
        if place < len(sizes):
            free = sizes[place]
            row = room[free].pop()
            if not room[free]:
                del room[free], sizes[place]
        else:
            free, row = length, len(rows)
            rows.append([])
        rows[row].append(i)
        left = free - size
        if left not in room:
            room[left] = []
            bisect.insort(sizes, left)
        room[left].append(row)
    packed = Rows(
        np.zeros((len(rows), length), np.int32),
        np.zeros((len(rows), length), np.int32),
        np.zeros((len(rows), length), bool),
    )
    for r, members in enumerate(rows):
        start = 0
        for number, i in enumerate(members, 1):
            span = slice(start, start + len(examples[i].tokens))
            packed.tokens[r, span] = examples[i].tokens
            packed.segments[r, span] = number
            packed.learnt[r, span] = examples[i].learnt
            packed.learnt[r, start] = False  # nothing comes before it
            start = span.stop
    return packed


def load_rows(
    source: str, tokenizer: Tokenizer, length: int, held_out: float = 0.0
) -> tuple[Rows, Rows | None]:
    """Reads, tokenises, cuts and packs; the last part of the examples may be held out.

    Args:
      source: See :func:`read_records`.
      tokenizer: Of the model.
      length: Tokens of a row.
      held_out: Share of the examples that are not for training.

    Returns:
      The rows for training, and those held out (None without).

    Raises:
      ValueError: If there is too little text.
    """
    pieces = cut((encode_record(record, tokenizer) for record in read_records(source)), length)
    count = len(pieces) - max(1, round(held_out * len(pieces))) if held_out else len(pieces)
    if count < 1:
        raise ValueError(
            f"{source} gives {len(pieces)} examples of at most {length} tokens with something to "
            "learn; use more text or shorter sequences"
        )
    return pack(pieces[:count], length), pack(pieces[count:], length) if held_out else None
