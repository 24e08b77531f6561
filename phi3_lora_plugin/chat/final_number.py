"""The number that an answer ends on, however it is written: after `####`, in `\\boxed{}`, or the last one there is."""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

from phi3_lora_plugin.chat.thoughts import CLOSE, OPEN

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
#: A sign that belongs to the number stands before it and not after another; `a/b` is one number, `a/b/c` none.
_NUMBER = re.compile(
    rf"(?P<sign>(?<![\w)\]%.])[-+](?=[$€£¥0-9.])|(?<![\w)\]%])[$€£¥][-+])?[$€£¥]?\s?"
    rf"(?<![\w.])(?<![0-9]/)(?P<value>{_DIGITS})(?P<exponent>[eE][-+]?[0-9]{{1,3}}(?!\w))?(?![eE][-+]?[0-9])"
    rf"(?:\s?/\s?(?P<below>[0-9]+)(?![\w/]|\.[0-9]))?"
)
_FRACTION = re.compile(r"\\[dt]?frac\s*\{?\s*([0-9]+)\s*\}?\s*\{?\s*([0-9]+)\s*\}?")
_MOST = 200  # digits of a number; a longer one is not an answer
_REPLACED = (("\\$", "$"), ("\\%", "%"), ("\\,", ""), ("\\!", ""), ("{,}", ","), ("−", "-"), ("–", "-"), ("\\ ", " "))


def final_number(text: str) -> Fraction | None:
    """The number after the last `####` or in the last `\\boxed{}`, whichever comes later, else the last in the text.

    Read are signs, thousands (`1,234`), decimals, fractions (`3/4`, `\\frac{3}{4}`), exponents, currencies, percent
    signs and units around it (which are not converted). None where there is none, or thoughts are not closed.
    """
    said = answer_of(text)
    if said is None:
        return None
    for replaced, by in _REPLACED:
        said = said.replace(replaced, by)
    said = unicodedata.normalize("NFKC", said)
    marker, boxed = said.rfind("####"), said.rfind("\\boxed")
    if marker < 0 and boxed < 0:
        return _number(said, -1)
    if marker > boxed:
        return _number(said[marker:].lstrip("#"), 0)
    return _number(_in_braces(said[boxed + len("\\boxed") :]), 0)


def answer_of(text: str) -> str | None:
    """What is said behind the thoughts; None where they are opened and not closed."""
    behind = text.rpartition(CLOSE)[2]
    return None if OPEN in behind else behind


def _in_braces(text: str) -> str:
    """What stands in the braces that a text opens with; as `\\boxed 5`, the first word."""
    text = text.lstrip()
    if not text.startswith("{"):
        return text.split()[0] if text.split() else ""
    depth = 0
    for place, letter in enumerate(text):
        depth += {"{": 1, "}": -1}.get(letter, 0)
        if depth == 0:
            return text[1:place]
    return text[1:]


def _number(text: str, place: int) -> Fraction | None:
    """The first (0) or the last (-1) number in a text."""
    found = list(_NUMBER.finditer(_plain(text)))
    return _value(found[place]) if found else None


def _plain(text: str) -> str:
    """A text with LaTeX's fractions as `a/b`."""

    def written(found: re.Match[str]) -> str:
        before = " " if found.string[: found.start()][-1:].isdigit() else ""
        return f"{before}{found[1]}/{found[2]} "

    return _FRACTION.sub(written, text)


def _value(found: re.Match[str]) -> Fraction | None:
    digits = found["value"].replace(",", "")
    below = found["below"]
    if len(digits) > _MOST or (below is not None and (len(below) > _MOST or not int(below))):
        return None
    value = Fraction(digits + (found["exponent"] or ""))
    if below is not None:
        value /= int(below)
    return -value if "-" in (found["sign"] or "") else value
