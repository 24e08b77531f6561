"""Texts with marked turns -> ids, and which of them belong to which turn.

Offsets of every token cost a third of tokenising, and only a few of them matter: those at the ends of turns. Control
tokens stand there, which no text of a message can hold, so the n-th of them in the text is the n-th among the ids.
Wherever that does not decide, or does not add up, the offsets do.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from phi3_lora_plugin.chat.prepare import control_pattern
from phi3_lora_plugin.chat.templates import Span
from phi3_lora_plugin.model.tokenizer import whole_texts

Tokenised = tuple[list[int], list[Span]]


def tokenise(
    texts: Sequence[str], spans: Sequence[Sequence[Span]], tokenizer: Any, fast: bool = True
) -> list[Tokenised]:
    """Ids of each text, and for each of its spans of characters the range of tokens that start inside.

    Args:
        fast: without offsets where they can be done without; the result is the same.
    """
    backend = whole_texts(tokenizer)
    if not fast:
        return _by_offsets(texts, spans, backend)
    added = tokenizer.added_tokens_decoder
    known = {token.content: (number, token.rstrip) for number, token in added.items()}
    pattern = control_pattern(tokenizer)
    numbers = frozenset(added)
    made: list[Tokenised | None] = []
    for text, marked, encoding in zip(
        texts, spans, backend.encode_batch_fast(texts, add_special_tokens=False), strict=True
    ):
        ids = encoding.ids
        ranges = _by_control_tokens(text, marked, ids, pattern, known, numbers)
        made.append(None if ranges is None else (ids, ranges))
    rest = [index for index, one in enumerate(made) if one is None]
    slow = iter(_by_offsets([texts[index] for index in rest], [spans[index] for index in rest], backend))
    return [one if one is not None else next(slow) for one in made]


def _by_control_tokens(
    text: str,
    spans: Sequence[Span],
    ids: list[int],
    pattern: re.Pattern[str],
    known: Mapping[str, tuple[int, bool]],
    numbers: frozenset[int],
) -> list[Span] | None:
    """Ranges of tokens by the control tokens right before and at the end of each span; None if they do not tell."""
    places = [place for place, number in enumerate(ids) if number in numbers]
    found = list(pattern.finditer(text))
    if [known[match.group()][0] for match in found] != [ids[place] for place in places]:
        return None
    ranges = []
    at = 0
    for start, end in spans:
        while at < len(found) and found[at].end() <= start:
            at += 1
        if at == 0 or at == len(found):
            return None
        before = found[at - 1]
        gap = text[before.end() : start]
        swallows = known[before.group()][1]  # the white space after it, also where that is the span's own
        if gap and (gap.strip("\n ") or not swallows):
            return None
        first = places[at - 1] + 1
        while at < len(found) and found[at].end() < end:
            at += 1
        if at == len(found) or found[at].end() != end:
            return None
        ranges.append((first, places[at] + 1))
    return ranges


def _by_offsets(texts: Sequence[str], spans: Sequence[Sequence[Span]], backend: Any) -> list[Tokenised]:
    if not texts:
        return []
    encodings = backend.encode_batch(list(texts), add_special_tokens=False)
    return [
        (encoding.ids, [(_first_from(encoding, start), _first_from(encoding, end)) for start, end in marked])
        for encoding, marked in zip(encodings, spans, strict=True)
    ]


def _first_from(encoding: Any, character: int) -> int:
    """The first token that starts at `character` or after it."""
    token = encoding.char_to_token(character)
    if token is None:  # no token covers it: the end of the text, or white space that the tokenizer leaves out
        return next((index for index, (begin, _) in enumerate(encoding.offsets) if begin >= character), len(encoding))
    if encoding.token_to_chars(token)[0] < character:
        return int(token) + 1
    # Several tokens may begin at one character: the pieces of one that falls back to bytes, or a prefix of no width.
    while token > 0 and encoding.token_to_chars(token - 1)[0] >= character:
        token -= 1
    return int(token)
