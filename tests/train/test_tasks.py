"""Few-shot tasks: reading, transformations of grids, votes."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.tasks import Pair, Query, Task, from_text, read_tasks, to_text
from train.transformations import SYMMETRIES, recolouring
from train.vote import vote

GRIDS = st.integers(1, 5).flatmap(
    lambda width: st.lists(
        st.lists(st.integers(0, 9), min_size=width, max_size=width).map(tuple), min_size=1
    ).map(tuple)
)
RECORD = {
    "train": [{"input": [[1, 2]], "output": [[2, 1]]}, {"input": [[3, 4]], "output": [[4, 3]]}],
    "test": [{"input": [[5, 6]], "output": [[6, 5]]}, {"input": [[7, 8]]}],
}
TASK = Task(
    "flip",
    (Pair(((1, 2),), ((2, 1),)), Pair(((3, 4),), ((4, 3),))),
    (Query(((5, 6),), ((6, 5),)), Query(((7, 8),), None)),
)


def test_a_directory_and_one_file_of_many_tasks_give_the_same(tmp_path):
    words = {"train": [{"input": "a", "output": "b "}] * 2, "test": [{"input": "c"}]}
    (tmp_path / "tasks").mkdir()
    for name, record in {"words": words, "flip": RECORD}.items():
        (tmp_path / "tasks" / f"{name}.json").write_text(json.dumps(record))
    (tmp_path / "all.json").write_text(json.dumps({"words": words, "flip": RECORD}))
    found = read_tasks(tmp_path / "tasks")
    assert found == read_tasks(tmp_path / "all.json")
    assert found == [TASK, Task("words", (Pair("a", "b"),) * 2, (Query("c", None),))]
    assert [task.has_grids for task in found] == [True, False]
    assert len({task.fingerprint for task in found}) == 2
    changed = found[0]._replace(queries=TASK.queries[:1])
    assert found[0].fingerprint == TASK.fingerprint != changed.fingerprint
    assert read_tasks(tmp_path / "tasks" / "flip.json") == [TASK]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([RECORD], "holds a list; it must map names to tasks"),
        ({}, "has no task"),
        ({"t": {"train": RECORD["train"]}}, "task 't' of .* needs the lists 'train' and 'test'"),
        ({"t": {"train": 3, "test": 4}}, "needs the lists"),
        ({"t": RECORD | {"train": RECORD["train"][:1]}}, "two or more pairs in 'train'"),
        ({"t": RECORD | {"train": RECORD["test"]}}, "all with an output"),
        ({"t": RECORD | {"test": []}}, "nothing to answer"),
        ({"t": RECORD | {"test": [{"output": "a"}]}}, "'test': a pair is .* needs an 'input'"),
        ({"t": RECORD | {"test": [{"input": [[1, 2], [3]]}]}}, "neither text nor a rectangle"),
        ({"t": RECORD | {"test": [{"input": [[10]]}]}}, "neither text nor a rectangle"),
        ({"t": RECORD | {"test": [{"input": [[True]]}]}}, "neither text nor a rectangle"),
        ({"t": RECORD | {"test": [{"input": " "}]}}, "neither text nor a rectangle"),
        (
            {"t": RECORD | {"train": [*RECORD["train"], {"input": "a", "output": "b"}]}},
            "both strings and grids",
        ),
        ({"t": RECORD | {"test": [{"input": [[1]], "output": "b"}]}}, "both strings and grids"),
    ],
)
def test_what_is_no_task_is_named(tmp_path, record, message):
    file = tmp_path / "tasks.json"
    file.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=message) as error:
        read_tasks(file)
    assert str(file) in str(error.value)


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_tasks(tmp_path / "missing.json")
    with pytest.raises(ValueError, match="has no task"):
        read_tasks(tmp_path)
    twice = tmp_path / "twice.json"
    twice.write_text('{"a": 1, "b": 2, "a": 3}')
    with pytest.raises(ValueError, match=r"twice\.json has 'a' twice"):
        read_tasks(twice)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match=r"broken\.json is not JSON"):
        read_tasks(tmp_path)


@given(GRIDS, st.sampled_from(["", " "]))
def test_grids_survive_text(grid, separator):
    assert from_text(to_text(grid, separator), grid=True) == grid


@pytest.mark.parametrize("text", ["", "12\n3", "12\n\n34", "a", "1,2", "²"])
def test_text_that_is_no_grid(text):
    assert from_text(text, grid=True) is None
    assert from_text(text, grid=False) == (text or None)


@given(GRIDS)
def test_transformations_are_undone(grid):
    for transformation in (*SYMMETRIES, recolouring(np.random.default_rng(len(grid)))):
        assert transformation.invert(transformation.apply(grid)) == grid


def test_the_symmetries_are_those_of_the_square():
    grid = ((1, 2, 3), (4, 5, 6))
    array = np.array(grid)
    expected = [np.rot90(a, turns) for a in (array, array[:, ::-1]) for turns in range(4)]
    assert [t.apply(grid) for t in SYMMETRIES] == [tuple(map(tuple, a.tolist())) for a in expected]
    assert len({t.apply(grid) for t in SYMMETRIES}) == 8
    assert len({t.name for t in SYMMETRIES}) == 8
    assert SYMMETRIES[0].name == "identity"
    assert SYMMETRIES[0].apply(grid) == grid


def test_all_grids_of_a_task_are_changed_alike():
    rotated = SYMMETRIES[1].task(TASK)
    assert rotated.demonstrations[0] == Pair(((2,), (1,)), ((1,), (2,)))
    assert rotated.queries == (Query(((6,), (5,)), ((5,), (6,))), Query(((8,), (7,)), None))
    recoloured = recolouring(np.random.default_rng(0))
    assert recoloured.apply(((0,),)) == ((0,),)
    assert sorted(recoloured.apply((tuple(range(10)),))[0]) == list(range(10))


def test_votes():
    # Every transformation has one voice for an answer, however often it gave it.
    ballots = [("a", "x"), ("a", "x"), ("a", "x"), ("b", "y"), ("c", "y")]
    assert vote(ballots) == ["y", "x"]
    # Of equally many transformations, the answer given more often; then the first.
    assert vote([("a", "x"), ("b", "y"), ("b", "y")]) == ["y", "x"]
    assert vote([("a", "x"), ("b", "y")]) == ["x", "y"]
    # No more than three of each.
    assert vote([("a", v) for v in "ppqqrrs"]) == ["p", "q", "r"]
    assert vote([]) == []
