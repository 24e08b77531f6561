"""Where the documents of a batch begin and end: found once a step, on the host, from the batch's own tensors."""

# Imported only inside functions, like everything that is heavy.
from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from itertools import pairwise
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
        self.limits = to_device(torch.tensor(bounds, dtype=torch.int32), device)
        self.kernels = kernels


@dataclass(frozen=True)
class Facts:
    """The facts that a batch carries about itself, read to the host at once: each read waits for the card."""

    of: tuple[Any, ...] = ()
    """The tensors that were read: labels, attention_mask, cu_seq_lens_q, position_ids."""
    real: torch.Tensor | None = None
    """[rows, tokens]: where attention_mask has text; None without a mask of that shape."""
    supervised: torch.Tensor | None = None
    """[rows, tokens]: where labels are not -100."""
    starts: list[int] | None = None
    """`cu_seq_lens_q`, as transformers' collators name it."""
    positions: torch.Tensor | None = None
    """[rows, tokens]"""

    def are_of(self, mask: Any, starts: Any, positions: Any) -> bool:
        """Whether these are the facts of these tensors, and of whichever labels."""
        return len(self.of) == 4 and all(a is b for a, b in zip(self.of[1:], (mask, starts, positions), strict=True))

    def counted(self) -> tuple[Any, int] | None:
        """(the tensor that tells it, how many tokens are no padding); None if nothing tells."""
        if self.real is not None:
            return self.of[1], int(self.real.sum())
        return (self.of[2], self.starts[-1]) if self.starts else None

    def trains_padding(self) -> bool:
        """Whether what is padding for attention is text for the loss."""
        if self.real is None or self.supervised is None or self.real.shape != self.supervised.shape:
            return False
        return bool((self.supervised & ~self.real).any())


#: What is known of the batch that a model is called with, from its pre-hook to its decoder: each thread has its own.
facts_of_call: ContextVar[Facts] = ContextVar("facts_of_call", default=Facts())  # noqa: B039 (it is frozen)


def facts(labels: Any, mask: Any, starts: Any, positions: Any) -> Facts:
    """Read what there is; see `Facts`."""
    parts: dict[str, torch.Tensor] = {}
    if torch.is_tensor(mask) and mask.dim() == 2 and not mask.dtype.is_floating_point:
        parts["real"] = mask != 0
    if torch.is_tensor(labels) and labels.dim() == 2:
        parts["supervised"] = labels != -100
    if torch.is_tensor(starts):
        parts["starts"] = starts
    if torch.is_tensor(positions) and positions.dim() == 2:
        parts["positions"] = positions
    found: dict[str, Any] = {}
    if len({part.device for part in parts.values()}) == 1 and len(parts) > 1:
        together = torch.cat([part.reshape(-1).to(torch.int32) for part in parts.values()]).cpu()
        for (name, part), flat in zip(
            parts.items(), together.split([part.numel() for part in parts.values()]), strict=True
        ):
            found[name] = flat.view(part.shape)
    else:
        found = {name: part.cpu() for name, part in parts.items()}
    for name in {"real", "supervised"} & set(found):
        found[name] = found[name].bool()
    if "starts" in found:
        found["starts"] = found["starts"].tolist()
    return Facts((labels, mask, starts, positions), **found)


def packed(given: Any, known: Facts) -> list[int] | None:
    """[documents + 1] bounds over all rows end to end, if a row holds several documents; None if each is one.

    Args:
        given: ids [rows, tokens] or embeddings [rows, tokens, width].

    Raises:
        PackingError: the bounds do not fit the row.
    """
    rows, tokens = given.shape[:2]
    if known.starts is not None:
        return _filled(known.starts, rows, tokens)
    if known.positions is None or known.positions.shape[1] != tokens:
        return None
    new = known.positions.diff(dim=1).ne(1)  # transformers' own sign of a new document
    if known.real is not None and known.real.shape == (rows, tokens):
        new = new & known.real[:, 1:] & known.real[:, :-1]  # positions that jump in padding separate nothing
    if not bool(new.any()):
        return None
    first = torch.ones_like(new[:, :1])
    flat = torch.cat([first, new], dim=1).expand(rows, tokens).reshape(-1)
    return [*flat.nonzero().flatten().tolist(), rows * tokens]


def _filled(starts: list[int], rows: int, tokens: int) -> list[int]:
    """The bounds without documents that hold no token; raises `PackingError` where they are no bounds of one row."""
    if rows != 1 or starts[:1] != [0] or starts[-1] != tokens:
        raise PackingError(
            f"packed documents end at {starts[-1] if starts else 'no token'} in {rows} row(s) of {tokens} tokens; "
            "expected one row that they begin and end with"
        )
    if back := next((pair for pair in pairwise(starts) if pair[1] < pair[0]), None):
        raise PackingError(f"cu_seq_lens_q goes back from {back[0]} to {back[1]}; expected the end of each document")
    return [start for start, stop in pairwise(starts) if start < stop] + [tokens]


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host on the device; from pinned memory, so that the host does not wait for a card."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def refuse_mask(mask: Any, given: Any) -> None:
    """Raise `PackingError` if a mask of padding came along with packed documents."""
    if mask is None:
        return
    raise PackingError(
        f"attention_mask {tuple(mask.shape)} came along with documents packed into {given.shape[0]} row(s): with it "
        "transformers ignores where documents begin and lets them see each other; leave attention_mask out of the batch"
    )


def right_padded(real: torch.Tensor) -> list[int] | None:
    """Tokens of each row [rows, tokens], if padding is on the right only."""
    if bool((real[:, 1:] & ~real[:, :-1]).any()):
        return None
    return [int(count) for count in real.sum(dim=1).tolist()]
