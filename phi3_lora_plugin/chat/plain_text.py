"""Rows of plain text -> token ids and labels: no template, no turns; what the text says is what is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from phi3_lora_plugin.chat.marks import token_weights
from phi3_lora_plugin.chat.templates import Template
from phi3_lora_plugin.model.tokenizer import whole_texts


def encode_text(turn: Mapping[str, Any], tokenizer: Any, kind: Template) -> tuple[list[int], list[float]]:
    """Ids of a text, and how much each of them is to be learned.

    Around a text stand the token that begins the model's chats, if there is one, and the one that ends a text, which is
    learned; around segments, whose author wrote what belongs there, nothing.
    """
    text = turn["content"]
    encoding = whole_texts(tokenizer).encode(text, add_special_tokens=False)
    ids = list(encoding.ids)
    much = 0.0 if turn.get("train") is False else turn.get("weight", 1.0)
    weights = [much] * len(ids)
    if turn.get("spans"):
        weights = [much * weight for weight in token_weights(turn["spans"], text, encoding.offsets, 0, len(text))]
    if turn.get("as_it_is"):
        return ids, weights
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    if begin is not None and "bos_token" in kind.text and ids[:1] != [begin]:
        ids, weights = [begin, *ids], [0.0, *weights]
    if end is not None and ids[-1:] != [end]:
        ids, weights = [*ids, end], [*weights, much]
    return ids, weights
