"""Messages -> token ids and labels: ids as the model's own chat template gives them, labels from where tokens start.

A token is trained if it starts inside a trained turn, which is what the assistant says and the stop token after it.
Role tokens that swallow white space, in the revisions where they do, start before the turn and are never trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from phi3_lora_plugin.chat.boundaries import tokenise
from phi3_lora_plugin.chat.marks import token_weights
from phi3_lora_plugin.chat.plain_text import encode_text
from phi3_lora_plugin.chat.prepare import EncodeError as EncodeError
from phi3_lora_plugin.chat.prepare import Message, control_pattern, prepare
from phi3_lora_plugin.chat.prepare import Policy as Policy
from phi3_lora_plugin.chat.templates import Span, Template, render, template_for
from phi3_lora_plugin.model.tokenizer import whole_texts

IGNORE = -100


def encode(
    messages: Sequence[Message],
    tokenizer: Any,
    max_length: int | None = None,
    train_on: str = "assistant",
    system: str = "error",
    control_tokens: str = "error",
    template: str | None = None,
    tools: str = "error",
    tool_format: str = "auto",
    thoughts: str = "error",
) -> dict[str, Any]:
    """Encode one conversation.

    Args:
        messages: `{"role", "content"}`, roles system, user, assistant and tool; `"train": False` on what is not to be
            trained, `"weight"` and `"spans"` ([first, end, weight] over all its characters) where it is more or
            less, `"tools"` (text) on a system message. A single message of the role text stands without a template.
        tokenizer: from `load_tokenizer`, or any fast tokenizer of the family.
        max_length: ids beyond it are cut on the right.
        train_on: "assistant" (each of its turns), "last_turn" (its last), or "all" (what anybody says, never headers).
        system: "error", "fold" into the first user turn, or "drop", where the template has no place for it.
        control_tokens: "error" or "escape" (`<|end|>` becomes `< |end|>`), for control tokens in the text of a message.
        template: name of a template instead of the tokenizer's own.
        tools: "error", "text" (as user and system text) or "drop", where the template has no place for tools.
        tool_format: how calls are written, one of `tool_formats`; "auto" is what the model's own card says.
        thoughts: "error", "train", "context" (there, not trained) or "drop", for what was thought before an answer.

    Returns:
        {"input_ids": [...], "labels": [...]}; labels are -100 where nothing is trained. Where it is not all trained
        alike, also {"weights": [...]}, what the loss of each token is multiplied by.

    Raises:
        EncodeError: nothing in it can be trained, or it has what the template would drop or mistake.
        TemplateError: the template is unknown.
    """
    policy = Policy(train_on, system, tools, control_tokens, tool_format, thoughts)
    (row,) = encode_batch([messages], tokenizer, max_length=max_length, policy=policy, template=template)
    if isinstance(row, EncodeError):
        raise row
    return {name: row[name] for name in ("input_ids", "labels", "weights") if name in row}


def encode_batch(
    conversations: Sequence[Sequence[Message]],
    tokenizer: Any,
    max_length: int | None = None,
    policy: Policy | None = None,
    template: str | None = None,
) -> list[dict[str, Any] | EncodeError]:
    """Encode many conversations with one render and one call of the tokenizer; a failure takes its row's place.

    Returns:
        For each conversation `{"input_ids", "labels", "truncated": bool}`, maybe with "weights", or the `EncodeError`
        of `encode`.

    Raises:
        TemplateError: the template is unknown.
    """
    policy = policy or Policy()
    kind = template_for(tokenizer, template)
    prepared = list(_prepared(conversations, tokenizer, policy, kind))
    chats = [one for one in prepared if not isinstance(one, EncodeError) and not _is_text(one)]
    texts, spans = render(kind.turns, chats, _tokens(tokenizer), marked=True) if chats else ([], [])
    tokenised = iter(zip(texts, spans, tokenise(texts, spans, tokenizer), strict=True))
    stop = tokenizer.convert_tokens_to_ids(kind.stop or tokenizer.eos_token)
    rows: list[dict[str, Any] | EncodeError] = []
    for one in prepared:
        if isinstance(one, EncodeError):
            rows.append(one)
        elif _is_text(one):
            ids, much = encode_text(one[0], tokenizer, kind)
            rows.append(_cut(ids, _labels(ids, much), max_length, much))
        else:
            text, marked, (ids, ranges) = next(tokenised)
            labels = _of_chat(one, ids, ranges, kind, policy.train_on, stop)
            weights: list[float] = []
            if any("spans" in turn or "weight" in turn for turn in one):
                weights = _weights(one, text, marked, ids, ranges, kind, tokenizer)
                labels = _labels(labels, weights)
            row = _cut(ids, labels, max_length, weights)
            if any("thought" in turn for turn in one) and not isinstance(row, EncodeError) and row["truncated"]:
                row = _whole_thoughts(row, one, text, marked, kind, tokenizer)
            rows.append(row)
    return rows


def _prepared(
    conversations: Sequence[Sequence[Message]], tokenizer: Any, policy: Policy, kind: Template
) -> Iterator[list[dict[str, Any]] | EncodeError]:
    control = control_pattern(tokenizer)
    for conversation in conversations:
        try:
            yield prepare(conversation, kind, policy, control)
        except EncodeError as error:
            yield error


def encode_prompts(
    conversations: Sequence[Sequence[Message]], tokenizer: Any, policy: Policy, template: str | None = None
) -> list[list[int] | EncodeError]:
    """Ids to generate the next turn from, as `prompt_ids`, of many conversations; a failure takes its row's place."""
    kind = template_for(tokenizer, template)
    prepared: list[list[dict[str, Any]] | EncodeError] = []
    for made in _prepared(conversations, tokenizer, policy, kind):
        if not isinstance(made, EncodeError) and (not made or made[-1]["role"] == "assistant"):
            made = EncodeError("messages", "the next turn is not the assistant's; end with a user message")
        prepared.append(made)
    chats = [one for one in prepared if not isinstance(one, EncodeError)]
    texts = render(kind.text, chats, _tokens(tokenizer), add_generation_prompt=True)[0] if chats else []
    encoded = iter(whole_texts(tokenizer).encode_batch(texts, add_special_tokens=False))
    return [one if isinstance(one, EncodeError) else list(next(encoded).ids) for one in prepared]


def prompt_ids(
    messages: Sequence[Message],
    tokenizer: Any,
    system: str = "error",
    control_tokens: str = "error",
    template: str | None = None,
    tools: str = "error",
    tool_format: str = "auto",
    thoughts: str = "train",
) -> list[int]:
    """Ids to generate the next assistant turn from: the leading ids of the encoded conversation that goes on with it.

    Raises:
        EncodeError: as `encode`.
    """
    # A model may think where its data did not: an earlier thought is not a reason to stop.
    thoughts = "train" if thoughts == "error" else thoughts
    policy = Policy("assistant", system, tools, control_tokens, tool_format, thoughts)
    (ids,) = encode_prompts([messages], tokenizer, policy, template)
    if isinstance(ids, EncodeError):
        raise ids
    return ids


def _of_chat(
    turns: Sequence[Message], ids: list[int], ranges: Sequence[Span], kind: Template, train_on: str, stop: int
) -> list[int]:
    """Labels of one rendered conversation; `ranges` has the tokens of each turn, its stop token included."""
    speaking = _rendered(turns, kind)
    if len(ranges) != len(speaking):
        raise AssertionError(f"template {kind.name} rendered {len(ranges)} of {len(speaking)} turns")
    chosen = [turn["role"] == "assistant" or train_on == "all" for turn in speaking]
    if train_on == "last_turn":
        last = max((index for index, yes in enumerate(chosen) if yes), default=-1)
        chosen = [index == last for index in range(len(speaking))]
    labels = [IGNORE] * len(ids)
    for turn, (first, end), wanted in zip(speaking, ranges, chosen, strict=True):
        if not wanted or turn.get("train", True) is False:
            continue
        labels[first:end] = ids[first:end]
        if turn["role"] == "assistant" and (end <= first or ids[end - 1] != stop):
            raise AssertionError(f"template {kind.name}: a turn does not end on its stop token {stop}")
    return labels


def _weights(
    turns: Sequence[Message],
    text: str,
    marked: Sequence[Span],
    ids: list[int],
    ranges: Sequence[Span],
    kind: Template,
    tokenizer: Any,
) -> list[float]:
    """How much each token is to be learned, as the marks on turns and on their spans say; a stop token as its turn."""
    weights = [1.0] * len(ids)
    offsets: list[Span] | None = None
    for turn, (start, _), (first, end) in zip(_rendered(turns, kind), marked, ranges, strict=True):
        much = turn.get("weight", 1.0)
        weights[first:end] = [much] * (end - first)
        if "spans" not in turn:
            continue
        if offsets is None:
            encoding = whole_texts(tokenizer).encode(text, add_special_tokens=False)
            offsets = encoding.offsets
            if encoding.ids != ids:
                raise AssertionError("a text has other ids when it is tokenised alone")
        said = turn["content"]
        if text[start : start + len(said)] != said:
            raise AssertionError(f"template {kind.name} does not render the content of a turn as it is")
        found = token_weights(turn["spans"], said, offsets[first:end], start, start + len(said))
        weights[first:end] = [much * weight for weight in found]
    return weights


def _whole_thoughts(
    row: dict[str, Any], turns: Sequence[Message], text: str, marked: Sequence[Span], kind: Template, tokenizer: Any
) -> dict[str, Any] | EncodeError:
    """The row, unless it was cut within a thought: a model that learns from it never stops thinking."""
    kept = len(row["input_ids"])
    cut = whole_texts(tokenizer).encode(text, add_special_tokens=False).offsets[kept][0]
    for turn, (start, _) in zip(_rendered(turns, kind), marked, strict=True):
        if start < cut < start + turn.get("thought", 0):
            return EncodeError("truncated", f"the cut at {kept} tokens would leave a thought of the assistant open")
    return row


def _rendered(turns: Sequence[Message], kind: Template) -> Sequence[Message]:
    """Turns in the order in which the template renders them."""
    return sorted(turns, key=lambda turn: turn["role"] != "system") if kind.system_first else turns


def _is_text(turns: Sequence[Message]) -> bool:
    return len(turns) == 1 and turns[0]["role"] == "text"


def _labels(ids: list[int], weights: list[float]) -> list[int]:
    return [token if weight else IGNORE for token, weight in zip(ids, weights, strict=True)]


def _cut(ids: list[int], labels: list[int], max_length: int | None, weights: list[float]) -> Any:
    """The row within `max_length`, if anything in it is trained; with `weights` if not all of that is trained alike."""
    if labels.count(IGNORE) == len(labels):
        return EncodeError("untrained", "no turn in it is to be trained")
    truncated = max_length is not None and len(ids) > max_length
    if truncated:
        length, ids, labels, weights = len(ids), ids[:max_length], labels[:max_length], weights[:max_length]
        if labels.count(IGNORE) == len(labels):
            return EncodeError("truncated", f"cut to {max_length} of its {length} tokens, it has no trained token left")
    row: dict[str, Any] = {"input_ids": ids, "labels": labels, "truncated": truncated}
    if any(weight != 1 for label, weight in zip(labels, weights, strict=False) if label != IGNORE):
        row["weights"] = [weight if label != IGNORE else 0.0 for label, weight in zip(labels, weights, strict=True)]
    return row


def _tokens(tokenizer: Any) -> dict[str, Any]:
    return {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
