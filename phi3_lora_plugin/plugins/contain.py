"""Run a plugin's code so that what it raises, prints or names can harm only itself."""

from __future__ import annotations

import os
import re
import sys
import traceback
from contextlib import AbstractContextManager, redirect_stdout, suppress
from importlib import metadata
from typing import Any

import pluggy

LIMIT = 400  # characters of a plugin's text in one message of ours
#: CSI and OSC sequences of ECMA-48, whole, and whatever else follows an escape character.
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|.)?|\x9b[0-?]*[ -/]*[@-~]", re.DOTALL)


def prints_on_stderr() -> AbstractContextManager[Any]:
    """Send what is printed to stderr: the stdout of a command is for its own output, such as JSON."""
    return redirect_stdout(sys.stderr)


def clean(text: Any, limit: int = LIMIT) -> str:
    """A plugin's text in one line: at most `limit` characters, no escape codes, nothing unprintable."""
    with suppress(Exception):
        start = _ESCAPES.sub("", str.__getitem__(text, slice(8 * limit)))
        words = " ".join("".join(c if c.isprintable() else " " for c in start).split())
        return words if len(words) <= limit else words[: limit - 3] + "..."
    return "?"


def shown(value: Any) -> str:
    """`repr(value)`, cleaned; the name of its class where even that raises."""
    try:
        return clean(repr(value))
    except KeyboardInterrupt:
        raise
    except BaseException:
        return f"an object of class {clean(type(value).__name__)}"


def describe(error: BaseException) -> str:
    """Type, message and, where a plugin's own code raised, the line; whatever is odd about the exception."""
    kind = clean(type(error).__name__, 100)
    try:
        message = clean(str(error))
    except KeyboardInterrupt:
        raise
    except BaseException as worse:
        message = f"its message cannot be shown: {clean(type(worse).__name__, 100)}"
    text = f"{kind}: {message}" if message else kind
    with suppress(Exception):
        last = traceback.extract_tb(error.__traceback__)[-1:]
        libraries = (os.path.dirname(pluggy.__file__), os.path.dirname(os.path.dirname(metadata.__file__)))
        if last and not last[0].filename.startswith((os.path.dirname(__file__), "<", *libraries)):
            text += f" ({clean(last[0].filename)}:{last[0].lineno})"
    return text


def add_note(error: BaseException, note: str) -> None:
    """`error.add_note`, where the exception allows it."""
    with suppress(Exception):
        BaseException.add_note(error, note)
