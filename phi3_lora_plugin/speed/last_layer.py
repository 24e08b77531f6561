"""The last layer at supervised positions only: after its attention no other position has a part in the loss.

The loss says with its call of the decoder which positions it wants, and the request reaches the last layer as documents
reach all of them. What comes back is [1, supervised, hidden] in place of [rows, tokens, hidden]; who asked sees by that
shape whether the request was met, and every layer in an unusual state gives all positions as ever.
"""

# Imported only inside functions, like everything that is heavy.
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch  # noqa: TID253

from phi3_lora_plugin.speed.bounds import facts_of_call, to_device
from phi3_lora_plugin.speed.decoder_layer import FastDecoderLayer, watched
from phi3_lora_plugin.speed.documents import draws, reads_documents, wants_more
from phi3_lora_plugin.speed.shards import say_once

_MOST = 0.9  # of the positions; where more are supervised, taking them costs what it saves


@dataclass(frozen=True)
class Supervised:
    """The request of one call, to one layer."""

    layer: torch.nn.Module
    positions: torch.Tensor
    """Of what the layer is given, on the host: true where the loss looks at what the layer gives."""

    def among(self, real: torch.Tensor) -> Supervised:
        """The same of fewer positions, those that are `real` [rows, tokens]."""
        return Supervised(self.layer, self.positions[real])

    def index(self, device: torch.device) -> torch.Tensor:
        """[supervised] places among all positions."""
        return to_device(self.positions.flatten().nonzero().flatten(), device)


def last_layer_obstacle(base: Any) -> str | None:
    """Why the last layer of this causal model (PEFT taken off) works on all positions; None if it need not."""
    decoder = getattr(base, "model", base)
    fused = {
        "loss": "_stock_forward" in base.__dict__ or "_trl_forward" in base.__dict__,
        "attention": reads_documents(decoder),
        "layers": all(isinstance(layer, FastDecoderLayer) for layer in getattr(decoder, "layers", ())),
    }
    missing = [part for part, on in fused.items() if not on]
    if missing:
        return f"it needs what is off: {', '.join(missing)}"
    if draws(decoder):
        return "dropout draws its numbers for every position"
    if any(watched(module) for module in (decoder, decoder.norm, *_last(decoder).modules())):
        return "hooks on the last layer or behind it, or forwards of their own, want every position"
    return None


def request(base: Any, supervised: torch.Tensor | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What to add to a call of the decoder of `base` for supervised positions alone; nothing where all are wanted.

    Args:
        supervised: [rows, tokens], on the host, where hidden states are wanted; None if only the card knows.
        kwargs: of the call.
    """
    decoder = base.model
    if torch.compiler.is_compiling() or "_last_layer" not in decoder.__dict__:  # it would compile for each number
        return {}
    if supervised is None or not decoder.training:
        return {}
    known = facts_of_call.get().real
    real = supervised.numel() if known is None else int(known.sum())
    if not 0 < int(supervised.sum()) <= _MOST * real or wants_more(decoder, kwargs):
        return {}
    if obstacle := last_layer_obstacle(base):
        say_once(f"last_layer: it works on all positions: {obstacle}")
        return {}
    return {"supervised": Supervised(_last(decoder), supervised)}


def _last(decoder: Any) -> Any:
    return decoder.layers[decoder.config.num_hidden_layers - 1]
