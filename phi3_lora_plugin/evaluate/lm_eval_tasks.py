"""The tasks of EleutherAI's lm-evaluation-harness on a model that is loaded already, if the package is installed."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from phi3_lora_plugin.error import Phi3LoraError
from phi3_lora_plugin.seams import is_installed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class HarnessError(Phi3LoraError):
    """The harness is not installed, or does not take what it was asked for."""


def require_lm_eval(tasks: Sequence[str], options: Mapping[str, Any]) -> Any:
    """The harness's `TaskManager`, once what can be checked before a model is loaded was checked.

    It reads the harness's 14,000 files, which takes seconds, so `run_tasks` gets this one for the base and the adapter;
    where all tasks are in the folder `include_path`, it reads that alone.

    Raises:
        HarnessError: the package is missing, an option or a task that it does not have.
    """
    if not is_installed("lm_eval"):
        raise HarnessError('--lm-eval needs the lm-evaluation-harness: pip install "phi3-lora-plugin[lm-eval]"')
    import lm_eval
    from lm_eval.tasks import TaskManager

    known = set(inspect.signature(lm_eval.simple_evaluate).parameters) - {"model", "tasks", "model_args"}
    if wrong := sorted(set(options) - known - {"include_path"}):
        raise HarnessError(f"lm_eval.simple_evaluate takes no {', '.join(wrong)}, only {', '.join(sorted(known))}")
    if own := options.get("include_path"):
        alone = TaskManager(include_path=own, include_defaults=False)
        if set(tasks) <= set(alone.all_subtasks):  # not groups, whose members may be the harness's
            return alone
    manager = TaskManager(include_path=own)
    if absent := [task for task in tasks if not manager.match_tasks([task])]:
        raise HarnessError(f"lm_eval knows no task {', '.join(absent)}; lm_eval ls tasks lists them")
    return manager


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    options: Mapping[str, Any],
    batch_size: int,
    manager: Any,
) -> dict[str, dict[str, float]]:
    """Task -> metric -> value, as `lm_eval.simple_evaluate` gives them, without its notes and names.

    Args:
        options: what `simple_evaluate` takes (`num_fewshot`, `limit`, `apply_chat_template`, ...), and `include_path`,
            a folder with tasks of your own.
        manager: what `require_lm_eval` gave.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    given = {key: value for key, value in options.items() if key != "include_path"}
    done = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=given.pop("batch_size", batch_size)),
        tasks=list(tasks),
        task_manager=manager,
        **given,
    )
    return {
        task: {name: float(value) for name, value in found.items() if isinstance(value, int | float)}
        for task, found in done["results"].items()
    }
