"""`phi3-lora eval`: base against adapter, on rows that neither was trained on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from phi3_lora_plugin.cli.overrides import AsJson, Overrides
from phi3_lora_plugin.error import Phi3LoraError

if TYPE_CHECKING:
    from rich.console import Console

    from phi3_lora_plugin.evaluate.evaluate import Evaluation
    from phi3_lora_plugin.evaluate.figures import Figures

_NAMES = {"exact": "exact match", "rouge_l": "ROUGE-L", "gsm8k": "GSM8K accuracy", "stopped": "answers that ended"}


class EvalOptionError(Phi3LoraError):
    """An option of `phi3-lora eval` that cannot be what it is."""


def eval_command(
    what: Annotated[str, typer.Argument(help="Adapter, run or model folder, preset or YAML file.")],
    overrides: Overrides = None,
    data: Annotated[str | None, typer.Option(help="Evaluation data; default: held-out rows.")] = None,
    base: Annotated[str | None, typer.Option(help="Base model, if it moved since training.")] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Evaluate at most this many rows.")] = None,
    answers: Annotated[int, typer.Option(min=0, help="Number of answers to generate.")] = 20,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum new tokens per answer.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="Batch size.")] = 8,
    gsm8k: Annotated[bool, typer.Option("--gsm8k", help="Also compare the numbers after '####'.")] = False,
    save_answers: Annotated[Path | None, typer.Option(help="Save questions and answers as JSONL.")] = None,
    as_shipped: Annotated[
        str | None, typer.Option("--as", help="Measure the shipped form too, for example llama.cpp:q4_k_m.")
    ] = None,
    lm_eval: Annotated[str | None, typer.Option(help="lm-evaluation-harness tasks, comma-separated.")] = None,
    lm_eval_args: Annotated[
        str, typer.Option(help="Arguments for simple_evaluate, for example '{limit: 100}'.")
    ] = "{}",
    as_json: AsJson = False,
) -> None:
    """Compare an adapter with its base on held-out rows.

    Prints loss, perplexity, token accuracy and scores of generated answers.
    """
    from rich.console import Console

    from phi3_lora_plugin.evaluate.target import find_target
    from phi3_lora_plugin.plugins.discovery import load_plugins

    console = Console(stderr=as_json, highlight=False)
    plugins = load_plugins()
    task_options = _mapping(lm_eval_args)
    if save_answers is not None and not save_answers.absolute().parent.is_dir():
        raise EvalOptionError(f"--save-answers: no such folder: {save_answers.absolute().parent}")
    target = find_target(what, overrides or (), lambda name: plugins.pick("recipes", name), base)

    from phi3_lora_plugin.evaluate.evaluate import Wanted, evaluate, write_answers

    tasks = tuple(filter(None, (lm_eval or "").split(",")))
    wanted = Wanted(data, rows, answers, max_new_tokens, gsm8k, tasks, task_options, batch_size, as_shipped)
    evaluation = evaluate(target, wanted, plugins, console)
    if save_answers is not None:
        write_answers(evaluation, save_answers)
    if as_json:
        print(evaluation.to_json())
    else:
        show(evaluation, console)


def show(evaluation: Evaluation, console: Console) -> None:
    """Print the figures of base and adapter side by side."""
    from rich.table import Table

    if evaluation.rows:
        trained = f"{evaluation.tokens:,} trained tokens" if evaluation.tokens else "each a prompt"
        console.print(f"{evaluation.rows:,} rows, {trained}", end="")
        console.print(f"; {len(evaluation.asked):,} answers" if evaluation.asked else "")
    table = Table(box=None, padding=(0, 2, 0, 0))
    sides = {
        "base": evaluation.base_figures, "adapter": evaluation.adapter_figures,
        evaluation.shipped or "shipped": evaluation.shipped_figures,
    }  # fmt: skip
    named = {name: _named(figures) for name, figures in sides.items() if figures}
    for column in ("", *named):
        table.add_column(column, justify="right" if column else "left")
    for name in named["base"]:
        table.add_row(name, *(f"{side[name]:.4f}" if name in side else "-" for side in named.values()))
    console.print(table)
    if evaluation.shipped_figures:
        console.print(evaluation.notes[-1], markup=False)


def _named(figures: Figures) -> dict[str, float]:
    """Every figure by the name that people read."""
    found: dict[str, float | None] = {
        "loss": figures.loss, "perplexity": figures.perplexity, "token accuracy": figures.token_accuracy,
    }  # fmt: skip
    found |= {_NAMES.get(name, name): value for name, value in figures.answers.items()}
    found |= {f"{task} {metric}": value for task, some in figures.tasks.items() for metric, value in some.items()}
    return {name: value for name, value in found.items() if value is not None}


def _mapping(text: str) -> dict[str, Any]:
    from phi3_lora_plugin.recipe.yaml_file import parse_value

    try:
        value = parse_value(text)
    except ValueError as error:
        raise EvalOptionError(f"--lm-eval-args: {error}") from error
    if not isinstance(value, dict):
        raise EvalOptionError(f"--lm-eval-args: expected a mapping as '{{limit: 100}}', found {text}")
    return value
