"""The fastest settings of a recipe that fit into memory, as overrides; the effective batch stays what it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from phi3_lora_plugin.plan.plan import Plan
from phi3_lora_plugin.recipe.training import AUTO

# What a setting costs in time. Arithmetic of a step with and without gradient checkpointing on (24.15 and 16.45 GFLOP
# a token of Phi-3-mini at 2048 tokens), and work of the host in each micro-batch, in tokens' worth of time.
_RECOMPUTED = 24.15 / 16.45
_HOST_TOKENS = 500
_WASTE = 1.1  # padding from which packing is worth another order of rows


@dataclass(frozen=True)
class Fit:
    """Settings that fit: overrides to add to `phi3-lora train RECIPE ...`, and the plan with them."""

    overrides: tuple[str, ...]
    plan: Plan


@dataclass(frozen=True)
class _Settings:
    batch: int
    accumulation: int
    packing: bool
    checkpointing: bool | str
    quantize: str

    def overrides(self, now: _Settings) -> tuple[str, ...]:
        named = {
            "data.packing": (self.packing, now.packing),
            "model.quantize": (self.quantize, now.quantize),
            "training.per_device_train_batch_size": (self.batch, now.batch),
            "training.gradient_accumulation_steps": (self.accumulation, now.accumulation),
            "training.activation_checkpointing": (self.checkpointing, now.checkpointing),
        }
        return tuple(
            f"{key}={str(new).lower() if isinstance(new, bool) else new}"
            for key, (new, old) in named.items()
            if new != old
        )


def fit(now: Plan, replan: Callable[[Sequence[str]], Plan], room: int) -> Fit | None:
    """The fastest settings that fit into `room` bytes; None if there are none.

    Quantisation changes the model that is trained, so it is tried only where nothing else fits. Else the order is by
    time: packing where padding is a tenth of the tokens or more, gradient checkpointing off, large micro-batches.

    Args:
        now: the plan of the recipe as it is.
        replan: makes the plan with some overrides more.
    """
    auto = now.chosen is not None  # which has found the best for a micro-batch: only its size is left to be tried
    start = _Settings(now.batch, now.accumulation, now.packing, AUTO if auto else now.checkpointing, now.quantize)

    def tried(settings: _Settings) -> Fit | None:
        overrides = settings.overrides(start)
        made = replan(overrides) if overrides else now
        return Fit(overrides, made) if made.fits_into(room) else None

    for quantize in dict.fromkeys((now.quantize, "nf4")):
        found: list[tuple[float, Fit]] = []
        for checkpointing in (False, AUTO if auto else True):
            choices = [_Settings(*sizes, checkpointing, quantize) for sizes in _sizes(now)]
            best = _largest(choices, tried)
            if best is not None:
                found.append((_cost(best.plan), best))
                if best.plan.batch == choices[0].batch:
                    break  # no larger step is possible: recomputing would only take time
        if found:
            return min(found, key=lambda each: each[0])[1]
    return None


def _largest(choices: Sequence[_Settings], tried: Callable[[_Settings], Fit | None]) -> Fit | None:
    """The first of `choices`, largest micro-batch first, that fits; what fits at one size fits at all smaller ones."""
    best = tried(choices[0])  # where there is room enough, this is all
    if best is not None or len(choices) == 1:
        return best
    low, high = 1, len(choices) - 1
    best = tried(choices[high])
    while best is not None and low < high:
        middle = (low + high) // 2
        better = tried(choices[middle])
        if better is None:
            low = middle + 1
        else:
            best, high = better, middle
    return best


def _sizes(now: Plan) -> Iterator[tuple[int, int, bool]]:
    """(batch, accumulation, packing) with the rows, or about the tokens, of a step as they are; large batches first."""
    packing, step = now.packing, now.batch * now.accumulation
    padded = now.batch * now.accumulation * now.width
    if not packing and now.rows is not None and padded > _WASTE * now.tokens_per_step:
        packing, step = True, max(1, round(now.tokens_per_step / now.width))
    for batch in range(step, 0, -1):
        if step % batch == 0:
            yield batch, step // batch, packing


def _cost(made: Plan) -> float:
    """Relative time a token."""
    recomputed = 1 + (_RECOMPUTED - 1) * made.recomputed_share
    micro = made.tokens_per_step / made.accumulation
    return recomputed * (1 + _HOST_TOKENS / max(1.0, micro))
