"""Reading checkpoints: Hugging Face directories, the hub, GGUF files, and their tokenizers."""

from lutjax.io.checkpoint import Checkpoint
from lutjax.io.demo import demo_model_path
from lutjax.io.load import load, load_params, load_tokenizer, open_checkpoint
from lutjax.io.tokenizer import TextStream, Tokenizer

__all__ = [
    "Checkpoint",
    "TextStream",
    "Tokenizer",
    "demo_model_path",
    "load",
    "load_params",
    "load_tokenizer",
    "open_checkpoint",
]
