"""Records as tokens and what to predict from them, packed into rows of one length."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lutjax.files import read_utf8
from lutjax.io import Tokenizer

_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


NOTHING = -1
"""The target of a token that nothing is predicted from."""


class Example(NamedTuple):
    """A tokenised text.

    Attributes:
      tokens: `int32[n]`.
      targets: `int32[n]`, what the model learns to predict at each token: the next one, the class
        of the text, or `NOTHING`.
    """

    tokens: np.ndarray
    targets: np.ndarray


def read_records(source: str) -> list[dict[str, Any]]:
    """Records of a local file, or of a dataset of the Hugging Face hub.

    Args:
      source: Path of a .json, .jsonl, .parquet or .csv file, of any other file as one plain text,
        or ``dataset:config:split`` on the hub, or with a local directory in the dataset's place.

    Returns:
      One dictionary a record; a plain text is ``{"text": …}``.

    Raises:
      FileNotFoundError: For a path that does not exist.
      ValueError: If there is no record, or a file is not of its format.
    """
    path = Path(source)
    name, config, split = (*source.split(":"), "", "train")[:3]
    if path.is_file() and path.suffix not in _FORMATS:
        return [{"text": read_utf8(source)}]
    is_local = path.suffix in (*_FORMATS, ".txt", ".md") or source.startswith(".")
    if is_local and not path.is_file() and not Path(name).is_dir():
        raise FileNotFoundError(f"{source} does not exist")
    from datasets import load_dataset  # an extra; slow to import
    from datasets.exceptions import DatasetGenerationError

    try:
        if path.is_file():
            rows = load_dataset(_FORMATS[path.suffix], data_files=str(path), split="train")
        else:
            rows = load_dataset(name, config or None, split=split or "train")
    except DatasetGenerationError as error:
        reason = error.__cause__ or error
        raise ValueError(f"{source} cannot be read; mend the file: {reason}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is not UTF-8 text: {error}") from error
    except StopIteration:  # what datasets makes of an empty file
        rows = []
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
      ValueError: If the record is of none of these kinds, one of its texts is no string, or the
        template cannot be followed.
    """
    end = tokenizer.eos_token or ""
    if record.get("messages") is not None:
        return _encode_chat(record["messages"], tokenizer)
    if record.get("prompt") is not None and record.get("completion") is not None:
        prompt, completion = _text(record, "prompt"), _text(record, "completion")
        return _encode_spans(
            prompt + completion + end, [(len(prompt), None)], tokenizer, special=True
        )
    if record.get("text") is not None:
        return _encode_spans(_text(record, "text") + end, [(0, None)], tokenizer, special=True)
    fields = sorted(name for name, value in record.items() if value is not None)
    raise ValueError(
        f"a record has the fields {fields} (others are null); it needs 'messages', 'prompt' and "
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
    """Tokens, learnt where they have a character of one of the spans."""
    encoding = tokenizer.backend.encode(text, add_special_tokens=special)
    tokens = np.asarray(encoding.ids, np.int32)
    starts, ends = np.asarray(encoding.offsets, np.int64).reshape(-1, 2).T
    learnt = np.zeros(len(starts), bool)
    for begin, end in spans:
        # A token may join the space before a span with its first word.
        reaches = np.maximum(starts, ends - 1) >= begin
        learnt |= reaches & (starts < (len(text) if end is None else end))
    following = np.append(np.where(learnt, tokens, NOTHING)[1:], NOTHING)
    return Example(tokens, following.astype(np.int32))


def classes_of(records: Iterable[Mapping[str, Any]], field: str) -> tuple[Any, ...]:
    """The different labels, in order.

    Raises:
      ValueError: If a record has none, they are no numbers or names, or there are fewer than two.

    >>> classes_of([{"label": 1}, {"label": 0}, {"label": 1}], "label")
    (0, 1)
    """
    labels = {_label(record, field) for record in records}
    if len({isinstance(label, str) for label in labels}) > 1:
        raise ValueError(f"the field {field!r} has names and numbers: {sorted(map(repr, labels))}")
    if len(labels) < 2:
        raise ValueError(f"all records have the {field} {labels.pop()!r}; two are needed at least")
    return tuple(sorted(labels))


def encode_labelled(
    record: Mapping[str, Any],
    tokenizer: Tokenizer,
    length: int,
    *,
    fields: Sequence[str],
    label: str,
    classes: Sequence[Any],
) -> Example:
    """Tokenises a record whose class is predicted at its last token.

    Args:
      record: Has the fields.
      tokenizer: Of the model.
      length: Tokens to keep, from the first.
      fields: Texts, joined by a line break.
      label: The field of the class.
      classes: Those that there are.

    Raises:
      ValueError: If a field is missing, a text is no string or has no token, or the class is
        unknown.
    """
    text = "\n".join(_text(record, field) for field in fields)
    kind = _label(record, label)
    tokens = np.asarray(tokenizer.backend.encode(text).ids[:length], np.int32)
    if not len(tokens):
        raise ValueError(f"a record's {', '.join(fields)} has no token to predict {label!r} from")
    if kind not in classes:
        raise ValueError(
            f"a record has the {label} {kind!r}; the training data has {list(classes)}"
        )
    targets = np.full(len(tokens), NOTHING, np.int32)
    targets[-1] = classes.index(kind)
    return Example(tokens, targets)


def _field(record: Mapping[str, Any], field: str) -> Any:
    if record.get(field) is None:
        raise ValueError(f"a record has the fields {sorted(record)}, and no {field!r}")
    return record[field]


def _label(record: Mapping[str, Any], field: str) -> float | str:
    label = _field(record, field)
    if not isinstance(label, (int, float, str)):
        raise ValueError(f"the field {field!r} is {label!r:.80}; a class is a number or a name")
    return label


def _text(record: Mapping[str, Any], field: str) -> str:
    text = _field(record, field)
    if not isinstance(text, str):
        raise ValueError(f"the field {field!r} is {text!r:.80}, which is no text; make it a string")
    return text


@dataclasses.dataclass(frozen=True)
class Rows:
    """Examples packed into rows of T tokens.

    Attributes:
      tokens: `int32[R, T]`, 0 where there is no text.
      segments: `int32[R, T]`, the number of the text within its row from 1, 0 for none.
      targets: `int32[R, T]`, what to predict at each token, or `NOTHING`.
    """

    tokens: np.ndarray
    segments: np.ndarray
    targets: np.ndarray

    def __len__(self) -> int:
        """The number of rows, R."""
        return len(self.tokens)

    def take(self, index: Any) -> Rows:
        """Some of the rows."""
        return Rows(self.tokens[index], self.segments[index], self.targets[index])

    @property
    def fingerprint(self) -> str:
        """Hash of everything: a resumed run must have the same."""
        digest = hashlib.sha256()
        for array in (self.tokens, self.segments, self.targets):
            digest.update(array.tobytes())
        return digest.hexdigest()[:16]

    def batch(self, seed: int, step: int, batch_size: int) -> Rows:
        """The rows of a step: every epoch in an order of its own, a function of the arguments."""
        index = np.arange(step * batch_size, (step + 1) * batch_size)
        count = len(self)
        rows = [_order(seed, int(i) // count, count)[int(i) % count] for i in index]
        return self.take(np.asarray(rows))


@functools.lru_cache(maxsize=2)  # a step has rows of one epoch, or of two
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order of the rows in an epoch."""
    return np.random.default_rng((seed, epoch)).permutation(count)


def cut(examples: Iterable[Example], length: int) -> list[Example]:
    """Cuts examples into pieces of at most `length` tokens; those without a target are left out.

    >>> [len(e.tokens) for e in cut([Example(np.arange(5), np.array([1, 2, 3, 4, -1]))], 2)]
    [2, 2]
    """
    pieces = []
    for tokens, targets in examples:
        for start in range(0, len(tokens), length):
            piece = Example(tokens[start : start + length], targets[start : start + length])
            if (piece.targets != NOTHING).any():
                pieces.append(piece)
    return pieces


def pack(examples: Sequence[Example], length: int) -> Rows:
    """Packs examples into few rows: the longest first, each into the fullest row that has room.

    Args:
      examples: Of at most `length` tokens each; see :func:`cut`.
      length: Tokens of a row, T.

    Raises:
      ValueError: If there is no example, or one is too long.

    >>> pack([Example(np.array([7, 8]), np.array([8, -1]))] * 3, 5).segments.tolist()
    [[1, 1, 2, 2, 0], [1, 1, 0, 0, 0]]
    """
    if not examples:
        raise ValueError("there is no example with something to learn")
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
        np.full((len(rows), length), NOTHING, np.int32),
    )
    for r, members in enumerate(rows):
        start = 0
        for number, i in enumerate(members, 1):
            span = slice(start, start + len(examples[i].tokens))
            packed.tokens[r, span] = examples[i].tokens
            packed.segments[r, span] = number
            packed.targets[r, span] = examples[i].targets
            start = span.stop
    return packed


def split_rows(
    examples: Sequence[Example], length: int, held_out: float = 0.0, *, source: str = "the data"
) -> tuple[Rows, Rows | None]:
    """Packs examples; the last part of them may be held out.

    Args:
      examples: Of at most `length` tokens each.
      length: Tokens of a row.
      held_out: Share of the examples that are not for training.
      source: What errors call them.

    Returns:
      The rows for training, and those held out (None without).

    Raises:
      ValueError: If there are too few examples.
    """
    count = len(examples) - max(1, round(held_out * len(examples))) if held_out else len(examples)
    if count < 1:
        raise ValueError(
            f"{source} gives {len(examples)} examples of at most {length} tokens with something to "
            "learn; use more text or shorter sequences"
        )
    return pack(examples[:count], length), pack(examples[count:], length) if held_out else None
