"""Tokenizers: tokenizer.json, or byte-level BPE rebuilt from GGUF metadata."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lutjax.io.safetensors import read_json

if TYPE_CHECKING:
    import tokenizers

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # GGUF token types

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Words end where a capital follows a small letter, and keep their contractions.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {
    "llama-bpe": _CONTRACTIONS + _WORDS + r"|\p{N}{1,3}" + _REST,
    "gpt-4o": _O200K,
    "qwen2": _CONTRACTIONS + _WORDS + r"|\p{N}" + _REST,
}
PRE_TOKENIZERS = ("smollm", "gpt-2", "default", *_SPLITS)
"""The GGUF pre-tokenizers that can be rebuilt."""

_TEMPLATE = "tokenizer.chat_template"
_PUT_BESIDE = "put the tokenizer.json of the model's Hugging Face directory beside it"


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back.

    Attributes:
      backend: the `tokenizers.Tokenizer` that does the work.
      eos_ids: tokens that end a generation.
      bos_token: text of the token that begins a text, or None.
      eos_token: text of the token that ends a text, or None.
      chat_template: the Jinja template of a conversation, or None.
    """

    backend: tokenizers.Tokenizer
    eos_ids: tuple[int, ...] = ()
    bos_token: str | None = None
    eos_token: str | None = None
    chat_template: str | None = None

    @classmethod
    def from_directory(cls, directory: str | Path) -> Tokenizer:
        """Reads tokenizer.json, and tokenizer_config.json and generation_config.json if present.

        Where generation_config.json does not say what ends a generation, config.json does.
        A truncation or padding that tokenizer.json holds is left out.

        Raises:
          FileNotFoundError: if there is no tokenizer.json.
          ValueError: if a file is not sound.
        """
        directory = Path(directory)
        path = directory / "tokenizer.json"
        read_json(path)  # the library's own errors do not name the file
        try:
            backend = read_backend(path)
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path} is not a tokenizer: {error}") from error
        config = _optional_json(directory / "tokenizer_config.json")
        template = config.get("chat_template")
        if isinstance(template, list):  # several named templates
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        if (directory / "chat_template.jinja").is_file():
            template = (directory / "chat_template.jinja").read_text(encoding="utf-8")
        bos, eos = (_token_text(config.get(key)) for key in ("bos_token", "eos_token"))
        eos_ids = _end_ids(directory)
        if eos is not None and (eos_id := backend.token_to_id(eos)) is not None:
            eos_ids.append(eos_id)
        return cls(backend, tuple(dict.fromkeys(eos_ids)), bos, eos, template)

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], source: str = "the GGUF file") -> Tokenizer:
        """Rebuilds a byte-level BPE tokenizer from GGUF metadata.

        Where the file does not name a pre-tokenizer, GPT-2's is taken, with a warning.

        Raises:
          ValueError: if the file has no tokenizer, or one of an unsupported kind.
        """
        model = metadata.get("tokenizer.ggml.model")
        if model != "gpt2":
            raise ValueError(
                f"{source} has a tokenizer of kind {model!r}; only 'gpt2' (byte-level BPE) is "
                f"rebuilt: {_PUT_BESIDE}"
            )
        pre = metadata.get("tokenizer.ggml.pre")
        if pre is not None and pre not in PRE_TOKENIZERS:
            raise ValueError(
                f"{source} has the pre-tokenizer {pre!r}; only {', '.join(PRE_TOKENIZERS)} are "
                f"rebuilt: {_PUT_BESIDE}"
            )
        missing = {"tokenizer.ggml.tokens", "tokenizer.ggml.merges"} - metadata.keys()
        if missing:
            raise ValueError(f"{source} lacks {', '.join(sorted(missing))}")
        if pre is None:
            warnings.warn(
                f"{source} does not name its pre-tokenizer; text is split as for GPT-2, which may "
                f"be wrong: {_PUT_BESIDE}",
                stacklevel=2,
            )
        tokens: list[str] = metadata["tokenizer.ggml.tokens"]
        backend = _byte_level_bpe(
            tokens,
            metadata["tokenizer.ggml.merges"],
            metadata.get("tokenizer.ggml.token_type", [_NORMAL] * len(tokens)),
            pre or "default",
        )

        bos = _token_of_gguf(metadata, "bos")
        # llama.cpp begins texts of this pre-tokenizer with BOS unless told otherwise.
        add_bos = metadata.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe")
        if add_bos and bos is not None:
            backend.post_processor = _library().processors.TemplateProcessing(
                single=f"{bos} $A", special_tokens=[(bos, tokens.index(bos))]
            )
        return cls(
            backend,
            _end_ids_of_gguf(metadata),
            bos,
            _token_of_gguf(metadata, "eos"),
            metadata.get(_TEMPLATE),
        )

    @classmethod
    def beside_gguf(cls, path: Path, metadata: Mapping[str, Any]) -> Tokenizer:
        """Reads the tokenizer.json beside a GGUF file, with the file's ends of a generation.

        What the directory does not say of a chat template, BOS and EOS, the file does.

        Args:
          path: the GGUF file.
          metadata: its metadata.

        Raises:
          FileNotFoundError: if there is no tokenizer.json.
          ValueError: if it is not sound, or an ordinary token is another one than the file's.
        """
        tokenizer = cls.from_directory(path.parent)
        tokens: list[str] = metadata.get("tokenizer.ggml.tokens", [])
        kinds = metadata.get("tokenizer.ggml.token_type", [_NORMAL] * len(tokens))
        for index, (token, kind) in enumerate(zip(tokens, kinds, strict=True)):
            if kind == _NORMAL and tokenizer.backend.id_to_token(index) != token:
                raise ValueError(
                    f"the tokenizer.json beside {path} is another model's: its token {index} is "
                    f"{tokenizer.backend.id_to_token(index)!r}, not {token!r}"
                )
        ends = tokenizer.eos_ids + _end_ids_of_gguf(metadata)
        return dataclasses.replace(
            tokenizer,
            eos_ids=tuple(dict.fromkeys(ends)),
            bos_token=tokenizer.bos_token or _token_of_gguf(metadata, "bos"),
            eos_token=tokenizer.eos_token or _token_of_gguf(metadata, "eos"),
            chat_template=tokenizer.chat_template or metadata.get(_TEMPLATE),
        )

    @property
    def vocab_size(self) -> int:
        """The number of tokens, with added ones."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text.

        Args:
          text: may contain special tokens, which become their ids.
          add_special_tokens: whether to add BOS where the model expects it.

        Returns:
          The ids.
        """
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids; incomplete UTF-8 becomes U+FFFD."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def render_chat(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True
    ) -> str:
        """Renders a conversation with the model's chat template, as transformers does.

        Args:
          messages: `{"role": …, "content": …}` in order.
          add_generation_prompt: whether to end where the assistant's answer begins.

        Returns:
          The prompt; encode it with `add_special_tokens=False`.

        Raises:
          ImportError: if `jinja2` is missing.
          ValueError: if the model has no template, or it refuses the messages.
        """
        if self.chat_template is None:
            raise ValueError("this model's tokenizer has no chat template")
        try:
            from jinja2 import TemplateError
        except ImportError as error:
            raise ImportError("chat templates need: pip install jinja2") from error
        try:
            return _chat_template(self.chat_template).render(
                messages=list(messages),
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                bos_token=self.bos_token or "",
                eos_token=self.eos_token or "",
            )
        except TemplateError as error:
            raise ValueError(f"the chat template refused the messages: {error}") from error

    def save(self, directory: str | Path) -> None:
        """Writes tokenizer.json, tokenizer_config.json and generation_config.json.

        Args:
          directory: an existing directory.
        """
        directory = Path(directory)
        # Written here, because the library reports a full disk as a bare Exception.
        text = self.backend.to_str(pretty=True)
        (directory / "tokenizer.json").write_text(text, encoding="utf-8")
        config = {
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            "chat_template": self.chat_template,
        }
        _write_json(directory / "tokenizer_config.json", config)
        _write_json(directory / "generation_config.json", {"eos_token_id": list(self.eos_ids)})


def require_tokenizer(tokenizer: Tokenizer | None, source: str | Path) -> Tokenizer:
    """The tokenizer of a model that is to read text.

    Raises:
      ValueError: if there is none; `source` is what to call the model.
    """
    if tokenizer is None:
        raise ValueError(f"{source} has no tokenizer.json, so it cannot read text")
    return tokenizer


def read_backend(path: str | Path) -> tokenizers.Tokenizer:
    """The library's tokenizer of a tokenizer.json, without a truncation or padding that it holds.

    Those are of the batches it was last used for; a text is neither cut nor padded here.

    Raises:
      Exception: if the file is none; the library raises nothing narrower.
    """
    backend = _library().Tokenizer.from_file(str(path))
    backend.no_truncation()
    backend.no_padding()
    return backend


class TextStream:
    """Turns a stream of token ids into a stream of text without broken characters."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Starts an empty stream."""
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._printed = ""

    def push(self, token: int) -> str:
        """Adds a token; returns the text that is new and complete."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""  # the rest of the character is in the next token
        new = text[len(self._printed) :]
        self._printed = text
        # A newline is a safe point to forget what came before. It stays itself, because decoders
        # as Llama 2's take the space away that their first token begins with.
        if text.endswith("\n") and (alone := self._tokenizer.decode([token])).endswith("\n"):
            self._ids, self._printed = [token], alone
        return new

    def finish(self) -> str:
        """Ends the stream; returns what was pending, an incomplete character as U+FFFD."""
        pending = self._tokenizer.decode(self._ids)[len(self._printed) :]
        self._ids, self._printed = [], ""
        return pending


@functools.lru_cache(maxsize=8)
def _chat_template(source: str) -> Any:
    """A template with what transformers gives it, which templates are written for."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks what the assistant says; it changes no text."""

        tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(source)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter `tojson` of chat templates; Jinja's own sorts keys and escapes for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError("tokenizers need: pip install 'lutjax[hf]'") from error
    return tokenizers


def _byte_level_bpe(
    tokens: Sequence[str], merges: Sequence[str], kinds: Sequence[int], pre: str
) -> tokenizers.Tokenizer:
    library = _library()
    parts = library.pre_tokenizers
    backend = library.Tokenizer(
        library.models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[tuple(merge.split(" ", 1)) for merge in merges],
            ignore_merges=pre == "llama-bpe",
        )
    )
    if pre in _SPLITS:
        split = parts.Split(library.Regex(_SPLITS[pre]), "isolated")
        byte_level = parts.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = parts.Sequence([split, byte_level])
    elif pre == "smollm":
        byte_level = parts.ByteLevel(add_prefix_space=False, use_regex=True)
        backend.pre_tokenizer = parts.Sequence([parts.Digits(individual_digits=True), byte_level])
    else:
        backend.pre_tokenizer = parts.ByteLevel(add_prefix_space=False, use_regex=True)
    if pre == "qwen2":
        backend.normalizer = library.normalizers.NFC()
    backend.decoder = library.decoders.ByteLevel()
    for kind, add in (
        (_CONTROL, backend.add_special_tokens),
        (_USER_DEFINED, backend.add_tokens),
    ):
        special = kind == _CONTROL
        add(
            [
                library.AddedToken(token, special=special, normalized=False)
                for token, of_kind in zip(tokens, kinds, strict=True)
                if of_kind == kind
            ]
        )
    return backend


def can_rebuild(metadata: Mapping[str, Any]) -> bool:
    """Whether GGUF metadata describes a tokenizer in full, and of a kind that is rebuilt."""
    known = metadata.get("tokenizer.ggml.pre") in PRE_TOKENIZERS
    return known and metadata.get("tokenizer.ggml.model") == "gpt2"


def _token_of_gguf(metadata: Mapping[str, Any], kind: str) -> str | None:
    tokens = metadata.get("tokenizer.ggml.tokens", [])
    index = metadata.get(f"tokenizer.ggml.{kind}_token_id")
    return tokens[index] if index is not None and 0 <= index < len(tokens) else None


def _end_ids_of_gguf(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    ends = [metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot")]
    return tuple(dict.fromkeys(index for index in ends if index is not None))


def _end_ids(directory: Path) -> list[int]:
    """What ends a generation, from the first file that says it."""
    model = directory / "config.json"
    config = _optional_json(model)
    generation = directory / "generation_config.json"
    text = config.get("text_config")  # of a model with several parts
    for source, data in ((generation, _optional_json(generation)), (model, config), (model, text)):
        ids = data.get("eos_token_id") if isinstance(data, dict) else None
        if ids is None:
            continue
        ids = ids if isinstance(ids, list) else [ids]
        if not all(isinstance(index, int) for index in ids):
            raise ValueError(f"{source}: 'eos_token_id' is {ids!r}; it must hold integers")
        return ids
    return []


def _token_text(value: Any) -> str | None:
    """A token in tokenizer_config.json is a string, or an object with `content`."""
    return value.get("content") if isinstance(value, dict) else value


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
