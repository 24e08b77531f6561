"""What the settings of a recipe need installed: asked before a model is loaded, not after an hour of it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi3_lora_plugin.error import Phi3LoraError
from phi3_lora_plugin.seams import is_installed
from phi3_lora_plugin.wording import describe, nearest

if TYPE_CHECKING:
    from phi3_lora_plugin.recipe import Recipe

#: Name in `report_to` -> (modules, any one of them is enough; what to install), as in transformers.integrations.
_REPORTS: dict[str, tuple[tuple[str, ...], str]] = {
    name: ((name,), name) for name in "clearml codecarbon dagshub dvclive mlflow neptune swanlab trackio wandb".split()
} | {
    "azure_ml": (("azureml",), "azureml-sdk"),
    "comet_ml": (("comet_ml",), "comet-ml"),
    "flyte": (("flytekit",), "flytekit"),
    "tensorboard": (("tensorboard", "tensorboardX"), "tensorboard"),
}
#: Names of `optim` -> (module, what to install); the first that matches.
_OPTIMIZERS = (
    (r"galore_", "galore_torch", "galore-torch"),
    (r"apollo_", "apollo_torch", "apollo-torch"),
    (r"(ada)?lomo$", "lomo_optim", "lomo-optim"),
    (r"grokadamw$", "grokadamw", "grokadamw"),
    (r"schedule_free_", "schedulefree", "schedulefree"),
    (r"stable_adamw$", "optimi", "torch-optimi"),
    (r"adamw_torch_[48]bit$", "torchao", "torchao"),
    (r"adamw_apex_fused$", "apex", "apex (from github.com/NVIDIA/apex)"),
    (r"adamw_anyprecision$", "torchdistx", "torchdistx"),
    (r"paged_|lion_|ademamix|.*_bnb|.*_8bit", "bitsandbytes", '"phi3-lora-plugin[qlora]"'),
)


class MissingPackage(Phi3LoraError):
    """A setting needs something that is not installed, or names what does not exist; lists all, with remedies."""


def require_packages(recipe: Recipe) -> None:
    """Raise `MissingPackage` for what a recipe needs and this environment does not have."""
    problems = [
        *_reports(recipe.training),
        *_optimizer(recipe.training),
        *_deepspeed(recipe.training),
        *_liger(recipe.training),
        *_objective(recipe),
    ]
    if problems:
        raise MissingPackage("\n  ".join(["this recipe cannot be run here:", *problems]))


def _reports(training: Any) -> Iterator[str]:
    given = training.get("report_to") or []
    if not isinstance(given, str | list) or not all(isinstance(name, str) for name in given):
        yield f"training.report_to: expected a name or a list of names, got {describe(given)}"
        return
    for name in [given] if isinstance(given, str) else given:
        if name in ("all", "none"):
            continue
        if name in _REPORTS:
            modules, package = _REPORTS[name]
            if not any(map(is_installed, modules)):
                yield f"training.report_to: {name} needs {package}: pip install {package}"
            elif name in ("wandb", "mlflow", "trackio") and (problem := _broken(name)):
                yield f"training.report_to: {name} is installed but {problem}; pip install --upgrade {package}"
            elif name == "wandb" and not _wandb_is_ready():
                yield (
                    "training.report_to: wandb has no account here: run wandb login, or set WANDB_MODE=offline to keep "
                    "the run on this machine"
                )
            continue
        known = {*_REPORTS, *import_module("transformers.integrations.integration_utils").INTEGRATION_TO_CALLBACK}
        if name not in known:
            yield f"training.report_to: {name!r} is not one of {', '.join(sorted(known))}{nearest(name, known)}"


def _broken(name: str) -> str | None:
    """Why a tracker cannot be imported; its integration would fail with that once the model is loaded."""
    try:
        import_module(name)
    except Exception as error:
        return f"cannot be imported ({type(error).__name__}: {error})"
    return None


def _wandb_is_ready() -> bool:
    """Whether wandb may start a run without asking for a key; what cannot be found out counts as ready."""
    import wandb

    if os.environ.get("WANDB_MODE", "online") not in ("online", "shared"):
        return True
    try:
        return wandb.run is not None or bool(wandb.login(prompt=False))
    except Exception:
        return True


def _optimizer(training: Any) -> Iterator[str]:
    name = str(training.get("optim") or "")
    found = next((row for row in _OPTIMIZERS if re.match(row[0], name)), None)
    if found is not None and not is_installed(found[1]):
        yield f"training.optim: {name} needs {found[1]}: pip install {found[2]}"


def _deepspeed(training: Any) -> Iterator[str]:
    given = training.get("deepspeed")
    if not given:
        return
    if not is_installed("deepspeed"):
        yield "training.deepspeed needs deepspeed: pip install deepspeed"
    if isinstance(given, str):
        try:
            json.loads(given if given.lstrip().startswith("{") else Path(given).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            yield f"training.deepspeed: {given} cannot be read: {getattr(error, 'strerror', None) or error}"


def _liger(training: Any) -> Iterator[str]:
    if training.get("use_liger_kernel") and not is_installed("liger_kernel"):
        yield "training.use_liger_kernel needs liger-kernel: pip install liger-kernel"


def _objective(recipe: Recipe) -> Iterator[str]:
    """Objectives whose trainers are TRL's; everything else runs without TRL, and with a broken release of it."""
    from phi3_lora_plugin.training.objective import objective_of
    from phi3_lora_plugin.training.rewards import RewardError, folders_of, rewards_of
    from phi3_lora_plugin.training.trl_trainers import ObjectiveError

    if not (recipe.preference.on or recipe.reward):
        return
    setting = "reward" if recipe.reward else "preference.loss"
    if not is_installed("trl"):
        yield f"{setting} needs TRL: pip install trl"
        return
    try:
        objective_of(recipe)
        rewards_of(list(recipe.rewards), (), folders_of(recipe))
    except ObjectiveError as error:
        yield str(error)
    except RewardError as error:
        yield from str(error).splitlines()
    except Exception as error:  # whatever a broken release raises while it is imported
        yield f"{setting} needs TRL, which cannot be imported here ({error}): pip install 'trl>=1.0'"
