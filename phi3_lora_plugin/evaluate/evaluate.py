"""An evaluation, read top to bottom: rows -> the base's figures -> the adapter on it -> the same figures again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi3_lora_plugin.evaluate.answer_scores import score_answers
from phi3_lora_plugin.evaluate.answers import answer, questions, score
from phi3_lora_plugin.evaluate.as_shipped import ShippedError, measure_shipped, read_form, sentence
from phi3_lora_plugin.evaluate.figures import Figures
from phi3_lora_plugin.evaluate.generate import stop_ids, with_adapter
from phi3_lora_plugin.evaluate.lm_eval_tasks import require_lm_eval, run_tasks
from phi3_lora_plugin.evaluate.rows import evaluation_rows
from phi3_lora_plugin.evaluate.target import Target
from phi3_lora_plugin.evaluate.task_scores import task_scores
from phi3_lora_plugin.evaluate.token_scores import token_scores
from phi3_lora_plugin.lora_files.peft_files import loadable
from phi3_lora_plugin.model.families import row_limit
from phi3_lora_plugin.model.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from rich.console import Console

    from phi3_lora_plugin.evaluate.answers import Question
    from phi3_lora_plugin.plugins.discovery import Plugins
    from phi3_lora_plugin.recipe import Recipe


@dataclass(frozen=True)
class Wanted:
    """What to measure, and on what.

    Attributes:
        data: rows to evaluate on; None: those that the recipe holds out.
        rows: at most so many of them, from the top.
        answers: generate answers to so many of them; 0: none.
        max_new_tokens: where an answer that does not end is cut off.
        gsm8k: compare the final numbers of answers too.
        tasks: of the lm-evaluation-harness, with `task_options` as `run_tasks` takes them.
        batch_size: rows, or questions, in one pass.
        as_shipped: a runtime and a form in which to measure the merged model too, as `llama.cpp:q4_k_m`.
    """

    data: str | None = None
    rows: int | None = None
    answers: int = 20
    max_new_tokens: int = 256
    gsm8k: bool = False
    tasks: tuple[str, ...] = ()
    task_options: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int = 8
    as_shipped: str | None = None


@dataclass(frozen=True)
class Asked:
    """One question, what the data says, and what the models said."""

    prompt: str
    expected: str
    base: str
    adapter: str | None
    shipped: str | None = None


@dataclass(frozen=True)
class Evaluation:
    """Base against adapter; `adapter_figures` is None where there was no adapter.

    `shipped_figures` are those of the merged model in the runtime and form that `shipped` names, None if not asked for.

    `rows` and `tokens` (trained ones) are what loss, perplexity and accuracy are about; `asked` has each question.
    """

    recipe: str
    base: str
    quantize: str
    adapter: str | None
    data: tuple[str, ...]
    rows: int
    tokens: int
    base_figures: Figures
    adapter_figures: Figures | None
    asked: tuple[Asked, ...] = ()
    notes: tuple[str, ...] = ()
    shipped: str | None = None
    shipped_figures: Figures | None = None

    def to_json(self) -> str:
        """One line of JSON with every field but the text of the answers."""
        value = asdict(self)
        return json.dumps(value | {"asked": len(self.asked)}, ensure_ascii=False)


def evaluate(target: Target, wanted: Wanted, plugins: Plugins, console: Console | None = None) -> Evaluation:
    """Measure the base of a target, then the adapter on it, on the same rows and questions.

    The base is measured before the adapter is put on: some ways to start LoRA change the base that they are put on.

    Raises:
        DataError, ModelError, AdapterError, AnswerError, HarnessError: wrong input, before anything is measured.
    """
    from rich.console import Console

    say = console or Console(quiet=True)
    recipe, adapter, notes = target.recipe, target.adapter, [*target.notes]
    harness = require_lm_eval(wanted.tasks, wanted.task_options) if wanted.tasks else None
    exporter = None
    if wanted.as_shipped:
        exporter = plugins.pick("exporters", read_form(wanted.as_shipped)[0])
        if adapter is None:
            raise ShippedError(f"--as {wanted.as_shipped}: there is no adapter to ship")
        if recipe.reward:
            raise ShippedError(f"--as {wanted.as_shipped}: compares losses, and {recipe.name} is measured by rewards")
    if adapter is not None:
        with loadable(adapter):  # damage is reported before anything is measured
            pass
    model, tokenizer = plugins.load_model(recipe)
    if adapter is not None and (adapter / "tokenizer.json").is_file():
        tokenizer = load_tokenizer(adapter)
    formats = plugins.adapters(recipe.data.format)
    longest = row_limit(recipe.data.max_length, model.config.to_dict())

    rows: Any = ()
    asked: list[Question] = []
    names: tuple[str, ...] = ()
    if _has_rows(target, wanted):
        read = evaluation_rows(recipe, tokenizer, formats, longest, wanted.data, wanted.rows)
        rows, names = read.rows, tuple(source.name for source in read.report.sources)
        for what in ("skipped", "dropped", "truncated"):
            if some := getattr(read.report, what):
                notes.append(f"{len(some):,} rows {what}, as {some[0].place}: {some[0].why}")
        turns = rows
        if wanted.answers and recipe.data.train_on == "all":  # what the user says is not for the model to answer
            last = recipe.model_copy(update={"data": recipe.data.model_copy(update={"train_on": "last_turn"})})
            last._provenance.update(recipe.provenance)
            turns = evaluation_rows(last, tokenizer, formats, longest, wanted.data, wanted.rows).rows
        asked = questions(turns, tokenizer, stop_ids(model, tokenizer), wanted.answers)
        if wanted.answers and not asked:
            notes.append(f"no row has a whole answer within {longest:,} tokens, so no answers are generated")
    measures = (*(() if recipe.reward else ("exact", "rouge_l")), *(["gsm8k"] if wanted.gsm8k else []))
    if asked and measures:  # what cannot be scored is reported before anything is measured
        score_answers([""] * len(asked), [question.expected for question in asked], measures)
    for note in notes:
        say.print(f"note: {note}", markup=False)

    say.print(f"measuring the base {recipe.model.path}", markup=False)
    base, tokens, said = _measure(recipe, model, tokenizer, rows, asked, measures, wanted, harness)
    ours, also = None, None
    if adapter is not None:
        model = with_adapter(model, adapter)
        say.print(f"measuring the adapter {adapter}", markup=False)
        ours, _, also = _measure(recipe, model, tokenizer, rows, asked, measures, wanted, harness)
    theirs, third = None, None
    if exporter is not None and adapter is not None and ours is not None and wanted.as_shipped:
        del model
        say.print(f"measuring it as {wanted.as_shipped}", markup=False)
        theirs, third = measure_shipped(
            adapter, recipe.model.path, exporter, wanted.as_shipped, rows, asked, measures, wanted.max_new_tokens
        )
        notes.append(sentence(wanted.as_shipped, ours, theirs))
    return Evaluation(
        recipe=recipe.name,
        base=recipe.model.path,
        quantize=recipe.model.quantize,
        adapter=None if adapter is None else str(adapter),
        data=names,
        rows=len(rows),
        tokens=tokens,
        base_figures=base,
        adapter_figures=ours,
        asked=tuple(
            Asked(
                tokenizer.decode(question.ids),
                question.expected,
                text,
                None if also is None else also[number],
                None if third is None else third[number],
            )
            for number, (question, text) in enumerate(zip(asked, said, strict=True))
        ),
        notes=tuple(notes),
        shipped=wanted.as_shipped,
        shipped_figures=theirs,
    )


def write_answers(evaluation: Evaluation, file: Path) -> None:
    """Write each question with its answers as a line of JSON."""
    lines = [json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in evaluation.asked]
    file.write_text("".join(lines), encoding="utf-8")


def _has_rows(target: Target, wanted: Wanted) -> bool:
    """Whether rows are to be read; tasks of the harness bring their own."""
    data = target.recipe.data
    held_out = data.eval_path is not None or data.eval_split is not None or data.eval_fraction
    return bool(wanted.data or held_out or not wanted.tasks)


def _measure(
    recipe: Recipe,
    model: Any,
    tokenizer: Any,
    rows: Any,
    asked: Sequence[Question],
    measures: Sequence[str],
    wanted: Wanted,
    harness: Any,
) -> tuple[Figures, int, list[str]]:
    """(figures, trained tokens, answers) of one model."""
    learned = len(rows) and not recipe.reward  # of prompts, nothing is to be predicted
    scores = token_scores(model, tokenizer, rows, wanted.batch_size) if learned else None
    made = answer(model, tokenizer, [one.ids for one in asked], wanted.max_new_tokens, wanted.batch_size)
    answers, texts = score(made, asked, measures), [one.text for one in made]
    if recipe.reward and made:
        answers |= task_scores(recipe, rows, asked, made)
    tasks = (
        run_tasks(model, tokenizer, wanted.tasks, wanted.task_options, wanted.batch_size, harness)
        if wanted.tasks
        else {}
    )
    if scores is None:
        return Figures(answers=answers, tasks=tasks), 0, texts
    return Figures(scores.loss, scores.perplexity, scores.token_accuracy, answers, tasks), scores.tokens, texts
