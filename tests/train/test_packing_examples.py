"""Reading, tokenising and packing of texts and conversations."""

from __future__ import annotations

import dataclasses
import json

import datasets
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from lutjax.io import Tokenizer
from train.examples import (
    NOTHING,
    Example,
    classes_of,
    cut,
    encode_labelled,
    encode_record,
    pack,
    read_records,
    split_rows,
)

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Bytes as tokens, and three special ones."""
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    vocab = {letter: i for i, letter in enumerate(sorted(byte_level.alphabet()))}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = byte_level(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<|end|>", "<|im_start|>", "<|im_end|>"])
    return Tokenizer(backend, eos_token="<|end|>", chat_template=CHATML)


def learnt_text(example: Example, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(
        example.targets[example.targets != NOTHING].tolist(), skip_special_tokens=False
    )


def _with_merge(tokenizer: Tokenizer, first: str, second: str) -> tokenizers.Tokenizer:
    """A copy of its backend in which two letters are a token."""
    data = json.loads(tokenizer.backend.to_str())
    data["model"]["vocab"][first + second] = 1000
    data["model"]["merges"] = [[first, second]]
    return tokenizers.Tokenizer.from_str(json.dumps(data))


def test_the_answers_of_a_chat_are_learnt(tokenizer):
    messages = [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "zwei — 2"},
        {"role": "user", "content": "sure?"},
        {"role": "assistant", "content": "yes"},
    ]
    example = encode_record({"messages": messages}, tokenizer)
    assert learnt_text(example, tokenizer) == "zwei — 2<|im_end|>\nyes<|im_end|>\n"
    whole = tokenizer.render_chat(messages, add_generation_prompt=False)
    assert tokenizer.decode(example.tokens.tolist(), skip_special_tokens=False) == whole


def test_completions_and_texts(tokenizer):
    record = {"prompt": "a b", "completion": " c"}
    assert learnt_text(encode_record(record, tokenizer), tokenizer) == " c<|end|>"
    joined = Tokenizer(_with_merge(tokenizer, "Ġ", "c"), eos_token="<|end|>", chat_template=CHATML)
    record = {"prompt": "a b ", "completion": "c"}  # its first token has the prompt's last space
    assert learnt_text(encode_record(record, joined), joined) == " c<|end|>"
    text = encode_record({"text": "a b"}, tokenizer)
    assert learnt_text(text, tokenizer) == " b<|end|>"  # nothing comes before its first token
    with pytest.raises(ValueError, match=r"fields \['body'\]"):
        encode_record({"body": "a"}, tokenizer)
    for bad, field in [({"text": 3}, "text"), ({"prompt": "a", "completion": [1]}, "completion")]:
        with pytest.raises(ValueError, match=f"the field '{field}' is .*, which is no text"):
            encode_record(bad, tokenizer)


def test_a_template_that_rewrites_the_past_is_refused(tokenizer):
    template = CHATML.replace("m.content", "(m.content if loop.last else '...')")
    changing = dataclasses.replace(tokenizer, chat_template=template)
    messages = [{"role": r, "content": "x"} for r in ("user", "assistant", "user")]
    with pytest.raises(ValueError, match="message 1 differently"):
        encode_record({"messages": messages}, changing)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(2, 12), min_size=1, max_size=30))
def test_packing_keeps_every_example_whole(sizes):
    examples = [
        Example(np.arange(n, dtype=np.int32) + 100 * i, np.where(np.arange(n) % 2, 7, NOTHING))
        for i, n in enumerate(sizes)
    ]
    rows = pack(examples, 12)
    found = {}
    for row in range(len(rows)):
        segments = rows.segments[row]
        assert (np.diff(np.flatnonzero(segments)) == 1).all()  # padding at the end only
        for number in range(1, segments.max() + 1):
            where = segments == number
            tokens, targets = rows.tokens[row][where], rows.targets[row][where]
            i = tokens[0] // 100
            np.testing.assert_array_equal(tokens, examples[i].tokens)
            np.testing.assert_array_equal(targets, examples[i].targets)
            found[i] = True
    assert len(found) == len(sizes)
    assert (rows.targets[rows.segments == 0] == NOTHING).all()
    # Any two rows together hold more than one row could.
    used = np.sort((rows.segments > 0).sum(axis=1))
    assert len(used) < 2 or used[0] + used[1] > 12


def test_cutting_drops_pieces_without_a_target():
    targets = np.array([NOTHING] * 4 + [5, 6, NOTHING, 8, NOTHING])
    pieces = cut([Example(np.arange(9), targets)], 4)
    assert [p.tokens.tolist() for p in pieces] == [[4, 5, 6, 7]]  # nothing comes after [8]
    assert pieces[0].targets.tolist() == [5, 6, NOTHING, 8]  # the last from the piece it ends


def test_every_epoch_has_all_rows_in_an_order_of_its_own():
    rows = pack([Example(np.full(4, i), np.full(4, i)) for i in range(6)], 4)
    seen = np.concatenate([rows.batch(0, step, 4).tokens[:, 0] for step in range(3)])
    first, second = seen[:6], seen[6:]
    assert sorted(first) == sorted(second) == list(range(6))
    assert list(first) != list(second)
    np.testing.assert_array_equal(rows.batch(0, 1, 4).tokens, rows.batch(0, 1, 4).tokens)
    assert rows.fingerprint != rows.take(slice(1, None)).fingerprint


def test_a_class_is_predicted_at_the_last_token(tokenizer):
    records = [{"a": "x", "b": "yes", "kind": "no"}, {"a": "zz", "b": "", "kind": "even"}]
    classes = classes_of(records, "kind")
    assert classes == ("even", "no")

    def encode(record, length=9):
        fields = ("a", "b")
        return encode_labelled(
            record, tokenizer, length, fields=fields, label="kind", classes=classes
        )

    example = encode(records[0])
    assert tokenizer.decode(example.tokens.tolist()) == "x\nyes"
    assert example.targets.tolist() == [NOTHING] * 4 + [1]
    assert encode(records[1], 2).targets.tolist() == [NOTHING, 0]
    for record, message in [
        ({"a": "x", "kind": "no"}, "no 'b'"),
        ({"a": "x", "b": "y"}, "no 'kind'"),
        ({"a": "x", "b": 3, "kind": "no"}, "the field 'b' is 3, which is no text"),
        ({"a": "x", "b": "y", "kind": "odd"}, r"the kind 'odd'; the training data has \['even'"),
    ]:
        with pytest.raises(ValueError, match=message):
            encode(record)
    with pytest.raises(ValueError, match="all records have the kind 'no'"):
        classes_of(records[:1], "kind")


def test_formats_and_the_hub(tmp_path, monkeypatch):
    """All formats give the same records; a hub name is what `load_dataset` makes of it."""
    records = [{"text": f"number {i}", "label": i % 2} for i in range(3)]
    dataset = datasets.Dataset.from_list(records)
    (tmp_path / "repository").mkdir()
    paths = {name: tmp_path / f"data.{name}" for name in ("json", "csv", "parquet")}
    paths["json"].write_text(json.dumps(records))
    dataset.to_csv(paths["csv"])
    dataset.to_parquet(paths["parquet"])
    dataset.to_parquet(tmp_path / "repository" / "train-0.parquet")
    dataset.select([0]).to_parquet(tmp_path / "repository" / "validation-0.parquet")
    for path in paths.values():
        assert read_records(str(path)) == records
    assert read_records(str(tmp_path / "repository")) == records
    assert read_records(f"{tmp_path / 'repository'}::validation") == records[:1]
    monkeypatch.chdir(tmp_path)
    assert read_records("./repository") == records
    assert read_records("./repository::validation") == records[:1]
    with pytest.raises(FileNotFoundError, match=r"\./missing does not exist"):
        read_records("./missing")


def test_files(tmp_path, tokenizer):
    records = [{"text": f"number {i}"} for i in range(20)]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    plain = tmp_path / "data.txt"
    plain.write_text("abc\n" * 30)
    assert read_records(str(plain)) == [{"text": "abc\n" * 30}]
    assert read_records(str(path)) == records
    rows, held_out = split_rows([encode_record(r, tokenizer) for r in records], 32, 0.1)
    assert held_out is not None
    assert sum(r.segments.max(axis=1).sum() for r in (rows, held_out)) == 20
    assert held_out.segments.max(axis=1).sum() == 2
    with pytest.raises(FileNotFoundError, match=r"missing.jsonl does not exist"):
        read_records(str(tmp_path / "missing.jsonl"))
    path.write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(ValueError, match=r"data.jsonl cannot be read; mend the file: .* in row 1"):
        read_records(str(path))
    path.write_text("")
    with pytest.raises(ValueError, match=r"data.jsonl has no records"):
        read_records(str(path))
    empty = encode_record({"text": ""}, dataclasses.replace(tokenizer, eos_token=None))
    with pytest.raises(ValueError, match=r"empty\.txt gives 0 examples"):
        split_rows(cut([empty], 8), 8, source="empty.txt")
