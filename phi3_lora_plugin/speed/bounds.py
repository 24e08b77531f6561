"""Where the documents of a batch begin and end: found once a step, on the host, from what a batch says of itself."""

# Imported only inside functions, like everything that is heavy.
from __future__ import annotations

from typing import Any

import torch  # noqa: TID253

from phi3_lora_plugin.error import Phi3LoraError
from phi3_lora_plugin.speed.varlen_kernels import Kernels


class PackingError(Phi3LoraError):
    """A batch holds packed documents that stock code would let see each other."""


class Documents:
    """The documents of one row of tokens, as all layers get them in one step.

    A plain object on purpose: wrappers that walk through arguments (FSDP, DeepSpeed) hand it on as it is.
    """

    __slots__ = ("bounds", "kernels", "limits", "longest")

    def __init__(self, bounds: list[int], device: torch.device, kernels: Kernels) -> None:
        """`bounds`: first token of each document, and the end: [0, ..., tokens]."""
        self.bounds = tuple(bounds)
        self.longest = max(stop - start for start, stop in zip(bounds, bounds[1:], strict=False))
        limits = torch.tensor(bounds, dtype=torch.int32)
        # From pinned memory the host does not wait for the card.
        self.limits = limits.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else limits.to(device)
        self.kernels = kernels


def packed(given: Any, position_ids: Any, starts: Any, real: torch.Tensor | None = None) -> list[int] | None:
    """[documents + 1] bounds over all rows end to end, if a row holds several documents; None if each is one.

    Args:
        given: ids [rows, tokens] or embeddings [rows, tokens, width].
        starts: `cu_seq_lens_q` as transformers' collators name it, or None.
        real: [rows, tokens] on the CPU: what is text. Positions that jump in padding, or at its edge, part nothing.

    Raises:
        PackingError: the bounds do not fit the row.
    """
    rows, tokens = given.shape[:2]
    if starts is not None:
        bounds = [int(bound) for bound in starts.tolist()]
        if rows != 1 or bounds[0] != 0 or bounds[-1] != tokens:
            raise PackingError(
                f"packed documents end at {bounds[-1]} in {rows} row(s) of {tokens} tokens; expected one row"
            )
        return bounds
    if position_ids.dim() != 2 or position_ids.shape[1] != tokens:
        return None
    new = position_ids.cpu().diff(dim=1).ne(1)  # transformers' own sign of a new document
    if real is not None and real.shape == given.shape[:2]:
        new = new & real[:, 1:] & real[:, :-1]
    if not bool(new.any()):
        return None
    first = torch.ones_like(new[:, :1])
    flat = torch.cat([first, new], dim=1).expand(rows, tokens).reshape(-1)
    return [*flat.nonzero().flatten().tolist(), rows * tokens]


def refuse_mask(mask: Any, given: Any) -> None:
    """Raise `PackingError` if a mask came along with packed documents."""
    if mask is None:
        return
    raise PackingError(
        f"attention_mask {tuple(mask.shape)} came along with documents packed into {given.shape[0]} row(s): beside it "
        "transformers ignores where documents begin and lets them see each other; leave attention_mask out of the batch"
    )


def right_padded(real: torch.Tensor) -> list[int] | None:
    """Tokens of each row [rows, tokens], if padding stands on the right only."""
    if bool((real[:, 1:] & ~real[:, :-1]).any()):
        return None
    return [int(count) for count in real.sum(dim=1).tolist()]
