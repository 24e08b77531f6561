"""A tiny pretrained Phi-3 and its chats, so that everything can be tried offline."""

from __future__ import annotations

from pathlib import Path

from phi3_lora_plugin.error import Phi3LoraError

PREFIX = "embedded:"


class EmbeddedError(Phi3LoraError):
    """A name after `embedded:` that nothing shipped with the package has."""


def locate(path: str | Path) -> str:
    """The folder or file that `embedded:NAME` means; any other path or hub id as it is.

    Raises:
        EmbeddedError: no such thing ships with the package; lists what does.
    """
    text = str(path)
    if not text.startswith(PREFIX):
        return text
    home = Path(__file__).parent
    found = (home / text.removeprefix(PREFIX)).resolve()
    if not found.is_relative_to(home) or found == home or not found.exists():
        there = sorted(
            f"{PREFIX}{entry.relative_to(home)}" for entry in [*home.glob("*/"), *home.glob("chats/*.jsonl")]
        )
        raise EmbeddedError(f"{text}: not shipped with this package; available: {', '.join(there)}")
    return str(found)
