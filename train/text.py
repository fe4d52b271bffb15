"""Text as one long row of tokens, and batches of it that depend on nothing but the step."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from lutjax.files import read_utf8
from lutjax.io import Tokenizer

Encode = Callable[[str], Sequence[int]]


def byte_tokens(text: str) -> Sequence[int]:
    """UTF-8 bytes as tokens: a vocabulary of 256 without a tokenizer.

    >>> list(byte_tokens("hi"))
    [104, 105]
    """
    return text.encode()


def byte_tokenizer() -> Tokenizer:
    """The tokenizer that gives :func:`byte_tokens`.

    >>> byte_tokenizer().encode("hé")
    [104, 195, 169]
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models

    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
    backend = Backend(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return Tokenizer(backend)


def read_text(sources: Sequence[str], limit: int | None = None) -> str:
    """The text of files, or of a dataset of the Hugging Face hub.

    Args:
      sources: Paths of plain-text files, or a ``dataset:config:split`` with a ``text`` column.
      limit: Characters to read at most.

    Raises:
      FileNotFoundError: For a path that does not exist and has no ``:``.
      ValueError: When there is no text, or a file is not of UTF-8.
    """
    if len(sources) == 1 and ":" in sources[0] and not Path(sources[0]).exists():
        text = _dataset_text(sources[0], limit)
    else:
        text = "\n".join(map(read_utf8, sources))
    if not text:
        raise ValueError(f"no text in {list(sources)}")
    return text[:limit]


def _dataset_text(source: str, limit: int | None) -> str:
    from datasets import load_dataset  # an extra; slow to import

    name, config, split = (*source.split(":"), "", "train")[:3]
    rows = load_dataset(name, config or None, split=split, streaming=True)
    pieces: list[str] = []
    size = 0
    for row in rows:
        pieces.append(row["text"])
        size += len(row["text"])
        if limit is not None and size >= limit:
            break
    return "\n".join(pieces)


def docstrings(*packages: str) -> str:
    """The docstrings of installed packages: English that every machine has, without a download.

    Args:
      packages: Names of installed packages; nothing is imported, and their tests are left out.

    Raises:
      ValueError: For a package that is not installed as source files.

    >>> "JSON" in docstrings("json")
    True
    """
    found: dict[str, None] = {}  # in order, each text once
    for package in packages:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
            raise ValueError(f"no Python source of {package!r} is installed; name another package")
        single = spec.submodule_search_locations is None
        files = [Path(spec.origin)] if single else sorted(Path(spec.origin).parent.rglob("*.py"))
        for file in files:
            if {"test", "tests"} & set(file.parts):
                continue
            for node in ast.walk(ast.parse(file.read_bytes())):
                if isinstance(
                    node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
                ):
                    found.setdefault(ast.get_docstring(node) or "")
    return "\n\n".join(text for text in found if text)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Tokens for training and, at the end of the text, for validation.

    Attributes:
      train: `[T]` tokens.
      validation: `[V]` tokens that training never sees.
      fingerprint: Hash of all tokens: a resumed run must have the same.
    """

    train: np.ndarray
    validation: np.ndarray
    fingerprint: str

    @classmethod
    def of(cls, text: str, encode: Encode = byte_tokens, validation: float = 0.05) -> Corpus:
        """Encodes a text and cuts off its end for validation."""
        ids = np.asarray(list(encode(text)), np.int32)
        cut = int(len(ids) * (1 - validation))
        return cls(ids[:cut], ids[cut:], hashlib.sha256(ids.tobytes()).hexdigest()[:16])

    def batch(self, seed: int, step: int, batch_size: int, length: int) -> np.ndarray:
        """Random windows of the training tokens, a function of seed and step alone.

        Returns:
          `int32[batch_size, length + 1]`: inputs and, shifted by one, targets.
        """
        rng = np.random.default_rng((seed, step))
        return self._windows(
            self.train, rng.integers(0, self._last(self.train, length), batch_size), length
        )

    def validation_batches(self, batch_size: int, length: int, count: int) -> np.ndarray:
        """Evenly spaced validation windows, `int32[count, batch_size, length + 1]`."""
        starts = np.linspace(0, self._last(self.validation, length) - 1, count * batch_size)
        windows = self._windows(self.validation, starts.astype(np.int64), length)
        return windows.reshape(count, batch_size, length + 1)

    @staticmethod
    def _last(tokens: np.ndarray, length: int) -> int:
        if len(tokens) <= length + 1:
            raise ValueError(
                f"sequence_length={length} needs more text: there are {len(tokens)} tokens"
            )
        return len(tokens) - length

    @staticmethod
    def _windows(tokens: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
        return tokens[starts[:, None] + np.arange(length + 1)[None]]
