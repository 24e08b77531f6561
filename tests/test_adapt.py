"""One source -> conversations: which format it is read as and why, and what each row that does not fit is told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from phi3_lora_plugin.chat.adapt import Reading, conversations
from phi3_lora_plugin.chat.formats import ADAPTERS
from phi3_lora_plugin.chat.readers import Place, Problem, Row, SourceError
from phi3_lora_plugin.chat.sources import Source
from phi3_lora_plugin.recipe.sections import ChatSection

PAIR = {"prompt": "q", "completion": "a"}
READ = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
CHAT = {"messages": READ}


def read(
    rows: Sequence[Any],
    wanted: str = "auto",
    columns: Mapping[str, str] | None = None,
    adapters: Mapping[str, Any] | None = None,
) -> tuple[Reading, list[Any]]:
    places = [Place("f", "line", number) for number in range(1, len(rows) + 1)]
    items = [Row(row, p) if isinstance(row, dict) else Problem(p, row) for p, row in zip(places, rows, strict=True)]
    reading, source = Reading("f"), Source("f", lambda: iter(items))
    return reading, list(
        conversations(source, reading, ChatSection(format=wanted, columns=dict(columns or {})), adapters or {})
    )


def refused(*given: Any, **more: Any) -> list[str]:
    with pytest.raises(SourceError) as caught:
        read(*given, **more)
    return caught.value.problems


def test_the_first_row_that_fits_decides_and_bad_ones_before_it_are_told() -> None:
    reading, made = read(["is not JSON", {"note": "x"}, CHAT, CHAT])
    assert (reading.format, reading.because, reading.rows) == ("messages", "by its column messages", 4)
    bad, foreign, one, _ = made
    assert str(bad) == "f:1: is not JSON" and "has no column 'messages', only note" in str(foreign)
    assert one == (Place("f", "line", 3), READ)


def test_a_row_of_another_format_is_told_what_it_looks_like() -> None:
    _, made = read([CHAT, PAIR])
    assert str(made[1]) == "f:2: has no column 'messages', only prompt, completion; it looks like prompt_completion, " \
        "but one source has one format"  # fmt: skip
    _, made = read([CHAT, PAIR], "messages")
    assert "looks like" not in str(made[1])


def test_rows_are_adapted_as_they_are_asked_for() -> None:
    asked = []

    def rows() -> Any:
        for number in range(1, 1001):
            asked.append(number)
            yield Row(PAIR, Place("f", "line", number))

    made = conversations(Source("f", rows), Reading("f"), ChatSection(), {})
    next(made)
    assert len(asked) == 100  # as many as decide the format


def test_no_format_and_two_formats() -> None:
    (none,) = refused([{"frage": "q", "antwort": "a"}])
    assert none.startswith("f:1: fits no format; its columns are frage, antwort") and "data.columns=" in none
    (two,) = refused([CHAT | PAIR])
    assert "fits messages (messages) and prompt_completion (prompt, completion)" in two
    assert refused([]) == ["f: has no rows"]
    reading, made = read(["is not JSON"] * 3)
    assert [str(one) for one in made] == [f"f:{n}: is not JSON" for n in (1, 2, 3)] and reading.format == ""


def test_columns_that_the_recipe_names_decide_between_two_formats() -> None:
    row = CHAT | {"question": "q", "answer": "a"}
    reading, made = read([row], columns={"prompt": "question", "completion": "answer"})
    assert reading.format == "prompt_completion" and made == [(Place("f", "line", 1), READ)]
    assert reading.because == "by its columns prompt (from question), completion (from answer)"
    assert reading.unread == {"messages": 1}


def test_an_optional_column_may_be_missing_in_rows_but_not_in_all() -> None:
    columns = {"prompt": "q", "completion": "a", "system": "s"}
    reading, made = read([{"q": "q", "a": "a"}, {"q": "q", "a": "a", "s": "brief"}], columns=columns)
    assert [len(messages) for _, messages in made] == [2, 3] and reading.rows == 2
    (told,) = refused([{"q": "q", "a": "a"}], columns=columns)
    assert told == "data.columns.system: no row of f has a column 's', only q, a"
    (told,) = refused([{"q": "q", "a": "a"}] * 200, columns=columns)
    assert "none of the first 100 rows of f" in told


def test_all_wrong_columns_are_told_at_once() -> None:
    wrong = {"promt": "q", "completion": "answr", "temperature": "t"}
    told = refused([{"q": "q", "answer": "a"}], columns=wrong)
    assert len(told) == 3 and "did you mean 'prompt'" in told[0] and "did you mean 'answer'" in told[1]


def test_columns_lead_into_nested_values() -> None:
    row = {"task": {"text": "q"}, "instances": [{"output": "a"}]}
    _, made = read([row], columns={"prompt": "task.text", "completion": "instances.0.output"})
    assert made == [(Place("f", "line", 1), READ)]


STRANGE: dict[str, tuple[Any, str]] = {
    "another error": (lambda row: row["nothing"], "KeyError: 'nothing'"),
    "no list": (lambda row: "text", "gave text ('text'); expected a list of messages"),
    "no messages": (lambda row: [1], "message 1 is a number (1)"),
    "an unknown role": (lambda row: [{"role": "robot", "content": "x"}], "unknown role"),
    "no answer": (lambda row: [{"role": "user", "content": "x"}], "no turn of the assistant"),
    "text that is none": (lambda row: [READ[0], {"role": "assistant", "content": 5}], "is a number (5)"),
}


@pytest.mark.parametrize("kind", STRANGE)
def test_what_a_strangers_adapter_does_wrong_is_about_its_row(kind: str) -> None:
    adapt, said = STRANGE[kind]
    _, made = read([{"x": 1}, {"x": 2}], "mine", adapters={"mine": adapt})
    assert [one.place.number for one in made] == [1, 2] and all(said in one.text for one in made)


def test_a_strangers_adapter_reads_renamed_columns_and_an_unknown_name_lists_all() -> None:
    def adapt(row: Mapping[str, Any]) -> list[dict[str, str]]:
        return [READ[0], {"role": "assistant", "content": row["reply"]}]

    reading, made = read([{"r": "a"}], "mine", {"reply": "r"}, {"mine": adapt})
    assert made == [(Place("f", "line", 1), READ)] and reading.because == "as data.format says"
    (told,) = refused([{"r": "a"}], "mime", None, {"mine": adapt})
    assert f"is not one of auto, {', '.join(sorted([*ADAPTERS, 'mine']))}; did you mean 'mine'?" in told
