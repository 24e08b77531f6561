"""JSON in which no object has a key twice: of two values, Python's reader keeps the last, and the first is lost."""

from __future__ import annotations

import json
from typing import Any

from phi3_lora_plugin.error import Phi3LoraError


class TwiceError(Phi3LoraError):
    """An object has one key twice, with values that differ."""


class Keys:
    """Makes the objects of one reading of JSON, as `object_pairs_hook`, and remembers those that have a key twice."""

    def __init__(self) -> None:
        self.twice: list[tuple[dict[str, Any], str]] = []

    def __call__(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            lost = next((key for key, value in pairs if made[key] is not value and made[key] != value), None)
            if lost is not None:
                self.twice.append((made, lost))
        return made

    def within(self, value: Any) -> str | None:
        """Say which key stands twice somewhere in `value`, which this made; None if none does."""
        if not self.twice:
            return None
        keys = {id(made): key for made, key in self.twice}
        left = [value]
        while left:
            one = left.pop()
            if id(one) in keys:
                return _twice(keys[id(one)])
            left += one.values() if isinstance(one, dict) else one if isinstance(one, list) else ()
        return None


def _twice(key: str) -> str:
    return f"has the key {key!r} twice in one object, with values that differ; keep one"


def loads(text: str) -> Any:
    """As `json.loads`; raises `TwiceError`, a ValueError, as well."""
    keys = Keys()
    value = json.loads(text, object_pairs_hook=keys)
    if keys.twice:
        raise TwiceError(_twice(keys.twice[0][1]))
    return value
