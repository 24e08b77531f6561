"""What a forward was called with, by name, whichever way it came."""

from __future__ import annotations

import inspect
from typing import Any


def by_name(kind: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of `kind.forward` as keywords."""
    if not args:
        return kwargs
    names = list(inspect.signature(kind.forward).parameters)[1:]  # type: ignore[attr-defined]
    return dict(zip(names, args, strict=False)) | kwargs
