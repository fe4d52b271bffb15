"""Recipes: which configuration for which parameter."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lutjax import codebooks
from lutjax.arrays import DoubleQuant
from lutjax.packing import MAX_BITS
from lutjax.paths import near_misses
from lutjax.rotation import is_power_of_two

COLUMN = "column"
MIN_GROUP_SIZE = 16

EMBEDDINGS = ("*embed*", "*lm_head*", "*wte*", "*wpe*")
"""Paths of embeddings and of the output head."""

DENSE = (*EMBEDDINGS, "*norm*", "*ln_*", "*bias*", "*scale", "*router*", "*sinks*")
"""Paths that stay dense unless a rule names them in full: embeddings, head, norms, biases, …"""

DEFAULT = "default"
"""The codebook that is best for the bits, see :class:`LutConfig`."""


@dataclasses.dataclass(frozen=True)
class LutConfig:
    """How to turn one weight matrix into lookup-table codes.

    Attributes:
      bits: Bits of a code, 1 to 8.
      group_size: Weights along K that share a scale, at least 16; ``"column"`` for all of K.
      codebook: A name in :data:`lutjax.codebooks.CODEBOOKS`, ``"kmeans"`` (one table fitted to each
        matrix), ``"gaussian"`` (the best for normal numbers) or the values themselves. The default
        is ``"nf"``; from 6 bits on ``"int"``, which errs less there, and whose products take a
        third of the time on a CPU; ``"gaussian"`` at 1 bit and for pairs, for which the others do
        not exist. It is fixed when the configuration is made: to change its bits by
        ``dataclasses.replace``, give ``codebook="default"`` again.
      scale_dtype: Dtype of scales and offsets: bfloat16, float16 or float32.
      double_quant: Quantise the scales, and the offsets, too.
      vector_size: Consecutive weights along K that share a code, 1 or (``"gaussian"``) 2; a weight
        then takes ``bits / 2``.
      rotate: Rotate each group first, so that its weights look normal (:mod:`lutjax.rotation`);
        the group size must be a power of two.

    Raises:
      ValueError: If a value is out of range; the message says which and what is allowed.
    """

    bits: int = 4
    group_size: int | Literal["column"] = 64
    codebook: str | Sequence[float] = DEFAULT
    scale_dtype: str = "bfloat16"
    double_quant: DoubleQuant | None = None
    vector_size: int = 1
    rotate: bool = False

    @classmethod
    def higgs(cls, bits: float = 4, group_size: int = 512) -> LutConfig:
        """Rotated weights and the best tables for normal numbers.

        From 1.5 to 4 bits pairs of weights share a code of twice the bits, because that errs less.

        Args:
          bits: 1, 1.5, 2, 2.5, 3, 3.5 or 4, 5, 6, 7, 8 bits a weight, the scales not counted.
          group_size: Weights that are rotated together and share a scale, a power of two.

        Raises:
          ValueError: For other bits or group sizes.

        Source: HIGGS (arXiv 2411.17525).

        >>> LutConfig.higgs(3).bits, LutConfig.higgs(3).vector_size
        (6, 2)
        """
        if bits not in (1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8):
            raise ValueError(
                f"bits={bits} is not supported; use 1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 7 or 8"
            )
        vector_size = 2 if 1 < bits <= 4 else 1
        return cls(
            int(bits * vector_size),
            group_size,
            codebooks.GAUSSIAN,
            vector_size=vector_size,
            rotate=True,
        )

    def __post_init__(self):
        for name in ("bits", "group_size"):
            value = getattr(self, name)
            if isinstance(value, np.integer):
                object.__setattr__(self, name, int(value))
        if type(self.bits) is not int or not 1 <= self.bits <= MAX_BITS:
            raise ValueError(f"bits={self.bits!r} is not supported; use 1 to {MAX_BITS}")
        object.__setattr__(self, "codebook", self._resolved_codebook())
        if self.group_size != COLUMN and (
            not isinstance(self.group_size, int) or self.group_size < MIN_GROUP_SIZE
        ):
            raise ValueError(
                f"group_size={self.group_size!r} is not supported; use an integer of at least "
                f"{MIN_GROUP_SIZE}, such as 64, or 'column'"
            )
        if self.scale_dtype not in ("bfloat16", "float16", "float32"):
            raise ValueError(
                f"scale_dtype={self.scale_dtype!r}; use 'bfloat16', 'float16' or 'float32'"
            )
        if type(self.vector_size) is not int or self.vector_size not in (1, 2):
            raise ValueError(f"vector_size={self.vector_size!r} is not supported; use 1 or 2")
        if not isinstance(self.rotate, bool):
            raise ValueError(f"rotate={self.rotate!r} must be true or false")
        if self.vector_size != 1 and self.codebook != codebooks.GAUSSIAN:
            raise ValueError(
                f"vector_size={self.vector_size!r} with codebook {self.codebook!r}; only "
                f"'gaussian' has tables of pairs"
            )
        if self.rotate and (self.group_size == COLUMN or not is_power_of_two(int(self.group_size))):
            raise ValueError(
                f"group_size={self.group_size!r} cannot be rotated; use a power of two, such as 512"
            )
        table = self.table()
        if table is None and self.bits == 1:
            raise ValueError("codebook 'kmeans' exists for 2 to 8 bits, not 1")
        if table is not None and len(table) != 2**self.bits:
            raise ValueError(
                f"the codebook has {len(table)} values, but bits={self.bits} needs {2**self.bits}"
            )

    def _resolved_codebook(self) -> str | tuple[float, ...]:
        if not isinstance(self.codebook, str):
            try:
                return tuple(float(value) for value in self.codebook)
            except TypeError:
                raise TypeError(
                    f"codebook={self.codebook!r}; give a name, such as {DEFAULT!r}, or a list of "
                    f"values"
                ) from None
        if self.codebook != DEFAULT:
            return self.codebook
        if self.bits == 1 or self.vector_size != 1:
            return codebooks.GAUSSIAN
        return "nf" if self.bits < 6 else "int"

    @property
    def scaling(self) -> Literal["absmax", "range", "rms"]:
        """What a group is divided by: its largest magnitude, its range or its root mean square."""
        if self.codebook == codebooks.GAUSSIAN:
            return "rms"
        table = self.table()
        return "range" if table is not None and codebooks.is_affine(table) else "absmax"

    def table(self) -> np.ndarray | None:
        """The fixed table, or None if it is fitted to the weights.

        Returns:
          ``float32[2**bits]``, or ``float32[2**bits, 2]`` for pairs.
        """
        if self.codebook == codebooks.LEARNED:
            return None
        if self.vector_size > 1:
            return codebooks.gaussian(self.bits, self.vector_size)
        if isinstance(self.codebook, str):
            return codebooks.codebook(self.codebook, self.bits)
        return codebooks.user_table(np.asarray(self.codebook))


@dataclasses.dataclass(frozen=True)
class Rule:
    """One line of a recipe.

    Attributes:
      pattern: A parameter path or a glob over paths (``*`` also crosses ``/``).
      config: What to do with the paths that match; None leaves them dense.
      axis: The contraction axis or axes. By default -1 for leaves called ``weight`` or
        ``embedding`` and -2 for all others.
      batch_ndim: Leading axes of stacked weights; by default all before the first contraction
        axis, as long as one axis is left for N. So a Flax ``DenseGeneral`` to heads ``[D, H, d]``
        takes ``axis=-3`` and one from heads ``[H, d, D]`` takes ``axis=(-3, -2)``, scanned or not.
    """

    pattern: str
    config: LutConfig | None
    axis: int | tuple[int, ...] | None = None
    batch_ndim: int | None = None

    def __post_init__(self):
        if not isinstance(self.pattern, str):
            raise TypeError(f"the pattern of a rule is {self.pattern!r}; give a path or a glob")
        if self.config is not None and not isinstance(self.config, LutConfig):
            raise TypeError(
                f"the rule {self.pattern!r} has config={self.config!r}; give a LutConfig or None"
            )


@dataclasses.dataclass(frozen=True)
class Recipe:
    """An ordered list of rules; the first one that matches a path decides.

    Attributes:
      rules: The rules. Each must match at least one path.
      dense: Globs of paths that stay dense unless a rule names a path in full.
      embeddings: What to do with the matrices of :data:`EMBEDDINGS` that no rule names in full;
        None leaves them dense.

    >>> rules = (Rule("*/down_proj/kernel", LutConfig(bits=8)), Rule("*", LutConfig(bits=4)))
    >>> recipe = Recipe(rules)
    >>> recipe.rule_for("layers/0/mlp/down_proj/kernel").config.bits
    8
    >>> recipe.rule_for("layers/0/mlp/up_proj/kernel").config.bits
    4
    >>> recipe.rule_for("embed_tokens/embedding") is None
    True
    """

    rules: tuple[Rule, ...]
    dense: tuple[str, ...] = DENSE
    embeddings: LutConfig | None = None

    def __post_init__(self):
        if not isinstance(self.rules, list | tuple):
            raise TypeError(f"rules={self.rules!r}; give a tuple of them, such as (Rule(...),)")
        object.__setattr__(self, "rules", tuple(self.rules))
        for rule in self.rules:
            if not isinstance(rule, Rule):
                raise TypeError(f"{rule!r} is no rule; give Rule(pattern, config)")
        if not isinstance(self.embeddings, LutConfig | None):
            raise TypeError(f"embeddings={self.embeddings!r}; give a LutConfig or None")

    @classmethod
    def uniform(
        cls,
        bits: int = 4,
        group_size: int | Literal["column"] = 64,
        codebook: str | Sequence[float] = DEFAULT,
        *,
        scale_dtype: str = "bfloat16",
        double_quant: DoubleQuant | None = None,
        embedding_bits: int | None = None,
    ) -> Recipe:
        """One configuration for every weight matrix; embeddings, head, norms stay dense.

        Unless ``embedding_bits`` says otherwise, see :meth:`with_embeddings`.
        """
        scales: dict[str, Any] = {"scale_dtype": scale_dtype, "double_quant": double_quant}
        recipe = cls((Rule("*", LutConfig(bits, group_size, codebook, **scales)),))
        if embedding_bits is None:
            return recipe
        return recipe.with_embeddings(embedding_bits, group_size, **scales)

    @classmethod
    def higgs(cls, bits: float = 4, group_size: int = 512) -> Recipe:
        """:meth:`LutConfig.higgs` for every weight matrix; embeddings, head, norms stay dense."""
        return cls((Rule("*", LutConfig.higgs(bits, group_size)),))

    def with_embeddings(
        self,
        bits: int = 8,
        group_size: int | Literal["column"] = 64,
        *,
        scale_dtype: str = "bfloat16",
        double_quant: DoubleQuant | None = None,
    ) -> Recipe:
        """The same recipe, and embeddings and the output head at so many bits.

        Eight bits are integers, which cost next to nothing in quality.

        >>> recipe = Recipe.uniform(bits=4).with_embeddings(8)
        >>> recipe.rule_for("embed_tokens/embedding").config.bits
        8
        """
        scales: dict[str, Any] = {"scale_dtype": scale_dtype, "double_quant": double_quant}
        return dataclasses.replace(self, embeddings=LutConfig(bits, group_size, **scales))

    def rule_for(self, path: str) -> Rule | None:
        """The rule that decides about ``path``, None if it stays dense by default."""
        stays_dense = _matches(path, self.dense)
        for rule in self.rules:
            if rule.pattern == path:
                return rule
            if not stays_dense and fnmatch.fnmatchcase(path, rule.pattern):
                return rule
        return Rule("*", self.embeddings) if self.embeddings and self._is_embedding(path) else None

    def _is_embedding(self, path: str) -> bool:
        others = (pattern for pattern in self.dense if pattern not in EMBEDDINGS)
        return _matches(path, EMBEDDINGS) and not _matches(path, others)

    def check_matches(self, paths: Iterable[str]) -> None:
        """Raises if ``embeddings`` or a rule is about none of the paths, or cannot have a say.

        A rule has none where all that it reaches stays dense unless it is named in full, or is
        decided about by one earlier rule. One rule ``"*"`` may be for what others leave.

        Raises:
          ValueError: Names the rule's pattern, and the paths most like it or the earlier rule.
        """
        decided = {path: self.rule_for(path) for path in paths}
        paths = list(decided)
        if self.embeddings is not None and not any(map(self._is_embedding, paths)):
            raise ValueError(
                f"embeddings are to have {self.embeddings.bits} bits, but no parameter matches "
                f"{' or '.join(EMBEDDINGS)}; add a Rule with the full path of each"
            )
        if [rule.pattern for rule in self.rules].count("*") > 1:
            raise ValueError("the first rule '*' decides for all of them; leave out the others")
        for rule in self.rules:
            if rule.pattern in decided:
                matched = reached = [rule.pattern]
            else:
                matched = [path for path in paths if fnmatch.fnmatchcase(path, rule.pattern)]
                reached = [path for path in matched if not _matches(path, self.dense)]
            if not matched:
                similar = ", ".join(near_misses(rule.pattern, paths)) or "there are no weights"
                raise ValueError(
                    f"the rule {rule.pattern!r} matches no parameter; similar paths: {similar}"
                )
            if rule.pattern == "*":
                continue
            deciding = [chosen for path in reached if (chosen := decided[path]) is not None]
            # What a rule leaves dense may stay so anyway, unless `embeddings` is about it.
            taken = self.embeddings is not None and any(map(self._is_embedding, matched))
            if not reached and (rule.config is not None or taken):
                raise ValueError(
                    f"the rule {rule.pattern!r} reaches only what stays dense unless it is named "
                    f"in full, such as {matched[0]!r}; give a rule its full path"
                )
            if rule not in deciding and len(set(deciding)) == 1:
                raise ValueError(
                    f"the rule {rule.pattern!r} decides about nothing: "
                    f"{deciding[0].pattern!r}, which comes before it, matches all that it does; "
                    f"put it first"
                )

    def to_json(self) -> str:
        """The recipe as JSON, to read, edit and load again.

        >>> Recipe.from_json(Recipe.uniform(bits=3).to_json()) == Recipe.uniform(bits=3)
        True
        """
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """Reads what :meth:`to_json` wrote; all but ``rules`` may be left out.

        Raises:
          ValueError: If the text is no recipe; the message names the unknown or missing part.
        """
        try:
            data = json.loads(text)
            # An allocation plan is a recipe with an account of what it takes.
            fields = _known(Recipe, {key: data[key] for key in data if key != "plan"})
            rules = tuple(_rule(rule) for rule in fields.pop("rules"))
            if not rules:
                raise TypeError("it has no rules")
            if "dense" in fields:
                fields["dense"] = tuple(fields["dense"])
            if fields.get("embeddings") is not None:
                fields["embeddings"] = _config(fields["embeddings"])
            return cls(rules, **fields)
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"not a recipe: {error}; expected "
                '{"rules": [{"pattern": "*", "config": {"bits": 4, "group_size": 64}}]}'
            ) from error

    @classmethod
    def load(cls, path: str | os.PathLike) -> Recipe:
        """Reads a recipe from a JSON file.

        Raises:
          FileNotFoundError: If there is no such file.
          ValueError: If it is no recipe; the message names the file.
        """
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def check_recipe(recipe: Any) -> None:
    """Raises TypeError or ValueError, which say what to give, for what is no recipe with rules."""
    if not isinstance(recipe, Recipe):
        one = 'Recipe((Rule("*", config),))'
        fix = one if isinstance(recipe, LutConfig) else "Recipe.uniform(bits=4), or bits=4"
        raise TypeError(f"the recipe is a {type(recipe).__name__}; give a Recipe, such as {fix}")
    if not recipe.rules:
        raise ValueError("the recipe has no rules; give at least one")


def without_embeddings(recipe: Recipe | None) -> Recipe:
    """The same recipe for weights among which there are no embeddings, or none that count.

    Raises:
      TypeError: If it is no recipe.

    >>> without_embeddings(Recipe.uniform(4, embedding_bits=8)) == Recipe.uniform(4)
    True
    """
    recipe = Recipe.uniform() if recipe is None else recipe
    check_recipe(recipe)
    return dataclasses.replace(recipe, embeddings=None)


def without_missing_embeddings(recipe: Recipe, paths: Iterable[str]) -> Recipe:
    """The same recipe, for calibrations on a part of a model, which need not have embeddings.

    >>> recipe = Recipe.uniform(4, embedding_bits=8)
    >>> without_missing_embeddings(recipe, ["up/kernel"]) == Recipe.uniform(4)
    True
    """
    if any(_matches(path, EMBEDDINGS) for path in paths):
        return recipe
    return without_embeddings(recipe)


def _matches(path: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


def _rule(data: dict) -> Rule:
    fields = _known(Rule, data)
    config = fields.pop("config")
    if isinstance(fields.get("axis"), list):
        fields["axis"] = tuple(fields["axis"])
    return Rule(config=None if config is None else _config(config), **fields)


def _config(data: Any) -> LutConfig:
    if not isinstance(data, dict):
        raise TypeError(f'{data!r} is no configuration such as {{"bits": 4, "group_size": 64}}')
    fields = _known(LutConfig, data)
    if fields.get("double_quant") is not None:
        fields["double_quant"] = DoubleQuant(**_known(DoubleQuant, fields["double_quant"]))
    if isinstance(fields.get("codebook"), list):
        fields["codebook"] = tuple(fields["codebook"])
    return LutConfig(**fields)


def _known(cls: Any, data: dict) -> dict:
    names = [field.name for field in dataclasses.fields(cls)]
    for key in data:
        if key not in names:
            raise ValueError(
                f"not a recipe: unknown key {key!r} of a {cls.__name__}; use {', '.join(names)}"
            )
    return dict(data)
