"""A tokenizer of single characters, with a chat template."""

import tokenizers

from lutjax.io import Tokenizer

CHATML = (
    "{% for m in messages %}{{ '<' + m.role[0] + '>' + m.content + '$' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<a>' }}{% endif %}"
)


def characters(chat_template: str | None = CHATML, digits: int = 1) -> Tokenizer:
    """A token for each character, or for so many digits at once."""
    signs = [chr(i) for i in range(10, 127)] + ["0123456789"[:digits]] * (digits > 1)
    merges = [("0123456789"[:i], "0123456789"[i]) for i in range(1, digits)]
    vocab = {sign: i for i, sign in enumerate(signs + ["".join(m) for m in merges[:-1]])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
    backend.decoder = tokenizers.decoders.Fuse()
    return Tokenizer(backend, (vocab["$"],), None, "$", chat_template)
