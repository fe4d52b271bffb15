"""Checkpoints and tokenizers: Hugging Face directories, the hub, GGUF, and the project's own."""

from lutjax.io.checkpoint import Checkpoint
from lutjax.io.compress import compress_checkpoint
from lutjax.io.compressed import CompressedCheckpoint, open_compressed, read_params, save
from lutjax.io.decompose import decompose_checkpoint
from lutjax.io.demo import demo_model_path
from lutjax.io.load import load, load_params, load_tokenizer, open_checkpoint
from lutjax.io.peft import load_peft, load_peft_head, save_peft
from lutjax.io.tokenizer import TextStream, Tokenizer, require_tokenizer

__all__ = [
    "Checkpoint",
    "CompressedCheckpoint",
    "TextStream",
    "Tokenizer",
    "compress_checkpoint",
    "decompose_checkpoint",
    "demo_model_path",
    "load",
    "load_params",
    "load_peft",
    "load_peft_head",
    "load_tokenizer",
    "open_checkpoint",
    "open_compressed",
    "read_params",
    "require_tokenizer",
    "save",
    "save_peft",
]
