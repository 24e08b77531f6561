"""A plan as lines for a person."""

from __future__ import annotations

from collections.abc import Sequence

from phi3_lora_plugin.plan.plan import Plan
from phi3_lora_plugin.wording import human


def lines(plan: Plan) -> Sequence[str]:
    """What it takes, part by part, and whether it fits."""
    packed = f", {plan.quantize}" if plan.quantize != "none" else ""
    shape = (
        f"{plan.batch} packs of up to {plan.width // plan.batch}" if plan.packing else f"{plan.batch} x {plan.width}"
    )
    told = [
        f"{plan.recipe} on {plan.device}: {plan.model}, {plan.dtype}{packed}",
        f"parameters      {plan.parameters:,}, LoRA {plan.trainable_parameters:,} "
        f"({100 * plan.trainable_parameters / max(1, plan.parameters):.2f}%)",
        f"a micro-batch   {shape} tokens, {plan.accumulation} a step",
        f"checkpointing   {plan.recomputed}{f' (auto: {plan.chosen})' if plan.chosen else ''}",
        f"peak at         {plan.when}",
    ]
    parts = {
        "context" if plan.device in ("cuda", "xpu") else "the program": plan.program,
        "base": plan.base,
        "adapter": plan.adapter,
        "gradients": plan.gradients,
        "optimizer": plan.optimizer,
        "activations": plan.activations,
        "logits": plan.logits,
        "workspaces": plan.workspaces,
        "allocator": plan.allocator,
    }
    told += [f"  {name:<14}{human(count):>10}" for name, count in parts.items() if count]
    told.append(f"  {'total':<14}{human(plan.peak):>10}")
    told.append(f"checkpoint      {human(plan.checkpoint)}, and {human(plan.resume)} to resume from")
    if plan.steps is None:
        told.append(f"steps           of up to {plan.tokens_per_step:,} tokens; set data.path to count them")
    else:
        told.append(f"steps           {plan.steps:,} of {plan.tokens_per_step:,} tokens, {plan.tokens:,} in all")
    if plan.device != "cpu":
        told.append("note            computed from shapes; allocator and workspaces assumed, not measured")
    if plan.fits is None:
        told.append("fits            unknown; pass --memory 24GB")
    else:
        word = "yes" if plan.fits else "NO"
        free = f", {human(plan.margin)} of it left free" if plan.margin else ""
        told.append(f"fits            {word}: {human(plan.peak)} of {human(plan.memory or 0)}{free}")
    return told
