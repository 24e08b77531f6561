"""Which tokens belong to which turn: told by control tokens exactly as by the offsets of every token."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, normalizers

from phi3_lora_plugin import load_tokenizer
from phi3_lora_plugin.chat import boundaries
from phi3_lora_plugin.chat.boundaries import tokenise
from phi3_lora_plugin.chat.encode import _tokens
from phi3_lora_plugin.chat.templates import TEMPLATES, render, template_for

REAL = ["phi-3-mini-4k-instruct", "phi-3-mini-128k-instruct-apr2024", "phi-3-medium-4k-instruct"]
WORDS = st.sampled_from(
    ["", " ", "\n", "\n\n", "\t", "a", " the fox", "paris.", "ü", "😀", "\x1c", "\u2028", "< |end|>", "<unk"]
)
CHATS = st.lists(st.lists(WORDS, max_size=4).map("".join), min_size=2, max_size=6)


def rendered(chats: Sequence[Sequence[str]], tokenizer: Any, template: str) -> tuple[list[str], list[list[Any]]]:
    roles = ("user", "assistant")
    turns = [[{"role": roles[n % 2], "content": text} for n, text in enumerate(chat)] for chat in chats]
    return render(TEMPLATES[template].turns, turns, _tokens(tokenizer), marked=True)


def lowercase() -> Any:
    """A tokenizer whose control tokens are looked for in normalised text."""
    tokenizer = tiny.tokenizer()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in state["added_tokens"]:
        token["normalized"] = True
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
    before = tokenizer._tokenizer.normalizer
    tokenizer._tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), before])
    return tokenizer


def words_only() -> Any:
    """A tokenizer with an added token that is not found inside of words."""
    tokenizer = tiny.tokenizer()
    word = AddedToken("fox", single_word=True, normalized=False)
    tokenizer.add_tokens([word, AddedToken("paris", lstrip=True, rstrip=True, normalized=False)])
    return tokenizer


def unknown() -> Any:
    """A tokenizer that gives <unk>, an added token, for what it does not know, and misses one that stands in a word."""
    tokenizer = words_only()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["byte_fallback"] = False
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
    return tokenizer


TINY = {
    "swallows": tiny.tokenizer(rstrip=True),
    "does not": tiny.tokenizer(rstrip=False),
    "normalised": lowercase(),
    "words": words_only(),
    "unknown": unknown(),
}


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize("template", ["phi-3-mini-4k", "phi-3-medium", "phi-3.5-mini", "plain"])
@settings(max_examples=60)
@given(chats=st.lists(CHATS, min_size=1, max_size=3))
def test_turns_are_the_same_with_and_without_offsets(kind: str, template: str, chats: list[list[str]]) -> None:
    texts, spans = rendered(chats, TINY[kind], template)
    assert tokenise(texts, spans, TINY[kind]) == tokenise(texts, spans, TINY[kind], fast=False)


@pytest.mark.parametrize("name", REAL)
def test_real_tokenizers_need_no_offsets_and_give_the_same(
    shared_data: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(shared_data / "tokenizers" / name)
    contents = ["", " ", "\n", " \n x", "a\n\n", "ü😀", "def f():\n    return 1\n", "\x1c", "\u00a0x"]
    chats = [[one, other, other, one] for one in contents for other in contents]
    texts, spans = rendered(chats, tokenizer, template_for(tokenizer).name)
    want = tokenise(texts, spans, tokenizer, fast=False)
    by_offsets = []
    slow = boundaries._by_offsets
    monkeypatch.setattr(boundaries, "_by_offsets", lambda texts, *rest: by_offsets.extend(texts) or slow(texts, *rest))
    assert tokenise(texts, spans, tokenizer) == want
    assert not by_offsets or not tokenizer.added_tokens_decoder[tokenizer.convert_tokens_to_ids("<|user|>")].rstrip


@pytest.mark.slow
@pytest.mark.parametrize("kind", TINY)
@settings(max_examples=100)
@given(chats=st.lists(CHATS, min_size=1, max_size=2), data=st.data())
def test_any_spans_are_the_same_with_and_without_offsets(kind: str, chats: list[list[str]], data: Any) -> None:
    texts, _ = rendered(chats, TINY[kind], "phi-3-mini-4k")
    spans = []
    for text in texts:
        spots = st.sampled_from([m.end() + n for m in re.finditer(r"<\|\w+\|>", text) for n in (0, 1)])
        cuts = sorted(data.draw(st.sets(st.integers(0, len(text)) | spots, min_size=2, max_size=6)))
        spans.append(list(zip(cuts[::2], cuts[1::2], strict=False)))
    assert tokenise(texts, spans, TINY[kind]) == tokenise(texts, spans, TINY[kind], fast=False)


def test_as_many_control_tokens_in_the_text_as_among_the_ids_are_not_yet_the_same_ones() -> None:
    tokenizer = TINY["unknown"]
    texts, spans = rendered([["foxes", "ü"], ["ü", "foxes"]], tokenizer, "phi-3-mini-4k")
    made = tokenise(texts, spans, tokenizer)
    assert tokenizer.unk_token_id in made[0][0] and made == tokenise(texts, spans, tokenizer, fast=False)


def test_what_does_not_add_up_is_left_to_the_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    slow = boundaries._by_offsets
    monkeypatch.setattr(boundaries, "_by_offsets", lambda texts, *rest: asked.extend(texts) or slow(texts, *rest))
    tokenizer = TINY["words"]
    texts, spans = rendered([["a fox", "b"], ["foxes", "b"], ["b", "c"]], tokenizer, "phi-3-mini-4k")
    made = tokenise(texts, spans, tokenizer)
    assert asked == [texts[1]]  # looks like a control token, and is none inside a word
    assert made == tokenise(texts, spans, tokenizer, fast=False)
    asked.clear()
    texts, spans = rendered([["a", "b"]], TINY["does not"], "phi-3-mini-4k")
    tokenise(texts, spans, TINY["does not"])
    assert asked == texts  # whether the line break before a turn joins what follows, only offsets know
