"""Messages -> token ids and labels: ids as the model's own chat template gives them, labels from where tokens start.

A token is trained if it starts inside a trained turn, which is what the assistant says and the stop token behind it.
Role tokens that swallow white space, in the revisions where they do, start before the turn and are never trained.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from phi3_lora_plugin.chat.boundaries import tokenise
from phi3_lora_plugin.chat.templates import Span, Template, render, template_for
from phi3_lora_plugin.error import Phi3LoraError
from phi3_lora_plugin.model.tokenizer import whole_texts

Message = Mapping[str, Any]
IGNORE = -100
ROLES = ("system", "user", "assistant", "tool")


class EncodeError(Phi3LoraError):
    """A conversation that cannot be encoded as it is.

    `reason` is one of "messages", "system", "tools", "control_tokens", "untrained" and "truncated".
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.reason, str(self))


@dataclass(frozen=True)
class Policy:
    """What to do with what a template has no place for, and which turns carry loss; keys of the recipe's `data`."""

    train_on: str = "assistant"
    system: str = "error"
    tools: str = "error"
    control_tokens: str = "error"

    def __post_init__(self) -> None:
        allowed = {
            "train_on": ("assistant", "last_turn", "all"),
            "system": ("error", "fold", "drop"),
            "tools": ("error", "text", "drop"),
            "control_tokens": ("error", "escape"),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise Phi3LoraError(f"{name}={getattr(self, name)!r} is none of {', '.join(values)}")


def encode(
    messages: Sequence[Message],
    tokenizer: Any,
    max_length: int | None = None,
    train_on: str = "assistant",
    system: str = "error",
    control_tokens: str = "error",
    template: str | None = None,
    tools: str = "error",
) -> dict[str, list[int]]:
    """Encode one conversation.

    Args:
        messages: `{"role", "content"}`, roles system, user, assistant and tool; `"train": False` on what is not to be
            trained, `"tools"` (text) on a system message.
        tokenizer: from `load_tokenizer`, or any fast tokenizer of the family.
        max_length: ids beyond it are cut on the right.
        train_on: "assistant" (each of its turns), "last_turn" (its last), or "all" (what anybody says, never headers).
        system: "error", "fold" into the first user turn, or "drop", where the template has no place for it.
        control_tokens: "error" or "escape" (`<|end|>` becomes `< |end|>`), for control tokens in the text of a message.
        template: name of a template instead of the tokenizer's own.
        tools: "error", "text" (as user and system text) or "drop", where the template has no place for tools.

    Returns:
        {"input_ids": [...], "labels": [...]}; labels are -100 where nothing is trained.

    Raises:
        EncodeError: nothing in it can be trained, or it has what the template would drop or mistake.
        TemplateError: the template is unknown.
    """
    policy = Policy(train_on=train_on, system=system, tools=tools, control_tokens=control_tokens)
    (row,) = encode_batch([messages], tokenizer, max_length=max_length, policy=policy, template=template)
    if isinstance(row, EncodeError):
        raise row
    return {"input_ids": row["input_ids"], "labels": row["labels"]}


def encode_batch(
    conversations: Sequence[Sequence[Message]],
    tokenizer: Any,
    max_length: int | None = None,
    policy: Policy | None = None,
    template: str | None = None,
) -> list[dict[str, Any] | EncodeError]:
    """Encode many conversations with one render and one call of the tokenizer; a failure takes its row's place.

    Returns:
        For each conversation `{"input_ids", "labels", "truncated": bool}`, or the `EncodeError` of `encode`.

    Raises:
        TemplateError: the template is unknown.
    """
    policy = policy or Policy()
    kind = template_for(tokenizer, template)
    control = _control_tokens(tokenizer)
    prepared: list[list[dict[str, Any]] | EncodeError] = []
    for conversation in conversations:
        try:
            prepared.append(_prepare(conversation, kind, policy, control))
        except EncodeError as error:
            prepared.append(error)
    good = [one for one in prepared if not isinstance(one, EncodeError)]
    texts, spans = render(kind.turns, good, _tokens(tokenizer), marked=True) if good else ([], [])
    tokenised = iter(tokenise(texts, spans, tokenizer))
    stop = tokenizer.convert_tokens_to_ids(kind.stop or tokenizer.eos_token)
    return [
        one if isinstance(one, EncodeError) else _row(one, *next(tokenised), kind, policy.train_on, stop, max_length)
        for one in prepared
    ]


def prompt_ids(
    messages: Sequence[Message],
    tokenizer: Any,
    system: str = "error",
    control_tokens: str = "error",
    template: str | None = None,
    tools: str = "error",
) -> list[int]:
    """Ids to generate the next assistant turn from: the leading ids of the encoded conversation that goes on with it.

    Raises:
        EncodeError: as `encode`.
    """
    kind = template_for(tokenizer, template)
    policy = Policy(system=system, tools=tools, control_tokens=control_tokens)
    prepared = _prepare(messages, kind, policy, _control_tokens(tokenizer))
    if not prepared or prepared[-1]["role"] == "assistant":
        raise EncodeError("messages", "the next turn is not the assistant's; end with a user message")
    (text,), _ = render(kind.text, [prepared], _tokens(tokenizer), add_generation_prompt=True)
    return list(whole_texts(tokenizer).encode(text, add_special_tokens=False).ids)


def _prepare(
    messages: Sequence[Message], kind: Template, policy: Policy, control: re.Pattern[str]
) -> list[dict[str, Any]]:
    """Copies of the messages with nothing left that the template drops or mistakes; one rendered turn for each."""
    turns = [_checked(message, number) for number, message in enumerate(messages, 1)]
    for number, turn in enumerate(turns, 1):
        for key in ("content", "tools"):
            if isinstance(turn.get(key), str) and (found := control.search(turn[key])):
                if policy.control_tokens == "error":
                    raise EncodeError(
                        "control_tokens",
                        f"message {number} ({turn['role']}) has the control token {found.group()} in its {key}, which "
                        "would end or open a turn; clean the text, or write data.control_tokens: escape",
                    )
                turn[key] = control.sub(lambda match: f"{match.group()[0]} {match.group()[1:]}", turn[key])
    if not kind.tools:
        turns = _without_tools(turns, kind, policy.tools)
    if not kind.system:
        turns = _without_system(turns, kind, policy.system)
    if not kind.empty_system:
        turns = [turn for turn in turns if turn["role"] != "system" or turn["content"]]
    return turns


def _checked(message: Message, number: int) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise EncodeError("messages", f"message {number} is a {type(message).__name__}; expected role and content")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise EncodeError("messages", f"message {number} has the role {role!r}; expected one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise EncodeError(
            "messages", f"message {number} ({role}) has content of type {type(content).__name__}; expected text"
        )
    tools = message.get("tools")
    if tools is not None and (role != "system" or not isinstance(tools, str)):
        raise EncodeError("messages", f"message {number} ({role}) has tools; expected text, on a system message")
    turn = {"role": role, "content": content}
    if tools is not None:
        turn["tools"] = tools
    train, weight = message.get("train"), message.get("weight")
    if not (train is None or isinstance(train, bool)):
        raise EncodeError("messages", f"message {number} ({role}) has train {train!r}; expected true or false")
    if weight not in (None, 0, 1):
        raise EncodeError("messages", f"message {number} ({role}) has weight {weight!r}; expected 0 or 1")
    if train is False or weight == 0:
        turn["train"] = False
    return turn


def _without_tools(turns: list[dict[str, Any]], kind: Template, policy: str) -> list[dict[str, Any]]:
    """Tool answers as user turns and declared tools as system text, or neither."""
    if not any(turn["role"] == "tool" or "tools" in turn for turn in turns):
        return turns
    if policy == "error":
        raise EncodeError(
            "tools",
            f"template {kind.name} has no place for tools; write data.tools: text (answers of tools become user turns, "
            "declared tools system text) or data.tools: drop",
        )
    left: list[dict[str, Any]] = []
    for turn in turns:
        if turn["role"] == "tool":
            if policy == "text":
                left.append(turn | {"role": "user"})
            continue
        tools = turn.pop("tools", None)
        if tools is not None and policy == "text":
            turn["content"] = "\n\n".join(filter(None, (turn["content"], tools)))
        left.append(turn)
    return left


def _without_system(turns: list[dict[str, Any]], kind: Template, policy: str) -> list[dict[str, Any]]:
    """System text in front of the first user turn, or nowhere."""
    texts = [turn["content"] for turn in turns if turn["role"] == "system" and turn["content"]]
    others = [turn for turn in turns if turn["role"] != "system"]
    if not texts or policy == "drop":
        return others
    if policy == "error":
        raise EncodeError(
            "system",
            f"template {kind.name} drops system messages in silence; write data.system: fold (the text goes into the "
            "first user turn, in training and in chat) or data.system: drop",
        )
    first = next((turn for turn in others if turn["role"] == "user"), None)
    if first is None:
        raise EncodeError("system", "there is no user turn to fold the system message into")
    first["content"] = "\n\n".join([*texts, first["content"]])
    return others


def _row(
    turns: Sequence[Message],
    ids: list[int],
    spans: Sequence[Span],
    kind: Template,
    train_on: str,
    stop: int,
    max_length: int | None,
) -> dict[str, Any] | EncodeError:
    """Ids and labels of one rendered conversation; `spans` has the tokens of each turn, its stop token included."""
    speaking = sorted(turns, key=lambda turn: turn["role"] != "system") if kind.system_first else turns
    if len(spans) != len(speaking):
        raise AssertionError(f"template {kind.name} rendered {len(spans)} of {len(speaking)} turns")
    chosen = [turn["role"] == "assistant" or train_on == "all" for turn in speaking]
    if train_on == "last_turn":
        last = max((index for index, yes in enumerate(chosen) if yes), default=-1)
        chosen = [index == last for index in range(len(speaking))]
    labels = [IGNORE] * len(ids)
    for turn, (first, behind), wanted in zip(speaking, spans, chosen, strict=True):
        if not wanted or turn.get("train", True) is False:
            continue
        labels[first:behind] = ids[first:behind]
        if turn["role"] == "assistant" and (behind <= first or ids[behind - 1] != stop):
            raise AssertionError(f"template {kind.name}: a turn does not end on its stop token {stop}")
    if labels.count(IGNORE) == len(labels):
        return EncodeError("untrained", "no turn in it is to be trained")
    truncated = max_length is not None and len(ids) > max_length
    if truncated:
        length, ids, labels = len(ids), ids[:max_length], labels[:max_length]
        if labels.count(IGNORE) == len(labels):
            return EncodeError(
                "truncated", f"nothing that is trained is left of its {length} tokens within {max_length}"
            )
    return {"input_ids": ids, "labels": labels, "truncated": truncated}


def _tokens(tokenizer: Any) -> dict[str, Any]:
    return {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}


def _control_tokens(tokenizer: Any) -> re.Pattern[str]:
    """A pattern of every token that is looked for in text as it stands, special or not."""
    return _pattern(tuple(sorted((token.content for token in tokenizer.added_tokens_decoder.values()), key=len)[::-1]))


@lru_cache(maxsize=16)
def _pattern(tokens: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, tokens)) or r"(?!)")
