"""Many few-shot tasks at once: an adapter for each, trained on its own demonstrations."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import lutjax
from lutjax.adapters.multi import multi_lora
from lutjax.models import generate
from train.base_model import Start
from train.examples import NOTHING, Example
from train.few_shot import Format, Question, longest_variant, questions, variant
from train.lora_step import Batch, make_step, next_token, state_for_each, update_each
from train.tasks import Task, Value, from_text
from train.ttt_config import TTTConfig
from train.vote import vote

_TRAINING, _ASKING = 0, 1  # what random numbers are for


@dataclasses.dataclass(frozen=True)
class Answered:
    """A task's result.

    Attributes:
      name: Of the task.
      fingerprint: Of the task.
      answers: For each query, the best first; empty if the model gave none of the right form.
      right: For each query, the place of the right answer among them from 0; -1 if it is not among
        them, None if it is not known.
      losses: Training loss by step.
      unread: What the model wrote that is no answer.
      skipped: Why there is no answer, or None.
    """

    name: str
    fingerprint: str
    answers: tuple[tuple[Value, ...], ...]
    right: tuple[int | None, ...]
    losses: tuple[float, ...] = ()
    unread: tuple[str, ...] = ()
    skipped: str | None = None

    @classmethod
    def of(cls, task: Task, answers: Sequence[Sequence[Value]], **others: Any) -> Answered:
        """Compares answers with the outputs that are known."""
        right = []
        for given, (_, output) in zip(answers, task.queries, strict=True):
            places = {answer: place for place, answer in enumerate(given)}
            right.append(None if output is None else places.get(output, -1))
        return cls(task.name, task.fingerprint, tuple(map(tuple, answers)), tuple(right), **others)

    @classmethod
    def none(cls, task: Task, reason: str, **others: Any) -> Answered:
        """No answer to any query."""
        return cls.of(task, [()] * len(task.queries), skipped=reason, **others)


@dataclasses.dataclass(frozen=True)
class _Job:
    """A task that fits.

    Attributes:
      task: The task.
      asked: Its questions.
      prompt: Tokens of the longest one.
      budget: Tokens that an answer may have.
    """

    task: Task
    asked: list[Question]
    prompt: int
    budget: int


def solve(
    config: TTTConfig, start: Start, tasks: Sequence[Task], *, progress: bool = False
) -> Iterator[Answered]:
    """Trains an adapter for each task and answers its queries with it.

    Args:
      config: The run.
      start: The model, the frozen base, and the adapter that every task starts with.
      tasks: Their results do not depend on each other, up to rounding.
      progress: Show the steps of what is trained now.

    Yields:
      A result for each, in another order: tasks of similar length are trained together. Those that
      do not fit, or whose loss is not finite, have no answers.

    Raises:
      ValueError: If answers in this model's chats, and its texts, have no end.

    Source: test-time training (arXiv 2411.07279).
    """
    solver = _Solver(config, start, progress)
    jobs = []
    for task in tasks:
        found = solver.job(task)
        if isinstance(found, _Job):
            jobs.append(found)
        else:
            yield found
    for chunk in _chunks(jobs, config, start.model.config.max_position_embeddings):
        yield from solver.solve(chunk)


class _Solver:
    """What all tasks share: the compiled functions, and how tasks become tokens."""

    def __init__(self, config: TTTConfig, start: Start, progress: bool) -> None:
        self.config, self.start, self.progress = config, start, progress
        self.context = start.model.config.max_position_embeddings
        self.format = Format.of(start.tokenizer)
        self.optimizer = config.optimizer()
        apply_fn = lutjax.lift(start.model.apply)
        self.update = update_each(make_step(next_token(apply_fn), self.optimizer))
        self.apply = multi_lora(apply_fn)

    def job(self, task: Task) -> _Job | Answered:
        """The task's questions, or the result of one that is too long."""
        config = self.config
        rng = self._random(task, _ASKING)
        asked = questions(
            task, self.format, rng, orders=config.orders, symmetries=config.symmetries
        )
        prompt = max(len(question.prompt) for question in asked)
        # Room for the longest output shown and its end; an answer may be twice as long if it fits.
        output = 1 + max(self.format.length(pair.output) for pair in task.demonstrations)
        needed = prompt + output
        if config.steps:  # grids are turned in training, even if no question is asked about that
            needed = max(needed, longest_variant(task, self.format))
        if needed > min(config.sequence_length, self.context):
            fix = f"the model takes {self.context}"
            if needed <= self.context:
                fix = f"raise sequence_length={config.sequence_length}"
            return Answered.none(task, f"it needs {needed} tokens; {fix}")
        budget = config.max_new_tokens or 2 * output
        return _Job(task, asked, prompt, min(budget, self.context - prompt))

    def solve(self, jobs: Sequence[_Job]) -> list[Answered]:
        """Results of tasks that are trained together."""
        adapters, losses = self._train([job.task for job in jobs])
        written = self._write(jobs, adapters)
        return [self._result(*found) for found in zip(jobs, written, losses.T, strict=True)]

    def _train(self, tasks: Sequence[Task]) -> tuple[Any, np.ndarray]:
        """Adapters with a leading axis, and losses `[steps, tasks]`."""
        state = state_for_each(self.start.adapter, self.optimizer, len(tasks))
        losses = np.zeros((self.config.steps, len(tasks)))
        batches = tqdm(self._batches(tasks), "training", leave=False, disable=not self.progress)
        for number, batch in enumerate(batches):
            state, values = self.update(state, self.start.base, batch)
            losses[number] = values["loss"]
        return state.trained.adapter, losses

    def _batches(self, tasks: Sequence[Task]) -> list[Batch]:
        """For each step, `[tasks, rows, 1, ...]`: rows one after the other, tasks at once."""
        steps, rows = self.config.steps, self.config.batch_size
        if not steps:
            return []
        examples = [
            self.format.example(variant(task, self._random(task, _TRAINING, step, row)))
            for step in range(steps)
            for task in tasks
            for row in range(rows)
        ]
        shape = (steps, len(tasks), rows, 1, -1)
        fields = [field.reshape(shape) for field in _padded(examples)]
        return [Batch(*(jnp.asarray(field[step]) for field in fields)) for step in range(steps)]

    def _write(self, jobs: Sequence[_Job], adapters: Any) -> list[list[str]]:
        """What the model says to the questions of each task."""
        longest = max(job.prompt for job in jobs)
        # A few lengths only, because each is another program; answers are cut to their own.
        new_tokens = min(_bucket(max(job.budget for job in jobs)), self.context - longest)
        most = max(len(job.asked) for job in jobs)
        room = self.config.tokens_at_once // (len(jobs) * (_bucket(longest) + new_tokens))
        at_once = min(most, max(1, room))
        written: list[list[str]] = [[] for _ in jobs]
        for first in range(0, most, at_once):
            # Tasks with fewer questions repeat the last one.
            prompts = [
                job.asked[min(place, len(job.asked) - 1)].prompt
                for job in jobs
                for place in range(first, first + at_once)
            ]
            found = generate(
                self.apply,
                (self.start.base, adapters),
                prompts,
                config=self.start.model.config,
                max_new_tokens=new_tokens,
                stop_tokens=self.format.ends,
            )
            for number, (job, texts) in enumerate(zip(jobs, written, strict=True)):
                own = found[number * at_once : (number + 1) * at_once]
                texts += [self.start.tokenizer.decode(tokens[: job.budget]) for tokens in own]
        return written

    def _result(self, job: _Job, written: Sequence[str], losses: np.ndarray) -> Answered:
        task = job.task
        others: dict[str, Any] = {"losses": tuple(losses.tolist())}
        if not np.isfinite(losses).all():
            step = int(np.argmin(np.isfinite(losses)))
            reason = f"its loss is {losses[step]} at step {step + 1}; lower learning_rate"
            return Answered.none(task, f"{reason}={self.config.learning_rate}", **others)
        answers, unread = ranked(task, job.asked, written)
        kept = [found[: self.config.attempts] for found in answers]
        return Answered.of(task, kept, unread=tuple(unread), **others)

    def _random(self, task: Task, *purpose: int) -> np.random.Generator:
        return np.random.default_rng((self.config.seed, zlib.crc32(task.name.encode()), *purpose))


def ranked(
    task: Task, asked: Sequence[Question], written: Sequence[str]
) -> tuple[list[list[Value]], list[str]]:
    """Answers to each query, the best first, and texts that are none.

    Args:
      task: The task.
      asked: Its questions.
      written: A text for each, and any more that do not count.
    """
    is_grid = not isinstance(task.demonstrations[0].output, str)
    candidates: list[list[tuple[str, Value]]] = [[] for _ in task.queries]
    unread = []
    for question, text in zip(asked, written, strict=False):
        value = from_text(text, grid=is_grid)
        if value is None:
            unread.append(text)
            continue
        undone = value if isinstance(value, str) else question.transformation.invert(value)
        candidates[question.query].append((question.transformation.name, undone))
    return [vote(found) for found in candidates], unread


def _chunks(jobs: Sequence[_Job], config: TTTConfig, context: int) -> Iterator[list[_Job]]:
    """Tasks to train together, the shortest first."""
    chunk: list[_Job] = []
    for job in sorted(jobs, key=lambda job: job.prompt):
        more = [*chunk, job]
        fits = (
            len(more) <= config.instances
            and len(more) * _bucket(job.prompt) <= config.tokens_at_once
            # So that none is cut shorter than it would be alone.
            and job.prompt + max(other.budget for other in more) <= context
        )
        if chunk and not fits:
            yield chunk
            more = [job]
        chunk = more
    if chunk:
        yield chunk


def _padded(examples: Sequence[Example]) -> tuple[np.ndarray, ...]:
    """The fields of a batch with one example a row."""
    places = [np.flatnonzero(example.targets != NOTHING) for example in examples]
    length = _bucket(max(len(example.tokens) for example in examples))
    most = _bucket(max(map(len, places)))
    tokens, segments = (np.zeros((len(examples), length), np.int32) for _ in range(2))
    at = np.zeros((len(examples), most), np.int32)
    targets = np.full((len(examples), most), NOTHING, np.int32)
    for row, (example, place) in enumerate(zip(examples, places, strict=True)):
        tokens[row, : len(example.tokens)] = example.tokens
        segments[row, : len(example.tokens)] = 1
        at[row, : len(place)] = place
        targets[row, : len(place)] = example.targets[place]
    return tokens, segments, targets, at


def _bucket(length: int) -> int:
    """The next power of two, or three quarters of it: few lengths, few compilations.

    >>> [_bucket(n) for n in (10, 17, 24, 25)]
    [16, 24, 24, 32]
    """
    power = max(16, 1 << (length - 1).bit_length())
    return power * 3 // 4 if power > 16 and length <= power * 3 // 4 else power
