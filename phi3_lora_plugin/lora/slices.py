"""LoRA on slices of a fused projection: each slice has its own A and B, kept inside one ordinary PEFT layer.

The A of the layer stacks those of the slices, its B holds theirs as blocks on a diagonal, so files, merging and every
other PEFT function see a plain adapter. What differs is one module: B multiplies block by block, hence the entries
between the blocks never receive a gradient and stay zero. This is `MergedLinear` of loralib, also for unequal slices.

Imported only from inside functions: a layer has to be a `torch.nn.Module`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch  # noqa: TID253
from torch import nn  # noqa: TID253

from phi3_lora_plugin.error import Phi3LoraError
from phi3_lora_plugin.lora.plan import Block, TargetPlan
from phi3_lora_plugin.model.families import projections


class SliceError(Phi3LoraError):
    """An adapter does not have the blocks that it should have, or something wrote between them."""


class SlicedLinear(nn.Linear):  # type: ignore[misc]
    """The B of a sliced adapter: of `weight`, the whole (out, sum of ranks) matrix, only the blocks take part."""

    blocks: tuple[Block, ...]

    @classmethod
    def around(cls, linear: nn.Linear, blocks: tuple[Block, ...]) -> SlicedLinear:
        """A sliced layer on the very parameter of `linear`, so that an optimizer that holds it keeps holding it."""
        layer = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        layer.weight = linear.weight
        layer.blocks = blocks
        layer.train(linear.training)
        return layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., sum of ranks) -> (..., out), exact zeros in rows outside every block."""
        pieces, row, rank = [], 0, 0
        for block in self.blocks:
            part = nn.functional.linear(
                x[..., rank : rank + block.rank], self.weight[block.start : block.stop, rank : rank + block.rank]
            )
            if block.start > row:
                pieces.append(part.new_zeros(*part.shape[:-1], block.start - row))
            pieces.append(part)
            row, rank = block.stop, rank + block.rank
        if row < self.out_features:
            pieces.append(pieces[-1].new_zeros(*pieces[-1].shape[:-1], self.out_features - row))
        return torch.cat(pieces, dim=-1)

    def extra_repr(self) -> str:
        blocks = ", ".join(f"{block.name}: rows {block.start}-{block.stop} rank {block.rank}" for block in self.blocks)
        return f"{super().extra_repr()}, {blocks}"

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        # An optimizer that mixes entries (Muon, a Riemannian one) would write between the blocks. The forward pass
        # ignores that, merging and other hosts would not: the saved adapter would not be the trained one.
        if problem := _outside_blocks(self.weight, self.blocks):
            raise SliceError(f"{prefix}weight: {problem}; train slices with an optimizer that works entry by entry")
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        loaded = state_dict.get(f"{prefix}weight")
        if loaded is not None and (problem := _outside_blocks(loaded, self.blocks)):
            error_messages = rest[-1]
            error_messages.append(f"{prefix}weight: {problem}; the file holds another adapter than these slices")
            return
        super()._load_from_state_dict(state_dict, prefix, *rest)


def apply_slices(
    model: nn.Module, blocks: TargetPlan | Mapping[str, tuple[Block, ...]], adapter: str = "default"
) -> nn.Module:
    """Make the layers of a PEFT model train and multiply by blocks; returns the model. Doing it twice does no harm.

    Args:
        model: with the adapter already in it: just injected, or loaded by `PeftModel.from_pretrained`.
        blocks: a plan, or module path -> blocks as `blocks_of` finds them in a loaded adapter.

    Raises:
        SliceError: a module is missing, has another rank, or its B is not zero between the blocks.
    """
    wanted = blocks.blocks if isinstance(blocks, TargetPlan) else blocks
    layers = lora_layers(model, adapter)
    problems = []
    for module, parts in wanted.items():
        layer = layers.get(module)
        if layer is None:
            problems.append(f"{module} has no LoRA layer with adapter {adapter!r}")
            continue
        linear, ranks = layer.lora_B[adapter], sum(part.rank for part in parts)
        if linear.in_features != ranks:
            problems.append(f"{module}: the slices need rank {ranks}, the adapter has {linear.in_features}")
        elif problem := _outside_blocks(linear.weight, parts):
            problems.append(f"{module}: {problem}: it was trained on the whole projection, or on other slices")
    if problems:
        raise SliceError("\n".join(problems))
    for module, parts in wanted.items():
        linear = layers[module].lora_B[adapter]
        layers[module].lora_B[adapter] = SlicedLinear.around(linear, parts)
    return model


def clear_outside_blocks(model: nn.Module, plan: TargetPlan, adapter: str = "default") -> None:
    """Zero what a random B (`init_lora_weights=False`) holds between the blocks; for a fresh adapter only."""
    layers = lora_layers(model, adapter)
    with torch.no_grad():
        for module, parts in plan.blocks.items():
            weight = layers[module].lora_B[adapter].weight
            weight.mul_(_mask(weight, parts))


def blocks_of(model: nn.Module, adapter: str = "default") -> dict[str, tuple[Block, ...]]:
    """The blocks of a PEFT model: module path -> blocks, of the modules that have any.

    Layers that are already sliced know their blocks. For others the weights decide: a B of a fused projection that is
    zero outside blocks on a diagonal was trained on slices. An untrained B, all zeros, shows nothing and is skipped.
    """
    config = getattr(model, "config", None)
    layout = {projection.path: projection.slices for projection in projections(config.to_dict())} if config else {}
    found = {}
    for module, layer in lora_layers(model, adapter).items():
        linear = layer.lora_B[adapter] if adapter in layer.lora_B else None
        if isinstance(linear, SlicedLinear):
            found[module] = linear.blocks
            continue
        slices = next((parts for path, parts in layout.items() if module.endswith(f".{path}")), ())
        if linear is not None and slices and (blocks := _find_blocks(linear.weight.detach(), slices)):
            found[module] = blocks
    return found


def lora_layers(model: nn.Module, adapter: str = "default") -> dict[str, Any]:
    """Every LoRA layer that has this adapter, by the path of its module in the base model."""
    from peft.tuners.lora import LoraLayer

    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and (adapter in module.lora_A or adapter in module.lora_embedding_A)
    }


def _find_blocks(weight: torch.Tensor, slices: Any) -> tuple[Block, ...]:
    """Blocks that explain every non-zero entry of B (out, rank), or none if no such blocks exist."""
    owners: list[int] = []
    for column in range(weight.shape[1]):
        used = [i for i, part in enumerate(slices) if weight[part.start : part.stop, column].any()]
        if len(used) > 1:
            return ()
        # A column without an entry (a unit that never learned) belongs with the ones before it.
        owners.append(used[0] if used else owners[-1] if owners else -1)
    if not owners or owners[-1] == -1 or owners != sorted(owners):
        return ()
    owners = [next(owner for owner in owners if owner >= 0) if owner < 0 else owner for owner in owners]
    return tuple(
        Block(slices[owner].name, slices[owner].start, slices[owner].stop, owners.count(owner))
        for owner in dict.fromkeys(owners)
    )


def _outside_blocks(weight: torch.Tensor, blocks: tuple[Block, ...]) -> str:
    """What is wrong between the blocks of B, or nothing. A tensor that is not here in full shows nothing either."""
    rows, ranks = max(block.stop for block in blocks), sum(block.rank for block in blocks)
    sharded = hasattr(weight, "full_tensor") or weight.is_meta or weight.dim() != 2
    if sharded or weight.shape[0] < rows or weight.shape[1] != ranks:
        return ""
    outside = weight.detach().masked_fill(_mask(weight, blocks).bool(), 0)
    count = int(outside.count_nonzero())
    names = ", ".join(block.name for block in blocks)
    return f"{count} entries outside the slices {names} are not zero" if count else ""


def _mask(weight: torch.Tensor, blocks: tuple[Block, ...]) -> torch.Tensor:
    mask, rank = torch.zeros_like(weight, requires_grad=False), 0
    for block in blocks:
        mask[block.start : block.stop, rank : rank + block.rank] = 1
        rank += block.rank
    return mask
