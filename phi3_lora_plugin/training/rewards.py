"""Rewards that can be verified: `format`, `gsm8k`, and any function of a module by `python:module.function`.

Each becomes a function with TRL's signature (prompts, completions, completion_ids and the rows' columns as lists),
which gives a finite number, or None where it does not apply, for each completion. What a person's own function does
wrong is a sentence that names the function and the row.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi3_lora_plugin.chat.final_number import answer_of, final_number
from phi3_lora_plugin.chat.thoughts import CLOSE, OPEN
from phi3_lora_plugin.error import Phi3LoraError
from phi3_lora_plugin.wording import closest

if TYPE_CHECKING:
    from phi3_lora_plugin.recipe import Recipe

Reward = Callable[..., list[float | None]]

#: The key under which a row's place reaches the rewards made here; functions of others do not get it.
PLACE = "place of the row"
_PYTHON = "python:"


class RewardError(Phi3LoraError):
    """A reward that cannot be found, failed, or gave something else than one finite number for each completion."""


def rewards_of(names: Sequence[str], stops: Sequence[int], folders: Sequence[Path] = ()) -> list[Reward]:
    """A function for each reward of a recipe, in order.

    Args:
        stops: ids that end a turn.
        folders: where modules of `python:` are looked for, besides what is installed.

    Raises:
        RewardError: with everything that cannot be found.
    """
    made: list[Reward] = []
    problems: list[str] = []
    ours: dict[str, Reward] = {"format": _format(frozenset(stops)), "gsm8k": _gsm8k}
    for name in names:
        try:
            found = ours.get(name) or _checked(name, _found(name.removeprefix(_PYTHON), folders))
        except RewardError as error:
            problems.append(str(error))
            continue
        found.__name__ = name.removeprefix(_PYTHON)  # under which TRL logs it
        made.append(found)
    if problems:
        raise RewardError("\n".join(problems))
    return made


def folders_of(recipe: Recipe) -> list[Path]:
    """Where a recipe's own modules may be: where the command runs, and next to the recipe's file."""
    own = [] if recipe.source is None else [recipe.source.resolve().parent]
    return list(dict.fromkeys([Path.cwd(), *own]))


def texts(completions: Sequence[Any]) -> list[str]:
    """What completions say: texts as they are, or of messages the content of the last."""
    return [one if isinstance(one, str) else str(one[-1]["content"] or "") for one in completions]


def _format(stops: frozenset[int]) -> Reward:
    """One third each for a turn that ends on its stop token, thoughts that are closed, and an answer in its form.

    The form is that of the row's own `answer`: after `####`, in `\\boxed{}`, or any text that is not empty.
    """

    def reward(completions: Sequence[Any], completion_ids: Sequence[Any], **columns: Any) -> list[float | None]:
        answers = columns.get("answer") or [None] * len(completions)
        found: list[float | None] = []
        for text, ids, answer in zip(texts(completions), completion_ids, answers, strict=True):
            ended = bool(len(ids)) and ids[-1] in stops
            found.append((ended + _closed(text) + _in_form(text, answer)) / 3)
        return found

    return reward


def _closed(text: str) -> bool:
    """Whether thoughts are opened at most once, and closed; a prompt may have opened them."""
    opened, closed = text.count(OPEN), text.count(CLOSE)
    return opened <= closed <= 1 and (not opened or text.index(OPEN) < text.index(CLOSE))


def _in_form(text: str, answer: Any) -> bool:
    said = answer_of(text)
    if said is None or not said.strip():
        return False
    for mark in ("####", "\\boxed{"):
        if isinstance(answer, str) and mark in answer:
            return mark in said and bool(said.rpartition(mark)[2].strip(" \n}"))
    return True


def _gsm8k(completions: Sequence[Any], answer: Sequence[Any], **columns: Any) -> list[float | None]:
    """1 where the number that a completion ends on is exactly that of the row's answer, else 0."""
    found: list[float | None] = []
    for text, right in zip(texts(completions), answer, strict=True):
        number = final_number(text)
        found.append(float(number is not None and number == final_number(str(right))))
    return found


def _found(path: str, folders: Sequence[Path]) -> Any:
    """The function of a dotted path."""
    module, _, name = path.rpartition(".")
    try:
        with _importable(folders):
            inside = import_module(module)
    except ModuleNotFoundError as error:
        where = f"; looked in {', '.join(map(str, folders))} and among what is installed" if folders else ""
        raise RewardError(f"reward {_PYTHON}{path}: no module {error.name!r}{where}") from error
    except Exception as error:  # whatever a person's module raises while it is imported
        raise RewardError(f"reward {_PYTHON}{path}: {module} cannot be imported: {_said(error)}") from error
    found: Any = getattr(inside, name, None)
    if not callable(found):
        near = closest(name, [one for one in vars(inside) if not one.startswith("_")])
        guess = f"; did you mean {module}.{near}?" if near else ""
        raise RewardError(f"reward {_PYTHON}{path}: {module} has no function {name!r}{guess}")
    return found


@contextmanager
def _importable(folders: Sequence[Path]) -> Iterator[None]:
    """Modules in these folders can be imported, after everything that is installed."""
    added = [str(folder) for folder in folders if str(folder) not in sys.path]
    sys.path += added
    try:
        yield
    finally:
        for folder in added:
            sys.path.remove(folder)


def _checked(name: str, function: Callable[..., Any]) -> Reward:
    """The function of a person: what it raises and what it gives is looked at."""

    def reward(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        places = columns.pop(PLACE, None) or [f"completion {number}" for number in range(1, len(completions) + 1)]
        try:
            given = _called(function, prompts, completions, columns)
        except Exception as error:  # whatever it raises
            where = _failing(function, prompts, completions, columns)
            on = f" on {places[where]}" if where is not None else ""
            raise RewardError(f"reward {name} failed{on}: {_said(error)}") from error
        if hasattr(given, "tolist"):  # an array or a tensor
            given = given.tolist()
        if not isinstance(given, list | tuple):
            raise RewardError(
                f"reward {name} gave {type(given).__name__}; expected a list of {len(completions)} numbers, one for "
                "each completion"
            )
        if len(given) != len(completions):
            raise RewardError(
                f"reward {name} gave {len(given)} numbers for {len(completions)} completions (the first is to "
                f"{places[0]}); expected one for each"
            )
        return [_number(name, value, place) for value, place in zip(given, places, strict=True)]

    return reward


def _called(function: Callable[..., Any], prompts: Any, completions: Any, columns: Mapping[str, Any]) -> Any:
    given = function(prompts=prompts, completions=completions, **columns)
    return asyncio.run(given) if inspect.iscoroutine(given) else given


def _failing(function: Callable[..., Any], prompts: Any, completions: Any, columns: Mapping[str, Any]) -> int | None:
    """The first completion that the function fails on by itself; None if there is none."""
    for at in range(len(completions)):
        one = {
            key: value[at : at + 1] if isinstance(value, list) and len(value) == len(completions) else value
            for key, value in columns.items()
        }
        try:
            _called(function, prompts[at : at + 1], completions[at : at + 1], one)
        except Exception:  # whatever it raises
            return at
    return None


def _number(name: str, value: Any, place: str) -> float | None:
    if value is None:
        return None  # does not apply, as TRL has it
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise RewardError(f"reward {name} gave {value!r} on {place}; expected a number or None") from None
    if not math.isfinite(number):
        raise RewardError(f"reward {name} gave {number} on {place}; expected a finite number")
    return number


def _said(error: BaseException) -> str:
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
