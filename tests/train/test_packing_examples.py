"""Reading, tokenising and packing of texts and conversations."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from lutjax.io import Tokenizer
from train.examples import Example, cut, encode_record, load_rows, pack, read_records

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
    return tokenizer.decode(example.tokens[example.learnt].tolist(), skip_special_tokens=False)


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
    assert learnt_text(encode_record({"text": "a b"}, tokenizer), tokenizer) == "a b<|end|>"
    with pytest.raises(ValueError, match=r"fields \['body'\]"):
        encode_record({"body": "a"}, tokenizer)


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
        Example(np.arange(n, dtype=np.int32) + 100 * i, np.arange(n) % 2 == 0)
        for i, n in enumerate(sizes)
    ]
    rows = pack(examples, 12)
    found = {}
    for row in range(len(rows)):
        segments = rows.segments[row]
        assert (np.diff(np.flatnonzero(segments)) == 1).all()  # padding at the end only
        for number in range(1, segments.max() + 1):
            where = segments == number
            tokens, learnt = rows.tokens[row][where], rows.learnt[row][where]
            i = tokens[0] // 100
            np.testing.assert_array_equal(tokens, examples[i].tokens)
            assert not learnt[0]
            np.testing.assert_array_equal(learnt[1:], examples[i].learnt[1:])
            found[i] = True
    assert len(found) == len(sizes)
    assert not rows.learnt[rows.segments == 0].any()
    # Any two rows together hold more than one row could.
    used = np.sort((rows.segments > 0).sum(axis=1))
    assert len(used) < 2 or used[0] + used[1] > 12


def test_cutting_drops_pieces_without_a_target():
    learnt = np.array([False] * 4 + [True, True, True, False, True])
    pieces = cut([Example(np.arange(9), learnt)], 4)
    assert [p.tokens.tolist() for p in pieces] == [[4, 5, 6, 7]]  # [8] has nothing before it


def test_every_epoch_has_all_rows_in_an_order_of_its_own():
    rows = pack([Example(np.full(4, i), np.ones(4, bool)) for i in range(6)], 4)
    seen = np.concatenate([rows.batch(0, step, 4).tokens[:, 0] for step in range(3)])
    first, second = seen[:6], seen[6:]
    assert sorted(first) == sorted(second) == list(range(6))
    assert list(first) != list(second)
    np.testing.assert_array_equal(rows.batch(0, 1, 4).tokens, rows.batch(0, 1, 4).tokens)
    assert rows.fingerprint != rows.take(slice(1, None)).fingerprint


def test_files(tmp_path, tokenizer):
    records = [{"text": f"number {i}"} for i in range(20)]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    plain = tmp_path / "data.txt"
    plain.write_text("abc\n" * 30)
    assert read_records(str(plain)) == [{"text": "abc\n" * 30}]
    assert read_records(str(path)) == records
    rows, held_out = load_rows(str(path), tokenizer, 32, 0.1)
    assert held_out is not None
    assert sum(r.segments.max(axis=1).sum() for r in (rows, held_out)) == 20
    assert held_out.segments.max(axis=1).sum() == 2
    with pytest.raises(FileNotFoundError, match=r"missing.jsonl does not exist"):
        read_records(str(tmp_path / "missing.jsonl"))
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match="gives 0 examples"):
        load_rows(str(tmp_path / "empty.txt"), dataclasses.replace(tokenizer, eos_token=None), 8)
