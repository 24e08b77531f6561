"""TRL's trainers, imported from where the installed version has them."""

# TRL is heavy; this module is imported only inside functions.
from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib import import_module, metadata
from typing import Any

from phi3_lora_plugin.error import Phi3LoraError


class ObjectiveError(Phi3LoraError):
    """The installed TRL cannot train with the objective of a recipe."""


def trl_trainer(
    name: str, setting: str, since: str, fits: Callable[[Any], bool] = lambda module: True
) -> tuple[type[Any], type[Any]]:
    """(trainer, its arguments) of that name, such as "KTO"; versions moved them between `trl` and `trl.experimental`.

    Args:
        setting: of the recipe that needs it.
        since: the first version of TRL that has it as it is needed.
        fits: whether the module that defines the trainer is as it is needed.

    Raises:
        ObjectiveError: the installed TRL has none that fits; says which to install.
    """
    reason = ""
    for place in (f"trl.experimental.{name.lower()}", "trl"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is experimental, or has moved
            try:
                module = import_module(place)
                trainer, arguments = getattr(module, f"{name}Trainer"), getattr(module, f"{name}Config")
            except AttributeError:
                continue
            except ImportError as error:  # of what TRL itself imports, or of a place that this version does not have
                reason = reason if (error.name or "").startswith("trl") else f" ({error})"
                continue
        # A place that it has left has a class of the same name, which only warns.
        own = import_module(trainer.__module__)
        if own.__name__.endswith(f"{name.lower()}_trainer") and fits(own):
            return trainer, arguments
    raise ObjectiveError(
        f"{setting} needs {name}Trainer as TRL {since} has it; {installed_trl()}{reason}: pip install 'trl>={since}'"
    )


def installed_trl() -> str:
    """Which version of TRL is installed, as a clause."""
    try:
        return f"installed is TRL {metadata.version('trl')}"
    except metadata.PackageNotFoundError:
        return "TRL is not installed"


def forget_copy(trainer: Any) -> None:
    """Delete the copy of the adapter that TRL makes as the reference, where it did not make the adapter itself.

    A new adapter is nothing yet: the base is the reference, without a copy that every checkpoint would have to tell
    from the adapter.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    if "ref" in model.peft_config:
        model.delete_adapter("ref")
        model.set_adapter("default")


class LeavesRows:
    """Stands before a trainer of TRL: encoded rows stay as they are, and a new adapter without a copy."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        forget_copy(self)

    def _prepare_dataset(self, dataset: Any, *others: Any, **named: Any) -> Any:
        return dataset
