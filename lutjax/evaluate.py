"""Perplexity of a language model on windows of text."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32

from lutjax.progress import progress_bar


@dataclasses.dataclass(frozen=True)
class PerplexityResult:
    """What `perplexity` measured.

    Attributes:
      perplexity: exp(`mean_nll`).
      mean_nll: mean negative log-likelihood of a predicted token, in nats.
      tokens: how many tokens were predicted.
      window_nll: the mean of each window, in nats.
    """

    perplexity: float
    mean_nll: float
    tokens: int
    window_nll: tuple[float, ...]


def windows(
    tokens: Sequence[int] | np.ndarray, window: int = 512, chunks: int = 16
) -> Int32[np.ndarray, "chunks window"]:
    """Cuts evenly spaced windows out of a text.

    The text is n = len(tokens) // window whole windows; chunk i is window number (i·n) // chunks.

    Args:
      tokens: token ids of the whole text.
      window: tokens in a window, at least 2.
      chunks: how many windows; all n if the text has fewer.

    Returns:
      int32 `[min(chunks, n), window]`.

    Raises:
      ValueError: if the text is shorter than a window, or an argument is out of range.

    >>> windows(list(range(10)), window=3, chunks=2).tolist()
    [[0, 1, 2], [3, 4, 5]]
    """
    if window < 2:
        raise ValueError(f"window={window} must be at least 2: one token predicts the next")
    if chunks < 1:
        raise ValueError(f"chunks={chunks} must be at least 1")
    n = len(tokens) // window
    if n == 0:
        raise ValueError(
            f"the text has {len(tokens)} tokens, fewer than window={window}; use a longer text or "
            "a smaller window"
        )
    chunks = min(chunks, n)
    whole = np.asarray(tokens[: n * window], np.int32).reshape(n, window)
    return whole[np.arange(chunks) * n // chunks]


def perplexity(
    apply_fn: Callable[..., Any],
    params: Any,
    windows: Int32[np.ndarray, "chunks window"] | Int32[Array, "chunks window"],
    *,
    batch_size: int = 1,
    progress: bool = False,
) -> PerplexityResult:
    """Perplexity exp(−mean log p(token | tokens before it in its window)).

    Each window is run alone from position 0, and all its tokens but the first are predicted. The
    logits of one batch, `4 * batch_size * window * vocab` bytes, are held at a time.

    Args:
      apply_fn: `Decoder.apply` or a function with its signature; pass the same object each time,
        or it compiles again.
      params: the model's parameters.
      windows: int32 `[chunks, window]`, see `windows`.
      batch_size: how many windows are run at once.
      progress: whether to show a progress bar (needs `tqdm`).

    Returns:
      The perplexity and what it is made of.

    Raises:
      ValueError: if `windows` is not a matrix with at least two columns, has numbers that are no
        tokens of the model, or `batch_size` < 1.
    """
    windows = np.asarray(windows, np.int32)
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise ValueError(f"windows has shape {windows.shape}; it must be [chunks, window ≥ 2]")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    # With the shapes of the first batch, whose trace this is.
    logits = functools.partial(_logits, apply_fn=apply_fn)
    vocabulary = jax.eval_shape(logits, params, windows[:batch_size]).shape[-1]
    for token in (int(windows.min()), int(windows.max())):
        if not 0 <= token < vocabulary:
            raise ValueError(
                f"token {token} in windows is none of the model's {vocabulary}; use its tokenizer"
            )
    starts: Iterable[int] = range(0, len(windows), batch_size)
    starts = progress_bar(starts, "perplexity", "batch", show=progress)
    # Summed in float64: the windows' sums are far larger than their differences.
    means = np.concatenate(
        [
            np.asarray(
                _window_nll(params, windows[start : start + batch_size], apply_fn=apply_fn),
                np.float64,
            )
            for start in starts
        ]
    )
    mean = float(means.mean())
    return PerplexityResult(
        perplexity=math.exp(mean),
        mean_nll=mean,
        tokens=windows.shape[0] * (windows.shape[1] - 1),
        window_nll=tuple(means.tolist()),
    )


@functools.partial(jax.jit, static_argnames="apply_fn")
def _logits(params: Any, tokens: Int32[Array, "b t"], *, apply_fn: Callable[..., Any]) -> Any:
    return apply_fn({"params": params}, tokens)


@functools.partial(jax.jit, static_argnames="apply_fn")
def _window_nll(
    params: Any, tokens: Int32[Array, "b t"], *, apply_fn: Callable[..., Any]
) -> Float32[Array, " b"]:
    """Mean over each row of −log softmax(logits)[next token]."""
    logits = _logits(params, tokens, apply_fn=apply_fn)[:, :-1]
    chosen = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - chosen, axis=-1)
