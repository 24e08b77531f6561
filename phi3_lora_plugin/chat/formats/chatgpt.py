"""One conversation of a ChatGPT export (`conversations.json`) -> canonical messages: the branch that was shown last.

An export holds a tree of messages, `mapping`, because a question may be asked again; `current_node` is its last leaf.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from phi3_lora_plugin.chat.marks import ROW_MARKS
from phi3_lora_plugin.chat.row_error import RowError, shown
from phi3_lora_plugin.chat.turns import Message, complete, read_turns

REQUIRED = ("mapping",)
OPTIONAL = ("current_node", *ROW_MARKS)
_THOUGHTS = ("thoughts", "reasoning_recap")


def adapt(row: Mapping[str, Any]) -> list[Message]:
    """Read one conversation; what its user wrote into the profile stands in the system message.

    Raises:
        RowError: no tree, or a message that is not text, such as a picture or a call of one of ChatGPT's own tools.
    """
    said: list[dict[str, Any]] = []
    system: list[str] = []
    for message in _branch(row):
        role, content = _mapping(message.get("author")).get("role"), _mapping(message.get("content"))
        kind = content.get("content_type")
        if kind in ("user_editable_context", "model_editable_context"):
            texts = (content.get(key) for key in ("user_profile", "user_instructions", "model_set_context"))
            system += [text for text in texts if isinstance(text, str) and text]
            continue
        if kind in _THOUGHTS:
            raise RowError(f"holds {kind} of the assistant, of which an export keeps a summary only")
        parts = content.get("parts") if kind == "text" else None
        text = "".join(parts) if isinstance(parts, list) and all(isinstance(part, str) for part in parts) else None
        if text is None or message.get("recipient") not in (None, "all") or role == "tool":
            if role == "system" and not text:
                continue
            to = f" to {message['recipient']}" if message.get("recipient") not in (None, "all") else ""
            raise RowError(f"has a message of {role} of type {kind}{to}, which is not text between two people")
        if not text:
            continue  # every export begins with an empty system message
        if role == "system":
            system.append(text)
            continue
        marks = {"weight": message["weight"]} if role == "assistant" and message.get("weight") == 0 else {}
        if said and role == "assistant" and said[-1]["role"] == role and not marks and "weight" not in said[-1]:
            said[-1]["content"] += f"\n\n{text}"  # it went on after a pause
        else:
            said.append({"role": role, "content": text} | marks)
    return complete(list(read_turns(said)), {"system": "\n\n".join(system)})


def _branch(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    mapping = row.get("mapping")
    if not isinstance(mapping, Mapping) or not all(isinstance(node, Mapping) for node in mapping.values()):
        raise RowError(f"mapping is {shown(mapping)}; expected the messages of a ChatGPT export by their ids")
    leaf = row.get("current_node")
    if leaf is None:
        leaves = [name for name, node in mapping.items() if not node.get("children")]
        if len(leaves) != 1:
            raise RowError(f"has {len(leaves)} branches and no current_node that says which was shown last")
        leaf = leaves[0]
    path: list[Mapping[str, Any]] = []
    seen: set[Any] = set()
    while leaf is not None:
        if not isinstance(leaf, str) or leaf in seen or leaf not in mapping:
            raise RowError(f"names the message {shown(leaf)}, which is not in its mapping or comes before itself")
        seen.add(leaf)
        node = mapping[leaf]
        if isinstance(node.get("message"), Mapping):
            path.append(node["message"])
        leaf = node.get("parent")
    return path[::-1]


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
