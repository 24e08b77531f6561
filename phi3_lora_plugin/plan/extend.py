"""The footprint of a model of many layers from those of models of two and of three, as layers of one kind are alike.

There are two kinds: those whose activations are kept, and those that are computed again in the backward pass.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from phi3_lora_plugin.plan.live import Moment

Kinds = tuple[bool, ...]
"""For each layer whether it is computed again."""

LONGEST = 3  # layers of the longest model that is run


@dataclass(frozen=True)
class Footprint:
    """What a run needs besides the program itself: the worst moment of each phase."""

    parameters: int
    trainable: int
    base_bytes: int
    adapter_bytes: int
    optimizer_bytes: int
    moments: tuple[Moment, ...]


def extended(measured: Callable[[Kinds], Footprint], layers: Kinds) -> Footprint:
    """The footprint of a model of these layers.

    A model of the first and the last of them is run, and one more for each kind of layer between: what that one adds in
    each place (going forward, at the head, going back) is counted as often as there are such layers. The worst moment
    between is at the first or the last layer of a kind.

    Args:
        measured: runs a short model; its footprint has the worst moment of each place, not only of each phase.
    """
    first, between, last = layers[0], layers[1:-1], layers[-1]
    ends = measured((first, last))
    longer = {kind: measured((first, kind, last)) for kind in sorted(set(between))}
    added = {kind: _added(ends, longer[kind]) for kind in longer}

    def grown(moment: Moment, *parts: tuple[str, Kinds]) -> Moment:
        """The moment with these layers more, each as it is in a place of the same phase."""
        total = Counter(moment.bytes)
        for place, kinds in parts:
            for kind, count in Counter(kinds).items():
                for name, more in added[kind].get((moment.phase, place), {}).items():
                    total[name] += count * more
        return Moment(moment.phase, {name: total[name] for name in moment.bytes}, moment.operation, moment.place)

    def moments() -> Iterator[Moment]:
        for moment in ends.moments:
            yield grown(moment, (moment.place, between))
        for kind, run in longer.items():
            places = [number for number, other in enumerate(between) if other == kind]
            for moment in run.moments:
                direction, _, which = moment.place.partition(" ")
                if which == "middle":
                    for number in (places[0], places[-1]):
                        below = (f"{direction} last", between[:number])  # its activations, or input, are there
                        above = (f"{direction} first", between[number + 1 :])  # going back, its gradients
                        yield grown(moment, below, above)

    def total(name: str) -> int:
        more = {kind: getattr(run, name) - getattr(ends, name) for kind, run in longer.items()}
        return int(getattr(ends, name) + sum(more[kind] for kind in between))

    names = ("parameters", "trainable", "base_bytes", "adapter_bytes", "optimizer_bytes")
    return Footprint(**{name: total(name) for name in names}, moments=tuple(moments()))


def _added(ends: Footprint, longer: Footprint) -> dict[tuple[str, str], dict[str, int]]:
    """(phase, place) -> bytes of each kind that the layer between adds there."""
    less = {(moment.phase, moment.place): moment.bytes for moment in ends.moments}
    full = {(moment.phase, moment.place): moment.bytes for moment in longer.moments}
    return {at: {name: full[at][name] - less[at][name] for name in full[at]} for at in full if at in less}


def shortened(config: Any, layers: int) -> Any:
    """The config of the same model with its first `layers` only."""
    shorter = copy.deepcopy(config)
    shorter.num_hidden_layers = layers
    if isinstance(getattr(shorter, "layer_types", None), list):
        shorter.layer_types = shorter.layer_types[:layers]
    return shorter


def alike(config: Any, lora: Mapping[str, Any]) -> bool:
    """Whether every layer gets the same LoRA; `lora` holds options of `resolve_targets`."""
    from phi3_lora_plugin.lora.targets import TargetError, resolve_targets

    try:
        whole, two, three = (
            resolve_targets(shortened(config, count), **lora).parameters
            for count in (config.num_hidden_layers, LONGEST - 1, LONGEST)
        )
    except (TargetError, TypeError):
        return False  # layers by number, which a short model does not have
    types = getattr(config, "layer_types", None) or ["all"]
    return bool(whole == three + (config.num_hidden_layers - LONGEST) * (three - two) and len(set(types)) == 1)
