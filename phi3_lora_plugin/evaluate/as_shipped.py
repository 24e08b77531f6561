"""What you measured is what you ship: the rows and questions of an evaluation in the runtime that will serve them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi3_lora_plugin.chat.encode import IGNORE
from phi3_lora_plugin.error import Phi3LoraError
from phi3_lora_plugin.evaluate.answers import ended, score
from phi3_lora_plugin.evaluate.figures import Figures
from phi3_lora_plugin.evaluate.token_scores import perplexity
from phi3_lora_plugin.export.export import unsaved
from phi3_lora_plugin.export.exporter import Wanted

if TYPE_CHECKING:
    from phi3_lora_plugin.evaluate.answers import Question
    from phi3_lora_plugin.evaluate.figures import Figures
    from phi3_lora_plugin.export.exporter import Exporter, Runtime


class ShippedError(Phi3LoraError):
    """A form that cannot be evaluated as it would be shipped; says why."""


def read_form(text: str) -> tuple[str, str]:
    """(target, form) of `TARGET` or `TARGET:FORM`, as `llama.cpp:q4_k_m`; form is empty for the unquantised model.

    Raises:
        ShippedError: no target.
    """
    target, _, form = text.partition(":")
    if not target:
        raise ShippedError(f"--as {text!r}: expected TARGET or TARGET:FORM, for example llama.cpp:q4_k_m")
    return target, form.lower()


def measure_shipped(
    adapter: Path,
    base: str,
    exporter: Exporter,
    text: str,
    rows: Sequence[Mapping[str, Sequence[int]]],
    asked: Sequence[Question],
    measures: Sequence[str],
    max_new_tokens: int,
) -> tuple[Figures, list[str]]:
    """(figures, answers) of the merged model in the runtime and form that `text` names, made for this and removed.

    Loss and accuracy are over the same trained tokens as those of base and adapter, one row at a time.

    Raises:
        ShippedError, ExportError: the target has no such form, or shows no probabilities.
    """
    _, form = read_form(text)
    wanted = Wanted(merged=True, quantize=(form,) if form else ())
    with unsaved(adapter, exporter, wanted, base) as (shipped, adapted):
        if not shipped.variants:
            raise ShippedError(
                f"--as {text}: cannot be opened here: {shipped.unproven or 'the target gives no reason'}"
            )
        stops = set(adapted.stops())
        with shipped.variants[-1].open() as runtime:
            losses, weighed, right = _scores(runtime, rows)
            said = [runtime.answer(question.ids, max_new_tokens) for question in asked]
        tokenizer = adapted.tokenizer
    made = [ended(ids, stops, tokenizer) for ids in said]
    answers, texts = score(made, asked, measures), [one.text for one in made]
    if not losses:
        return Figures(answers=answers), texts
    count = len(losses)
    return Figures(math.fsum(weighed) / count, perplexity(math.fsum(losses) / count), right / count, answers), texts


def _scores(runtime: Runtime, rows: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float], int]:
    """(negative log-probability of each trained token, the same times its weight, how many were the likeliest)."""
    losses: list[float] = []
    weighed: list[float] = []
    right = 0
    for row in rows:
        ids, labels = list(row["input_ids"]), list(row["labels"])
        trained = [place for place in range(1, len(ids)) if labels[place] != IGNORE]
        if not trained:
            continue
        found, likeliest = runtime.log_probabilities(ids, trained[0])
        for place in trained:
            losses.append(-found[place - trained[0]])
            weighed.append(losses[-1] * (row["weights"][place] if row.get("weights") else 1.0))
            right += bool(likeliest[place - trained[0]])
    return losses, weighed, right


def sentence(text: str, adapter: Figures, shipped: Figures) -> str:
    """What the form costs, in one sentence; also where it costs nothing."""
    parts: list[str] = []
    pairs: list[tuple[str, Any, Any]] = [
        ("loss", adapter.loss, shipped.loss), ("token accuracy", adapter.token_accuracy, shipped.token_accuracy)
    ]  # fmt: skip
    pairs += [(name, adapter.answers.get(name), value) for name, value in shipped.answers.items()]
    for name, before, after in pairs:
        if before is not None and after is not None:
            parts.append(f"{name} {after - before:+.2g}")
    return f"shipped as {text}, against the adapter: {', '.join(parts)}"
