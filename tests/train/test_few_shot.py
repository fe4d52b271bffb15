"""Tasks as conversations: what is learnt, what is asked."""

import dataclasses

import numpy as np
import pytest

from lutjax.io import Tokenizer
from tests.train.characters import CHATML, characters
from train.examples import NOTHING
from train.few_shot import Format, questions, variant
from train.tasks import Pair, Query, Task

WORDS = Task("words", (Pair("ab", "ba"), Pair("cd", "dc"), Pair("e", "e")), (Query("fg", "gf"),))
GRIDS = Task(
    "grids",
    (Pair(((1, 2),), ((2, 1),)), Pair(((3, 4),), ((4, 3),))),
    (Query(((5, 6),), None), Query(((7,), (8,)), None)),
)


def learnt(tokenizer: Tokenizer, example) -> str:
    """What is predicted, with a dot for what is not."""
    places = np.append(NOTHING, example.targets[:-1])
    assert all(places[places != NOTHING] == example.tokens[places != NOTHING])
    text = tokenizer.decode(example.tokens.tolist(), skip_special_tokens=False)
    return "".join(c if p != NOTHING else "." for c, p in zip(text, places, strict=True))


def test_every_output_but_the_first_is_learnt_with_its_end():
    tokenizer = characters()
    example = Format.of(tokenizer).example(WORDS.demonstrations)
    assert tokenizer.decode(example.tokens.tolist()) == "<u>ab$<a>ba$<u>cd$<a>dc$<u>e$<a>e$"
    assert learnt(tokenizer, example) == "." * 21 + "dc$" + "." * 8 + "e$"


def test_a_prompt_is_what_an_output_is_learnt_after():
    format = Format.of(characters())
    prompt = format.prompt(WORDS.demonstrations[:2], "e")
    example = format.example(WORDS.demonstrations)
    assert prompt == example.tokens[: len(prompt)].tolist()
    assert example.targets[len(prompt) - 1] != NOTHING
    assert (example.targets[len(prompt) - 9 : len(prompt) - 1] == NOTHING).all()


def test_models_without_a_chat_template_get_a_plain_one():
    tokenizer = characters(None)
    format = Format.of(tokenizer)
    example = format.example(WORDS.demonstrations[:2])
    text = tokenizer.decode(example.tokens.tolist())
    assert text == "Input:\nab\nOutput:\nba$\n\nInput:\ncd\nOutput:\ndc$\n\n"
    assert learnt(tokenizer, example) == "." * (len(text) - 5) + "dc$\n\n"
    prompt = tokenizer.decode(format.prompt(WORDS.demonstrations[:1], "cd"))
    assert text.startswith(prompt)
    assert prompt.endswith("Output:\n")


def test_each_cell_is_a_token():
    assert Format.of(characters()).text(((1, 2), (3, 4))) == "12\n34"
    assert Format.of(characters(digits=3)).text(((1, 2), (3, 4))) == "1 2\n3 4"


def test_answers_end_where_the_template_ends_them():
    """Not every model has the end of a turn among the tokens that end a text."""
    tokenizer = characters(CHATML.replace("'$'", "'#'"))
    format = Format.of(tokenizer)
    assert format.ends == (*tokenizer.encode("#"), *tokenizer.encode("$"))
    example = format.example(WORDS.demonstrations[:2])
    assert learnt(tokenizer, example).endswith("dc#")


@pytest.mark.parametrize(
    "template",
    [
        None,
        CHATML.replace("m.content", "('' if loop.last else '?') + m.content"),  # as Qwen3 thinks
        CHATML.replace("'$'", "'\n'"),  # grids have line breaks, too
        "{{ raise_exception('no') }}",
    ],
)
def test_templates_that_cannot_be_used_make_room_for_a_plain_one(template):
    format = Format.of(characters(template))
    text = format.tokenizer.decode(format.example(WORDS.demonstrations[:2]).tokens.tolist())
    assert text == "Input:\nab\nOutput:\nba$\n\nInput:\ncd\nOutput:\ndc$\n\n"
    assert format.ends[0] == characters().eos_ids[0]
    without = dataclasses.replace(characters(template), eos_token=None)
    with pytest.raises(ValueError, match="answers have no end; add an eos_token"):
        Format.of(without)


def test_variants_are_orders_of_text_and_changed_grids():
    found = {variant(WORDS, np.random.default_rng(i)) for i in range(40)}
    assert len(found) == 6  # the orders of three
    assert all(sorted(pairs) == sorted(WORDS.demonstrations) for pairs in found)
    grids = {variant(GRIDS, np.random.default_rng(i)) for i in range(20)}
    assert len(grids) == 20
    for first, second in grids:  # the rule is kept: the two cells swapped
        for pair in (first, second):
            assert np.array_equal(np.flip(np.array(pair.input)), np.array(pair.output))
    assert variant(GRIDS, np.random.default_rng(3)) == variant(GRIDS, np.random.default_rng(3))


def test_questions():
    format, rng = Format.of(characters()), np.random.default_rng(0)
    asked = questions(GRIDS, format, rng, orders=2, symmetries=True)
    assert len(asked) == 8 * 2 * 2
    assert [q.query for q in asked[:4]] == [0, 0, 1, 1]
    assert asked[0].prompt == format.prompt(GRIDS.demonstrations, GRIDS.queries[0].input)
    for question in asked:
        text = format.tokenizer.decode(question.prompt)
        last = text[: -len("$<a>")].rsplit("<u>", 1)[1]
        grid = tuple(tuple(map(int, line)) for line in last.splitlines())
        assert question.transformation.invert(grid) == GRIDS.queries[question.query].input
    assert len(questions(GRIDS, format, rng, orders=1, symmetries=False)) == 2
    assert len(questions(WORDS, format, rng, orders=3, symmetries=True)) == 3
    every = questions(WORDS, format, rng, orders=9, symmetries=True)
    assert len({tuple(question.prompt) for question in every}) == len(every) == 6
    assert len(questions(GRIDS, format, rng, orders=9, symmetries=False)) == 2 * 2
