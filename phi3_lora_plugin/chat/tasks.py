"""Rows to answer, for training by rewards -> the messages to answer, and what each row tells the rewards.

Read are a prompt as text or messages (`prompt`, `question`, `problem`, `messages`, `conversations`, `instruction` with
`input`, `query`), and a right answer in a column of its own (`answer`, `solution`, `ground_truth`, ...), or as what a
chat ends with. Every other column reaches the rewards under its own name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from phi3_lora_plugin.chat.adapt import Reading, each
from phi3_lora_plugin.chat.columns import rename
from phi3_lora_plugin.chat.content import read_text
from phi3_lora_plugin.chat.encode import IGNORE, EncodeError, Policy, encode_prompts
from phi3_lora_plugin.chat.final_number import final_number
from phi3_lora_plugin.chat.marks import MEDIA
from phi3_lora_plugin.chat.readers import Place, Problem
from phi3_lora_plugin.chat.row_error import RowError, named, not_too_deep, shown
from phi3_lora_plugin.chat.sources import Source
from phi3_lora_plugin.chat.turns import Message, complete, read_turns
from phi3_lora_plugin.recipe.sections import ChatSection

_PROMPTS = ("prompt", "question", "problem", "messages", "conversations", "conversation", "instruction", "query")
#: Names under which data sets keep the right answer, the clearer ones first.
ANSWERS = ("answer", "solution", "ground_truth", "final_answer", "target", "completion", "output", "response")
#: What TRL itself calls rewards with.
_TAKEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments")
_OF_ROW = {"system", "system_prompt", "tools", "functions"}


@dataclass(frozen=True)
class Task:
    """Messages whose next turn is the assistant's, and the columns for the rewards, with `answer` where there is one.

    Columns hold what JSON holds.
    """

    messages: list[Message]
    columns: dict[str, Any]

    def to_json(self) -> str:
        """One line; `from_json` reads it."""
        return json.dumps({"messages": self.messages, "columns": self.columns}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Task:
        """The task that `to_json` wrote."""
        return cls(**json.loads(text))


def columns_of(tasks: Sequence[Task]) -> dict[str, list[Any]]:
    """Every column that any of the tasks has, with a value for each; None where a task has none."""
    names = dict.fromkeys(name for one in tasks for name in one.columns)
    return {name: [one.columns.get(name) for one in tasks] for name in names}


def read_tasks(
    source: Source, reading: Reading, data: ChatSection, numbers: bool
) -> Iterator[tuple[Place, Task] | Problem]:
    """The task of each row, or what is wrong with it; with `numbers`, an answer without one is wrong.

    Raises `SourceError` for a source without rows.
    """
    reading.format, reading.because = "prompts", "as the recipe's reward says"

    def read(values: Mapping[str, Any]) -> Task:
        made = task(rename(values, data.columns, data.ignore))
        if numbers:
            _check_number(made)
        return made

    return each(source, reading, read)


def _check_number(made: Task) -> None:
    if "answer" not in made.columns:
        raise RowError(
            f"has no answer, which reward gsm8k compares with: its columns are {named(made.columns)}; name it with "
            "data.columns='{answer: NAME}'"
        )
    if final_number(str(made.columns["answer"])) is None:
        raise RowError(f"answer is {shown(made.columns['answer'])}, which has no number for reward gsm8k")


@not_too_deep()
def task(row: Mapping[str, Any]) -> Task:
    """Read one row.

    Raises:
        RowError: what is wrong with it, in one sentence.
    """
    prompts = [name for name in _PROMPTS if row.get(name) not in (None, "", [])]
    if not prompts:
        raise RowError(f"has no prompt, only {named(row)}; name its column with data.columns='{{prompt: NAME}}'")
    if len(prompts) > 1:
        raise RowError(f"has its prompt twice, as {' and '.join(prompts)}; keep one, or write data.ignore")
    if media := [name for name in row if isinstance(name, str) and name.lower() in MEDIA and row[name]]:
        raise RowError(f"{media[0]!r} holds pictures or sound, and text alone would be answered")
    turns, said = _turns(row, prompts[0])
    given = next((name for name in ANSWERS if row.get(name) is not None), None)
    answer = said if given is None else row[given]
    # The order of turns is checked with an answer after them, as the model will write it.
    whole = complete([*turns, {"role": "assistant", "content": "-"}], row)
    used = {prompts[0]} | _OF_ROW | ({"input"} if "instruction" in prompts else set())
    others = {str(name): value for name, value in row.items() if name not in used}
    if taken := sorted(set(others) & set(_TAKEN)):
        raise RowError(
            f"has a column {taken[0]!r}, a name that rewards are called with; rename it or write data.ignore"
        )
    columns = others | ({} if answer is None else {"answer": answer})
    try:
        columns = json.loads(json.dumps(columns, default=str))
    except (TypeError, ValueError) as error:
        raise RowError(f"has a column that cannot be given to rewards: {error}") from None
    return Task(whole[:-1], columns)


def _turns(row: Mapping[str, Any], name: str) -> tuple[list[Message], str | None]:
    """The turns to answer, and what the row itself answers."""
    value = row[name]
    if isinstance(value, str) and name == "instruction" and isinstance(row.get("input"), str) and row["input"]:
        value = f"{value}\n{row['input']}"
    if isinstance(value, str):
        return list(read_turns([{"role": "user", "content": read_text(value, name)}])), None
    if not isinstance(value, list | tuple):
        raise RowError(f"{name} is {shown(value)}; expected text or a list of messages")
    turns = [{key: part for key, part in turn.items() if key not in ("train", "weight", "spans")}
             for turn in read_turns(value, f"message of {name}")]  # fmt: skip
    if turns[-1]["role"] == "assistant":
        *turns, last = turns
        if not turns or turns[-1]["role"] == "assistant":
            raise RowError(f"{name} has nothing to answer before its last turn")
        return turns, last["content"]
    return turns, None


def encode_tasks(
    tasks: Sequence[Task], tokenizer: Any, max_length: int | None, policy: Policy, template: str | None
) -> list[dict[str, Any] | EncodeError]:
    """`input_ids` to answer from, `labels` of which nothing is trained, and the `task` itself as JSON.

    A prompt longer than `max_length` is an `EncodeError`: one that is cut asks for something else.
    """
    encoded = encode_prompts([one.messages for one in tasks], tokenizer, policy, template)
    rows: list[dict[str, Any] | EncodeError] = []
    for one, ids in zip(tasks, encoded, strict=True):
        if isinstance(ids, EncodeError):
            rows.append(ids)
        elif max_length is not None and len(ids) > max_length:
            rows.append(EncodeError("truncated", f"its prompt has {len(ids)} tokens; at most {max_length} leave room "
                                                 "for grpo.max_completion_length"))  # fmt: skip
        else:
            rows.append({"input_ids": ids, "labels": [IGNORE] * len(ids), "truncated": False, "task": one.to_json()})
    return rows
