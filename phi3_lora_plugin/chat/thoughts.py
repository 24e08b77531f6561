"""What the assistant thought before it spoke: how data sets hold it, and the tags in which the models write it.

Phi-4-reasoning and Phi-4-mini-reasoning write `<think>...</think>` before their answer, as DeepSeek-R1 does, and
servers read it with a parser of that kind. No template of the family drops the thoughts of earlier turns.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

#: Keys of a message: of OpenAI-compatible servers and DeepSeek, of vLLM and TRL, of Anthropic.
THOUGHTS = ("reasoning_content", "reasoning", "thinking")

OPEN, CLOSE = "<think>", "</think>"
# The opening tag may be missing, as a prompt that ends with it leaves it out of the answer; the closing one then has to
# stand on a line of its own, or it is something that the answer is about.
_BLOCK = re.compile(r"\s*<think>.*?</think>\s*|(?:(?!<think>).)*?\n</think>\s*(?:\n|\Z)\s*", re.DOTALL)


def tagged(thoughts: str) -> str:
    """The thoughts in their tags, with the white space that the models put around them."""
    return f"{OPEN}\n{thoughts}\n{CLOSE}\n\n"


def inline(text: str) -> tuple[str | None, str]:
    """The thoughts at the beginning of an answer, tags and all, and the rest; None where there are none."""
    if CLOSE not in text:
        return None, text
    found = _BLOCK.match(text)
    return (found.group(), text[found.end() :]) if found else (None, text)


def hidden(pieces: Iterable[str]) -> Iterator[str]:
    """Pieces of an answer as they come, without the thoughts before it."""
    held = ""
    answering = False
    for piece in pieces:
        if answering:
            yield piece
            continue
        held += piece
        start = held.lstrip()
        if start.startswith(OPEN):
            thoughts, close, rest = held.partition(CLOSE)
            if close and (rest := rest.lstrip()):
                answering = True
                yield rest
        elif not OPEN.startswith(start[: len(OPEN)]):
            answering = True
            yield held
    if not answering and not held.lstrip().startswith(OPEN):
        yield held


def without_tags(block: str) -> str:
    """A block of thoughts without the tags around it, as long as it was and at the same places: blanks for tags."""
    text = block.replace(OPEN, " " * len(OPEN), 1)
    at = text.rfind(CLOSE)
    return text if at < 0 else text[:at] + " " * len(CLOSE) + text[at + len(CLOSE) :]
