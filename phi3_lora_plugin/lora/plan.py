"""A plan of where LoRA sits: which modules, what rank each, which rows of the fused ones; and the settings for PEFT."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LAYERS = "model.layers"


@dataclass(frozen=True)
class Block:
    """Rows `start` to `stop` (exclusive) of a fused projection that have an A and a B of their own, of this rank."""

    name: str
    start: int
    stop: int
    rank: int


@dataclass(frozen=True)
class Target:
    """One module, or one stack of expert weights, that gets LoRA.

    `rank` and `alpha` are PEFT's settings. With `blocks`, that is the sum of their ranks, and the alpha that leaves
    the scaling what `alpha / r` (rsLoRA: `alpha / sqrt(r)`) makes it for one block.
    """

    module: str
    projection: str
    layer: int
    in_features: int
    out_features: int
    rank: int
    alpha: float
    blocks: tuple[Block, ...] = ()
    experts: int = 0

    @property
    def parameters(self) -> int:
        """Entries that training changes; the zeros outside the blocks of B are not among them."""
        if self.blocks:
            return sum(block.rank * (self.in_features + block.stop - block.start) for block in self.blocks)
        return self.rank * (self.in_features + self.out_features) * max(self.experts, 1)


@dataclass(frozen=True)
class TargetPlan:
    """Everything that gets LoRA, in the order of the model, and how to write it as a `peft.LoraConfig`.

    `exclude_modules` is PEFT's: what has the names of targets and is outside the decoder layers.
    """

    r: int
    alpha: float
    rslora: bool
    layers: int
    targets: tuple[Target, ...]
    exclude_modules: str | None = None

    @property
    def parameters(self) -> int:
        return sum(target.parameters for target in self.targets)

    @property
    def training_bytes(self) -> int:
        """Bytes of the float32 adapter, its gradient, and the two moments of AdamW."""
        return 16 * self.parameters

    @property
    def blocks(self) -> dict[str, tuple[Block, ...]]:
        """The sliced modules: module path -> its blocks. What `slices.apply_slices` takes."""
        return {target.module: target.blocks for target in self.targets if target.blocks}

    @property
    def target_modules(self) -> list[str]:
        """Short names where one set of layers serves all of them, else full paths; sorted."""
        modules = [target for target in self.targets if not target.experts]
        if self._layers_of(modules) is not None:
            return sorted({target.projection for target in modules})
        return sorted(target.module for target in modules)

    @property
    def target_parameters(self) -> list[str]:
        """PEFT does not apply `layers_to_transform` to parameters, so fewer than all layers are named one by one."""
        experts = [target for target in self.targets if target.experts]
        if self._layers_of(experts) == set(range(self.layers)):
            return sorted({target.module.removeprefix(f"{LAYERS}.{target.layer}.") for target in experts})
        return sorted(target.module for target in experts)

    @property
    def layers_to_transform(self) -> list[int] | None:
        layers = self._layers_of([target for target in self.targets if not target.experts])
        return None if not layers or len(layers) == self.layers else sorted(layers)

    @property
    def rank_pattern(self) -> dict[str, int]:
        return self._pattern({target: target.rank for target in self.targets}, self.r)

    @property
    def alpha_pattern(self) -> dict[str, float]:
        return self._pattern({target: target.alpha for target in self.targets}, self.alpha)

    @staticmethod
    def _layers_of(targets: Sequence[Target]) -> set[int] | None:
        """The layers that each kind of targets is in; None where these differ."""
        layers: dict[str, set[int]] = {}
        for target in targets:
            layers.setdefault(target.projection, set()).add(target.layer)
        first, *others = layers.values() or [set()]
        return first if all(other == first for other in others) else None

    def _pattern(self, values: Mapping[Target, Any], default: Any) -> dict[str, Any]:
        pattern: dict[str, Any] = {}
        for name in sorted({target.projection for target in values}):
            each = {target.module: value for target, value in values.items() if target.projection == name}
            if len(set(each.values())) > 1:
                pattern |= {module: value for module, value in each.items() if value != default}
            elif (value := next(iter(each.values()))) != default:
                pattern[name] = value
        return pattern


def span(layers: Collection[int]) -> str:
    """Layer numbers as people write them: `layer 3`, `layers 0-31`, `layers 0-2, 5`."""
    return f"layer{'s' if len(layers) != 1 else ''} {ranges(layers)}"


def ranges(numbers: Iterable[int]) -> str:
    """`0-3, 5` for numbers; `-` for none."""
    runs: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][1] == number - 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs) or "-"
