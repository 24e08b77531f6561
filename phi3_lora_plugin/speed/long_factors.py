"""Longrope by document: each has the embeddings that it has alone, whatever it shares a batch or a pack with."""

# Imported only inside functions, like everything that is heavy.
from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from threading import Lock
from typing import Any

import torch  # noqa: TID253

from phi3_lora_plugin.model.families import rope_of
from phi3_lora_plugin.speed.bounds import Documents, Facts, to_device

#: What `long_tokens` gave for the row that a decoder runs on; each thread has its own.
long_of_call: ContextVar[torch.Tensor | None] = ContextVar("long_of_call", default=None)


def switches(decoder: Any, known: Facts, lengths: Sequence[int], width: int) -> bool:
    """Whether only the padding exceeds the original context, after which stock longrope takes its long factors."""
    limit = decoder.rotary_emb._original_context
    if limit is None:
        return False
    text, all_of_it = max(lengths), width
    if known.positions is not None and known.real is not None:
        text = int(known.positions.expand(known.real.shape)[known.real].max()) + 1
        all_of_it = int(known.positions.max()) + 1
    return bool(text <= limit < all_of_it)


def original_context(config: Any) -> int | None:
    """The number of tokens after which longrope takes its long factors; None for other embeddings."""
    rope = rope_of(config.to_dict())
    return int(rope["original_max_position_embeddings"]) if rope["rope_type"] == "longrope" else None


def long_tokens(decoder: Any, documents: Documents, known: Facts) -> torch.Tensor | None:
    """[tokens] whether longrope's long factors hold there, if they hold in some documents and not in others.

    Stock takes them for all of a batch if one document exceeds the original context; here a document has the
    embeddings that it has alone, whatever it is packed with.
    """
    limit = decoder.rotary_emb._original_context
    if limit is None:
        return None
    stops = torch.tensor(documents.bounds[1:])
    ends = stops - 1
    if known.positions is not None:
        tokens = documents.bounds[-1]
        ends = known.positions.expand(tokens // known.positions.shape[1], -1).reshape(-1)[ends]
    long = ends >= limit
    if not bool(long.any()) or bool(long.all()):
        return None
    return to_device(long.repeat_interleave(torch.tensor(documents.bounds).diff()), documents.limits.device)


#: Stock longrope writes the factors of a call into the module and then reads them there.
_switching = Lock()


def rotary_forward(self: Any, x: Any, position_ids: Any) -> Any:
    """(cos, sin), each [1, tokens, rotated], as the stock forward gives them for the documents of `long_of_call`."""
    if torch.compiler.is_compiling():
        return self._stock_forward(x, position_ids)
    long = long_of_call.get()
    with _switching:
        if long is None:
            return self._stock_forward(x, position_ids)
        short = self._stock_forward(x, position_ids.masked_fill(long, 0))
        both = zip(self._stock_forward(x, position_ids), short, strict=True)
    return tuple(torch.where(long[None, :, None], mine, other) for mine, other in both)
