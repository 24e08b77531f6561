"""What a PEFT model really trains, as rows and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from phi3_lora_plugin.lora.plan import ranges

if TYPE_CHECKING:
    from peft import PeftModel
    from rich.table import Table


@dataclass(frozen=True)
class CoverageRow:
    """One kind of trained module: its path below the layers, where it is, its (out, in) shape, and what is trained.

    `rank` is None for what is trained in full: modules_to_save, single tokens, biases.
    """

    module: str
    layers: tuple[int, ...]
    shape: tuple[int, ...]
    rank: int | None
    parameters: int


def coverage(model: PeftModel, adapter: str = "default") -> list[CoverageRow]:
    """What the model really trains, grouped; the parameters of all rows are the trainable parameters of the model.

    Entries of a sliced B outside its blocks are not counted: they are stored, never trained.
    """
    from phi3_lora_plugin.lora.slices import SlicedLinear

    rows: dict[tuple[str, tuple[int, ...], int | None], list[tuple[int, int]]] = {}

    def add(path: str, shape: tuple[int, ...], rank: int | None, parameters: int) -> None:
        layer, short = _split_layer(path)
        rows.setdefault((short, shape, rank), []).append((layer, parameters))

    counted = set()
    for path, layer in adapted_modules(model, adapter).items():
        trained = {name: p for name, p in layer.named_parameters() if f".{adapter}" in name and "lora_" in name}
        own = {name: p for name, p in trained.items() if not name.startswith("base_layer.")}
        counted |= {id(p) for p in own.values()}
        linear = layer.lora_B[adapter] if adapter in layer.lora_B else None
        if isinstance(linear, SlicedLinear):
            for block in linear.blocks:
                height = block.stop - block.start
                size = block.rank * (layer.in_features + height)
                add(f"{path}[{block.name}]", (height, layer.in_features), block.rank, size)
            continue
        shape: tuple[int, ...] = (layer.out_features, layer.in_features)
        if hasattr(layer, "parameter_name"):
            shape = (layer.num_experts, *shape)
        add(path, shape, layer.r[adapter], sum(p.numel() for p in own.values() if p.requires_grad))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in counted:
            add(_plain_name(name, adapter), tuple(parameter.shape), None, parameter.numel())
    return [
        CoverageRow(short, tuple(sorted(n for n, _ in found if n >= 0)), shape, rank, sum(size for _, size in found))
        for (short, shape, rank), found in rows.items()
    ]


def render_coverage(rows: Sequence[CoverageRow]) -> Table:
    """The rows of `coverage` as a table, with a total."""
    from rich.table import Table
    from rich.text import Text

    total = sum(row.parameters for row in rows)
    table = Table(title="Trained", title_justify="left", show_footer=True)
    table.add_column("module", footer="total")
    table.add_column("layers")
    table.add_column("shape", justify="right")
    table.add_column("rank", justify="right")
    table.add_column("parameters", justify="right", footer=f"{total:,}")
    for row in rows:
        table.add_row(
            Text(row.module),  # the names of some hold [brackets]
            ranges(row.layers),
            " x ".join(str(size) for size in row.shape),
            "full" if row.rank is None else str(row.rank),
            f"{row.parameters:,}",
        )
    return table


def adapted_modules(model: Any, adapter: str = "default") -> dict[str, Any]:
    """LoRA layers by what they adapt: a module's path, or for stacked experts the path of the parameter."""
    from phi3_lora_plugin.lora.slices import lora_layers

    return {
        # PEFT nests one wrapper in the other where it adapts several parameters of one module.
        f"{path.replace('.base_layer', '')}.{layer.parameter_name}" if hasattr(layer, "parameter_name") else path: layer
        for path, layer in lora_layers(model, adapter).items()
    }


def _split_layer(path: str) -> tuple[int, str]:
    """`model.layers.3.mlp.down_proj` -> (3, `mlp.down_proj`); layer -1 for what is in none."""
    head, _, rest = path.partition("layers.")
    number, _, below = rest.partition(".")
    return (int(number), below) if number.isdigit() else (-1, path)


def _plain_name(name: str, adapter: str) -> str:
    for part in ("base_model.model.", f".modules_to_save.{adapter}", ".base_layer", ".token_adapter",
                 f".trainable_tokens_delta.{adapter}"):  # fmt: skip
        name = name.replace(part, "")
    return name.removesuffix(".weight")
