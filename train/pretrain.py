"""Pretraining of Llama-style decoders from scratch: ``python -m train.pretrain --help``."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from lutjax import lift
from lutjax.adapters import dual
from lutjax.io import Tokenizer, save
from lutjax.io.new_directory import discard
from lutjax.io.tokenizer import read_backend
from lutjax.models import Decoder
from lutjax.optim import first_nonfinite, leaf_name
from lutjax.optim.project import ProjectedTransformation
from train.checkpoints import Checkpoints
from train.command_line import exit_code
from train.cyclic_precision import (
    cyclic_bits,
    precision_range_test,
    quantize_kernels,
    quantized_activations,
)
from train.llama_configs import LLAMA
from train.methods import Method, MethodOptions, make_method
from train.metrics import MetricsWriter
from train.text import Corpus, byte_tokenizer, byte_tokens, read_text

_HELP = """Pretrain a Llama-style decoder from scratch.

For example:

python -m train.pretrain --text a.txt b.txt --model 1m --method galore --rank 32 --output runs/1

python -m train.pretrain --text allenai/c4:en:train --tokenizer tokenizer.json --model 130m
"""


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """One run. Two runs with the same configuration give the same bits.

    Attributes:
      text: Plain-text files, or one ``dataset:config:split`` of the Hugging Face hub.
      model: A Llama of about so many weights: tiny, 1m, 7m, 60m, 130m, 350m, 1b or 7b.
      method: adam, adam_8bit, adam_4bit, spam, galore, galore_8bit, flora, semi_orthogonal, lift,
        relora or one_sided_lora.
      steps: Updates.
      batch_size: Sequences in an update.
      accumulate: Parts that a batch is cut into, one after the other on the device. Gradients of
        adapters accumulate in the latent space.
      sequence_length: Tokens of a sequence.
      learning_rate: Peak; linear warm-up over a tenth of the steps, then cosine decay to a tenth.
      rank: Rank of projections and adapters.
      refresh_every: Steps between new projections, merges or resets.
      scale: Factor on projected updates; the method's own default if None.
      seed: Of the weights, the batches and the random maps.
      characters: Characters of the text to read at most.
      tokenizer: A ``tokenizer.json``; bytes are the tokens without one.
      cyclic_bits: Lowest and highest bits of cyclic precision training; none if None.
      cycles: Cycles of precision.
      skip_nonfinite: At a step whose gradients have NaN leave the run as it is; stop otherwise.
      eval_every: Steps between evaluations; only at the end if None.
      output: Directory of the checkpoints, the log and, at the end, ``model/`` for
        :func:`lutjax.load`; nothing is written if None.
      checkpoint_every: Steps between checkpoints.
    """

    text: tuple[str, ...]
    model: str = "1m"
    method: str = "galore"
    steps: int = 1000
    batch_size: int = 16
    accumulate: int = 1
    sequence_length: int = 128
    learning_rate: float = 3e-3
    rank: int = 32
    refresh_every: int = 200
    scale: float | None = None
    seed: int = 0
    characters: int | None = None
    tokenizer: str | None = None
    cyclic_bits: tuple[int, int] | None = None
    cycles: int = 32
    skip_nonfinite: bool = False
    eval_every: int | None = None
    output: str | None = None
    checkpoint_every: int = 500

    def __post_init__(self) -> None:
        """Checks values that would fail late or silently."""
        if self.model not in LLAMA:
            raise ValueError(f"unknown model {self.model!r}; use one of {', '.join(LLAMA)}")
        positive = ("steps", "checkpoint_every", "accumulate", "batch_size", "cycles")
        for name in (*positive, "sequence_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must be at least 0")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate={self.learning_rate} must be above 0 and finite")
        if self.eval_every is not None and self.eval_every < 1:
            raise ValueError(f"eval_every={self.eval_every} must be at least 1, or None")
        if self.tokenizer is not None and not Path(self.tokenizer).is_file():
            raise ValueError(f"tokenizer={self.tokenizer!r} is no file; name a tokenizer.json")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"accumulate={self.accumulate} does not divide batch_size={self.batch_size}"
            )
        if self.cyclic_bits is not None:
            low, high = self.cyclic_bits
            if not 2 <= low <= high <= 24:  # float32 has no more
                raise ValueError(
                    f"cyclic_bits={self.cyclic_bits} must be (low, high), 2 <= low <= high <= 24"
                )
        if self.scale is not None and not 0 < self.scale < math.inf:
            raise ValueError(f"scale={self.scale} must be above 0 and finite, or None")
        if self.characters is not None and self.characters < 1:
            raise ValueError(f"characters={self.characters} must be at least 1, or None")

    def schedule(self) -> optax.Schedule:
        """The learning rate by step."""
        return optax.warmup_cosine_decay_schedule(
            0.0,
            self.learning_rate,
            max(1, self.steps // 10),
            max(2, self.steps),
            self.learning_rate / 10,
        )


@dataclasses.dataclass(frozen=True)
class Training:
    """The pure functions of a run.

    Attributes:
      init: Key -> state, a pytree of arrays.
      step: State, step number and batch -> state and metrics.
      weights: State -> dense weights.
      evaluate: State and batches -> mean loss.
    """

    init: Callable[..., Any]
    step: Callable[..., Any]
    weights: Callable[[Any], Any]
    evaluate: Callable[..., Any]


def next_token_loss(apply: Callable[..., Any], params: Any, tokens: jax.Array) -> jax.Array:
    """Mean cross-entropy of `tokens[:, 1:]` given what comes before, in nats."""
    logits = apply({"params": params}, tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def build(config: PretrainConfig) -> Training:
    """The functions of a run: of the weights, or of adapters for a method that trains those."""
    model = Decoder(LLAMA[config.model])
    options = MethodOptions(
        config.schedule(), config.rank, config.refresh_every, config.scale, config.seed
    )
    method = make_method(config.method, options)
    of_what = _of_adapters if method.adapters else _of_weights
    init, step, weights = of_what(config, model, method)
    dummy = jnp.zeros((1, 8), jnp.int32)

    def evaluate(state: Any, batches: jax.Array) -> jax.Array:
        params = weights(state)
        losses = jax.lax.map(lambda tokens: next_token_loss(model.apply, params, tokens), batches)
        return losses.mean()

    return Training(lambda key: init(model.init(key, dummy)["params"]), step, weights, evaluate)


def _of_weights(config: PretrainConfig, model: Decoder, method: Method) -> tuple[Any, Any, Any]:
    def init(params: Any) -> Any:
        return params, method.optimizer.init(params)

    def step(state: Any, number: jax.Array, tokens: jax.Array) -> Any:
        params, optimizer_state = state
        loss, gradients = _value_and_grad(
            config, lambda p, part: _loss(config, model.apply, p, part, number), params, tokens
        )

        def update() -> Any:
            updates, new_state = method.optimizer.update(gradients, optimizer_state, params)
            return optax.apply_updates(params, updates), new_state

        state, bad = _guarded(config, gradients, state, update)
        return state, {"loss": loss, "nonfinite": bad}

    return init, step, lambda state: state[0]


def _of_adapters(config: PretrainConfig, model: Decoder, method: Method) -> tuple[Any, Any, Any]:
    assert isinstance(method.optimizer, ProjectedTransformation)
    training = dual(method.optimizer)
    # Cyclic precision rounds whole weights, so they are formed; else lift keeps them apart.
    apply = model.apply if config.cyclic_bits is not None else lift(model.apply, strict=True)
    form = training.weights if config.cyclic_bits is not None else training.adapted

    def step(state: Any, number: jax.Array, tokens: jax.Array) -> Any:
        def refresh(state: Any) -> Any:
            full = None
            if training.config.map.depends_on == "gradient":
                weights = training.weights(state)
                full = jax.grad(lambda p: _loss(config, model.apply, p, tokens, number))(weights)
            return training.refresh(state, full)

        state = jax.lax.cond(training.is_due(state), refresh, lambda state: state, state)
        loss, gradients = _value_and_grad(
            config,
            lambda latents, part: _loss(config, apply, form(state, latents), part, number),
            state.latents,
            tokens,
        )
        state, bad = _guarded(config, gradients, state, lambda: training.update(gradients, state))
        return state, {"loss": loss, "nonfinite": bad}

    return training.init, step, training.weights


def _loss(
    config: PretrainConfig, apply: Callable[..., Any], params: Any, tokens: jax.Array, step: Any
) -> jax.Array:
    """The loss at a step, in the precision that it has then."""
    if config.cyclic_bits is None:
        return next_token_loss(apply, params, tokens)
    low, high = config.cyclic_bits
    bits = cyclic_bits(step, low=low, high=high, steps=config.steps, cycles=config.cycles)
    with quantized_activations(bits):
        return next_token_loss(apply, quantize_kernels(params, bits), tokens)


def _value_and_grad(
    config: PretrainConfig, loss: Callable[..., Any], trained: Any, tokens: jax.Array
) -> Any:
    """Loss and gradient, averaged over the parts of the batch."""
    if config.accumulate == 1:
        return jax.value_and_grad(loss)(trained, tokens)
    parts = tokens.reshape(config.accumulate, -1, tokens.shape[-1])

    def add(total: Any, part: jax.Array) -> Any:
        return jax.tree.map(jnp.add, total, jax.value_and_grad(loss)(trained, part)), None

    zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, trained))
    total, _ = jax.lax.scan(add, zero, parts)
    return jax.tree.map(lambda x: x / config.accumulate, total)


def _guarded(
    config: PretrainConfig, gradients: Any, state: Any, update: Callable[[], Any]
) -> tuple[Any, jax.Array]:
    """The updated state, or the one before a step that is skipped; and which gradient is bad."""
    bad = first_nonfinite(gradients)
    if config.skip_nonfinite:
        # XLA copies what the first branch hands through, but not what the second does.
        return jax.lax.cond(bad < 0, update, lambda: state), bad
    return update(), bad


def load_tokenizer(config: PretrainConfig) -> Tokenizer:
    """The configuration's tokenizer; bytes without one.

    Raises:
      ValueError: For a file that is no tokenizer.
    """
    if config.tokenizer is None:
        return byte_tokenizer()
    try:
        return Tokenizer(read_backend(config.tokenizer))
    except Exception as error:  # tokenizers raises nothing narrower
        raise ValueError(f"tokenizer={config.tokenizer!r} is no tokenizer: {error}") from error


def load_corpus(config: PretrainConfig) -> Corpus:
    """The tokens of the configuration's text.

    Raises:
      ValueError: For tokens that the model has no embedding of.
    """
    encode = byte_tokens if config.tokenizer is None else load_tokenizer(config).encode
    corpus = Corpus.of(read_text(config.text, config.characters), encode)
    vocab = LLAMA[config.model].vocab_size
    if corpus.train.max() >= vocab:
        raise ValueError(
            f"token {corpus.train.max()} is outside the vocabulary of {vocab} of {config.model!r}; "
            "use another model or tokenizer"
        )
    return corpus


def identity_of(config: PretrainConfig, corpus: Corpus) -> dict[str, Any]:
    """What must be equal for a run to be resumed, in terms of JSON."""
    ignored = ("output", "checkpoint_every", "eval_every", "text", "skip_nonfinite")
    values = {k: v for k, v in dataclasses.asdict(config).items() if k not in ignored}
    return json.loads(json.dumps(values | {"text": corpus.fingerprint}))


@dataclasses.dataclass(frozen=True)
class PretrainResult:
    """What a run gives back.

    Attributes:
      losses: By step, since the start or the resumption.
      evaluations: Pairs of a step and the validation loss after it.
      state: The last state.
      weights: The trained weights, dense.
      seconds: The run took.
    """

    losses: list[float]
    evaluations: list[tuple[int, float]]
    state: Any
    weights: Any
    seconds: float


def pretrain(
    config: PretrainConfig,
    corpus: Corpus | None = None,
    stop_at: int | None = None,
    progress: bool = False,
) -> PretrainResult:
    """Trains, resuming from the output directory's checkpoint if there is one.

    Args:
      config: The run.
      corpus: Its tokens; read from ``config.text`` by default.
      stop_at: Stop early at this step, as if interrupted (after a checkpoint).
      progress: Show a bar with the losses.

    Raises:
      FloatingPointError: At a gradient with NaN or infinity, naming the parameter, and at a loss
        that is not finite; not with ``skip_nonfinite``.
      ValueError: For a configuration that does not fit the text or the checkpoint.
    """
    corpus = load_corpus(config) if corpus is None else corpus
    training = build(config)
    length = config.sequence_length
    validation = jnp.asarray(corpus.validation_batches(config.batch_size, length, 8))
    init = jax.jit(training.init)
    evaluate = jax.jit(training.evaluate)
    step = jax.jit(training.step, donate_argnums=0)
    state, start = init(jax.random.key(config.seed)), 0
    output = None if config.output is None else Path(config.output)
    checkpoints = None
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        checkpoints = Checkpoints(
            output / "checkpoints", identity_of(config, corpus), config.checkpoint_every
        )
        state, start = checkpoints.restore(state)
    trained_like = jax.eval_shape(training.weights, state)
    losses: list[float] = []
    evaluations: list[tuple[int, float]] = []

    def checked(loss: Any, what: str) -> float:
        if not math.isfinite(loss) and not config.skip_nonfinite:
            raise FloatingPointError(f"{what} is {loss}; lower the learning rate")
        return float(loss)

    def validate(done: int) -> float:
        loss = checked(float(evaluate(state, validation)), f"the validation loss at step {done}")
        evaluations.append((done, loss))
        return loss

    began = time.perf_counter()
    with contextlib.ExitStack() as stack:
        log = None
        if output is not None:
            log = stack.enter_context(MetricsWriter(output, start, quiet=True))
        last = config.steps if stop_at is None else stop_at
        steps = stack.enter_context(
            tqdm(range(start, last), initial=start, total=last, unit="step", disable=not progress)
        )
        for number in steps:
            tokens = corpus.batch(config.seed, number, config.batch_size, length)
            state, metrics = step(state, jnp.asarray(number), jnp.asarray(tokens))
            done = number + 1
            bad = int(metrics["nonfinite"])
            if bad >= 0 and not config.skip_nonfinite:
                raise FloatingPointError(
                    f"step {number}: the gradient of {leaf_name(trained_like, bad)!r} has NaN or "
                    "infinite entries; lower the learning rate or pass skip_nonfinite"
                )
            losses.append(checked(float(metrics["loss"]), f"step {number}: the loss"))
            record: dict[str, Any] = {"step": done, "loss": losses[-1]}
            if bad >= 0:
                record["skipped"] = leaf_name(trained_like, bad)
            due = config.eval_every is not None and done % config.eval_every == 0
            if due or done == config.steps:
                record["validation_loss"] = validate(done)
            steps.set_postfix({k: f"{v:.4f}" for k, v in record.items() if k.endswith("loss")})
            if log is not None:
                log.write(record)  # before the checkpoint: a killed run resumes after these lines
            if output is not None and done == config.steps:
                discard(output / "model")  # first, as a run with its last checkpoint keeps it
            if checkpoints is not None:
                checkpoints.save(done, state, force=done in (config.steps, stop_at))
    if checkpoints is not None:
        checkpoints.close()
    if start == config.steps:  # it was finished before
        validate(start)
    weights = training.weights(state)
    model = None if output is None else output / "model"
    if model is not None and start + len(losses) == config.steps and not model.exists():
        save(model, jax.device_get(weights), LLAMA[config.model], load_tokenizer(config))
    return PretrainResult(losses, evaluations, state, weights, time.perf_counter() - began)


def lowest_precision(config: PretrainConfig, threshold: float, corpus: Corpus | None = None) -> int:
    """Finds the lower bound of cyclic precision by the precision range test.

    Args:
      config: The run; each precision trains for a tenth of its steps, and nothing is written.
      threshold: Nats by which the loss must fall, from the first step to the mean of the last
        quarter.
      corpus: Its tokens; read from ``config.text`` by default.

    Raises:
      ValueError: When no precision up to 8 bits gains that much.

    Source: CPT (arXiv 2101.09868, section 3.3).
    """
    corpus = load_corpus(config) if corpus is None else corpus
    steps = max(2, config.steps // 10)

    def gain_at(bits: int) -> float:
        short = dataclasses.replace(config, cyclic_bits=(bits, bits), eval_every=None, output=None)
        losses = pretrain(short, corpus, stop_at=steps).losses
        return losses[0] - float(np.mean(losses[-max(1, steps // 4) :]))

    return precision_range_test(gain_at, threshold)


def run(config: PretrainConfig, range_test: float | None = None) -> None:
    """Trains, or only looks for the lowest precision to train at.

    Args:
      config: The run.
      range_test: Train nothing; print the lowest bits for ``cyclic_bits``: the first that lower the
        loss by so many nats in a tenth of the steps.
    """
    if range_test is not None:
        print(f"lowest precision: {lowest_precision(config, range_test)} bits")
        return
    result = pretrain(config, progress=True)
    final = result.evaluations[-1][1] if result.evaluations else math.nan
    tokens = len(result.losses) * config.batch_size * config.sequence_length
    print(
        f"{config.method} on {config.model}: validation loss {final:.4f}, "
        f"perplexity {np.exp(final):.2f}, {tokens / result.seconds:.0f} tokens/s"
    )
    if config.output is not None:
        print(f"model: {Path(config.output) / 'model'}")


def main() -> int:
    """The command line; exit code 2 for bad input."""
    import tyro

    return exit_code(
        "train.pretrain",
        lambda: tyro.cli(
            run,
            prog="python -m train.pretrain",
            description=_HELP,
            config=(tyro.conf.OmitArgPrefixes,),
        ),
    )


if __name__ == "__main__":
    sys.exit(main())
