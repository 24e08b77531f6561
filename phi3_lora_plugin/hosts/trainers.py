"""Every Trainer of a script that does not know this package: attached when its training begins."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import wraps
from importlib import import_module
from typing import TYPE_CHECKING, Any

from phi3_lora_plugin.error import Phi3LoraError
from phi3_lora_plugin.plugins.discovery import Plugins, load_plugins
from phi3_lora_plugin.seams import look_up
from phi3_lora_plugin.training.attach import attach, trains_alone, wrap_again
from phi3_lora_plugin.training.resume import refuse_own_folder
from phi3_lora_plugin.wording import nearest

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from phi3_lora_plugin.recipe import Recipe

log = logging.getLogger(__name__)
OURS = "phi3"  # the name under which this package registers itself


class CallbackError(Phi3LoraError):
    """A callback was asked for by an unknown name."""


def attach_to_all(
    recipe: Recipe | None, names: Sequence[str] | None, say: Callable[[str], Any] | None
) -> tuple[list[str], Callable[[], None]]:
    """Wrap `Trainer.train`, which derived Trainers call; (sentences, undo).

    A Trainer whose `train` never calls it gets nothing, which is reported when it is made.
    """
    from transformers import Trainer

    plugins = load_plugins()
    wanted = _checked(names, plugins)
    stock, stock_init = look_up("transformers.train"), Trainer.__init__
    tell = say or log.info

    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        refuse_own_folder(kwargs.get("resume_from_checkpoint", args[0] if args else None))
        for sentence in _attach(self, recipe, wanted, plugins):
            tell(sentence)
        if self.model is not None and wrap_again(self):
            tell(f"{type(self).__name__}: its processes share gradients, which evaluating before training had undone")
        return stock(self, *args, **kwargs)

    train.__wrapped__ = stock  # type: ignore[attr-defined]
    train.__doc__, train.__name__ = stock.__doc__, stock.__name__
    Trainer.train = train

    @wraps(stock_init)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        stock_init(self, *args, **kwargs)
        if trains_alone(type(self)):
            tell(
                f"{type(self).__name__} has its own train(), which does not call Trainer.train: no callbacks, stop "
                "tokens or fast paths were added; call phi3_lora_plugin.attach(trainer) before trainer.train()"
            )

    Trainer.__init__ = init

    def undo() -> None:
        if Trainer.train is train:
            Trainer.train = stock
        if Trainer.__init__ is init:
            Trainer.__init__ = stock_init

    sentence = f"every Trainer gets the callbacks of {', '.join(wanted)} when it starts training"
    return [sentence if wanted else "no callbacks added"], undo


def chosen(names: Sequence[str], plugins: Plugins, recipe: Recipe, own: bool) -> list[TrainerCallback]:
    """Callbacks by name: a plugin's, for all that it offers for `recipe`, or `module:Class`, made without arguments.

    Args:
        own: whether the user asked for `recipe`; else our own checkpoints use their defaults.
    """
    from phi3_lora_plugin.training.callbacks import LoraCheckpoint

    found: list[Any] = []
    for name in names:
        if ":" in name:
            module, _, kind = name.partition(":")
            try:
                found.append(getattr(import_module(module), kind)())
            except (ImportError, AttributeError) as error:
                raise CallbackError(f"callbacks: {name} cannot be made: {error}") from error
        elif name == OURS and not own:
            found.append(LoraCheckpoint())
        else:
            found += plugins.callbacks(recipe, only=name)
    return found


def _checked(names: Sequence[str] | None, plugins: Plugins) -> list[str]:
    known = [plugin.name for plugin in plugins.plugins if "trainer_callbacks" in plugin.hooks]
    if names is None:
        return known
    unknown = [name for name in names if ":" not in name and name not in known]
    if unknown:
        raise CallbackError(
            f"callbacks: {', '.join(unknown)} is not a plugin with callbacks; available: {', '.join(known)}, "
            f"or any class as module:Class{nearest(unknown[0], known)}"
        )
    return list(dict.fromkeys(names))


def _attach(trainer: Any, recipe: Recipe | None, names: Sequence[str], plugins: Plugins) -> list[str]:
    from phi3_lora_plugin.lora.gather import unwrapped
    from phi3_lora_plugin.lora.state import lora_names

    if "_phi3_lora_callbacks" in trainer.__dict__:
        return []
    model = unwrapped(trainer.model) if trainer.model is not None else None
    if model is None or not lora_names(model):
        what = "its model is created later" if model is None else f"{type(model).__name__} has no LoRA"
        return [f"{type(trainer).__name__} unchanged: {what}"]
    trainer._phi3_lora_callbacks = callbacks = chosen(
        names, plugins, recipe or _described(trainer, model), recipe is not None
    )
    return [f"{type(trainer).__name__}: {done}" for done in attach(trainer, recipe, callbacks=callbacks)]


def _described(trainer: Any, model: Any) -> Recipe:
    """A recipe that describes a script as far as one can, for plugins' callbacks that want one."""
    from phi3_lora_plugin.recipe import Recipe

    path = getattr(getattr(model, "config", None), "name_or_path", "") or "unknown"
    return Recipe.model_validate(
        {"model": {"path": path}, "output_dir": str(trainer.args.output_dir), "seed": trainer.args.seed}
    )
