"""`training.activation_checkpointing: auto`: as many layers keep their activations as fit into memory.

To recompute a layer costs its forward pass again, so fewer recomputed layers are always faster. What is kept for one
can be held in the host's memory: 4 bytes x hidden size a token go over PCIe, there and back, which takes about half as
long as that forward pass on an H100 and less on slower cards. Of all settings, in the order of these times, the first
that fits is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from phi3_lora_plugin.recipe.training import AUTO
from phi3_lora_plugin.training.checkpointing import Checkpointing, offers_some_layers, setting_name
from phi3_lora_plugin.wording import human

if TYPE_CHECKING:
    from phi3_lora_plugin.recipe import Recipe

ALL = Checkpointing(1)
_OFFLOADED = 0.5  # of the time of a layer's forward pass: 12 kB at 55 GB/s, and 0.42 us, a token of Phi-3-mini (H100)
_NEAR = 0.75  # what is kept for a recomputed layer is less than a quarter of its activations


@dataclass(frozen=True)
class Choice:
    """What `auto` chose, and why in a few words."""

    checkpointing: Checkpointing
    why: str

    def wording(self, config: Any) -> str:
        """Both, for a model of this config."""
        return f"{self.checkpointing.wording(int(getattr(config, 'num_hidden_layers', 0)))} (auto: {self.why})"


def is_auto(recipe: Recipe) -> bool:
    """Whether a recipe leaves checkpointing to us."""
    return bool(recipe.training.get(setting_name()) == AUTO)


def least(recipe: Recipe) -> list[str]:
    """Overrides with which a recipe takes the least that `auto` chooses on one device of any size."""
    return [f"training.{setting_name()}=true"] if is_auto(recipe) else []


def candidates(layers: int, device: str) -> Iterator[Checkpointing]:
    """What transformers offers for a model of so many layers, fastest first; of equally fast ones the smallest."""
    yield Checkpointing()
    if not offers_some_layers():
        yield ALL
        return
    counts = {sum(Checkpointing(every).layers(layers)): every for every in range(layers, 0, -1)}
    settings = [Checkpointing(every) for every in counts.values()]
    if device in ("cuda", "xpu"):  # elsewhere the host's memory is the device's
        for count, every in counts.items():
            # Where a faster setting without keeps far fewer layers' activations, it takes less memory as well.
            if all(_NEAR * other <= count for other in counts if other < (1 + _OFFLOADED) * count):
                settings.append(Checkpointing(every, offload=True))
    yield from sorted(settings, key=lambda each: sum(each.layers(layers)) * (1 + _OFFLOADED * each.offload))


def choose_checkpointing(
    recipe: Recipe,
    layers: int,
    device: str,
    peak: Callable[[Checkpointing], int],
    memory: int | None,
    margin: float,
) -> Choice:
    """The fastest candidate that fits; all layers where that cannot be known.

    Args:
        layers: decoder layers of the model.
        device: its kind.
        peak: bytes at the worst moment of a run.
        memory: bytes there are; None if that is not known.
        margin: share of them to leave free.
    """
    if reason := unplanned(recipe):
        return Choice(ALL, reason)
    if memory is None:
        return Choice(ALL, "the memory of the device is not known")
    room = int(memory * (1 - margin))
    of = f"of {human(memory)}{f', {margin:.0%} of it left free' if margin else ''}"
    tried: list[tuple[Checkpointing, int]] = []
    for candidate in candidates(layers, device):
        taken = peak(candidate)
        if taken <= room:
            faster = f"; {tried[-1][0].wording(layers)} would take {human(tried[-1][1])}" if tried else ""
            return Choice(candidate, f"{human(taken)} {of}{faster}")
        tried.append((candidate, taken))
    last, taken = min(tried, key=lambda each: each[1])
    return Choice(last, f"nothing fits: even this takes {human(taken)} {of}")


def unplanned(recipe: Recipe) -> str | None:
    """Why a plan does not know all of what a step takes; None if it does."""
    what = "reward" if recipe.reward else f"preference.loss: {recipe.preference.loss}" if recipe.preference.on else None
    return what and f"plans do not cover every pass of {what}"
