"""The data of a finetuning run."""

from __future__ import annotations

import dataclasses
from typing import Any

from train.base_model import Start
from train.examples import (
    Example,
    Rows,
    classes_of,
    cut,
    encode_labelled,
    encode_record,
    read_records,
    split_rows,
)
from train.finetune_config import FinetuneConfig


@dataclasses.dataclass(frozen=True)
class Data:
    """Packed rows for training and evaluation.

    Attributes:
      rows: To learn from.
      held_out: To evaluate on, or None.
      classes: Labels of a classifier, by target; empty for a language model.
    """

    rows: Rows
    held_out: Rows | None
    classes: tuple[Any, ...]


def load_data(config: FinetuneConfig, start: Start) -> Data:
    """Reads, tokenises and packs what the configuration names.

    Raises:
      FileNotFoundError: For a file that does not exist.
      ValueError: For data without anything to learn, or that does not fit the task or the model.
    """
    tokenizer, length = start.tokenizer, config.sequence_length
    longest = start.model.config.max_position_embeddings
    if length > longest:
        raise ValueError(
            f"sequence_length={length} is beyond the model's {longest} positions; shorten it"
        )
    records = read_records(config.data)
    classes: tuple[Any, ...] = ()
    if config.task == "classification":
        classes = classes_of(records, config.label_field)

    def encode_one(record: dict[str, Any]) -> Example:
        if config.task == "language":
            return encode_record(record, tokenizer)
        fields, label = config.text_fields, config.label_field
        return encode_labelled(
            record, tokenizer, length, fields=fields, label=label, classes=classes
        )

    def encode(records: list[dict[str, Any]], source: str) -> list[Example]:
        examples = []
        for number, record in enumerate(records, 1):
            try:
                examples.append(encode_one(record))
            except ValueError as error:
                raise ValueError(f"{source}, record {number}: {error}") from error
        return cut(examples, length) if config.task == "language" else examples

    examples = encode(records, config.data)
    if config.eval_data is None:
        fraction = config.eval_fraction
        rows, held_out = split_rows(examples, length, fraction, source=config.data)
    else:
        rows, _ = split_rows(examples, length, source=config.data)
        others = encode(read_records(config.eval_data), config.eval_data)
        held_out, _ = split_rows(others, length, source=config.eval_data)
    return Data(rows, held_out, classes)
