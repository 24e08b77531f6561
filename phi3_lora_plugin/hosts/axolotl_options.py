"""What a data set of an axolotl config says about its rows, and what of it applies when they are encoded here.

Plain data in, plain data out; nothing of axolotl is imported. Keys as in axolotl's `SFTDataset` and `chat_template`
strategy. What cannot apply is returned as a sentence, so that nothing is dropped in silence.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from phi3_lora_plugin.recipe.sections import ChatSection

#: The columns and message keys that axolotl reads where a config names no others.
_MESSAGES, _TOOLS, _THINKING, _TRAINING, _DETAIL = "messages", "tools", "reasoning_content", "train", "train_detail"
_SAME = {"role": ("role", "from"), "content": ("content", "value")}
#: Keys of other row types of axolotl's, which chats have no use for.
_FOREIGN = ("field", "field_human", "field_model", "input_format", "input_transform", "logprobs_field", "temperature")


@dataclass(frozen=True)
class RowOptions:
    """How rows of one data set are read before they are encoded.

    Attributes:
        columns: ours to the data set's.
        keys: of messages, the data set's to ours.
        roles: the data set's names for roles to ours.
        answers: whether a message of the assistant that says nothing itself is trained.
        drop_system: leave system messages out.
        train_on: of `ChatSection`, or None: as configured there.
        thoughts: of `ChatSection`, or None: as configured there.
    """

    columns: tuple[tuple[str, str], ...] = ()
    keys: tuple[tuple[str, str], ...] = ()
    roles: tuple[tuple[str, str], ...] = ()
    answers: bool = True
    drop_system: bool = False
    train_on: str | None = None
    thoughts: str | None = None

    def digest(self) -> str:
        """Letters that differ where rows are read in another way."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]

    def data(self, data: ChatSection) -> ChatSection:
        """`data` with what the data set says; what `phi3_lora.data` says explicitly wins."""
        said: dict[str, Any] = {"columns": dict(self.columns) | data.columns}
        if self.train_on and "train_on" not in data.model_fields_set:
            said["train_on"] = self.train_on
        if self.thoughts and "thoughts" not in data.model_fields_set:
            said["thoughts"] = self.thoughts
        return data.model_copy(update=said)


def row_options(cfg: Mapping[str, Any], rows: Mapping[str, Any]) -> tuple[RowOptions, list[str]]:
    """What applies of a data set's entry, and a sentence for each key that does not.

    Args:
        cfg: the whole config, raw or validated.
        rows: one entry of `datasets`, raw or validated.
    """
    given = {key: value for key, value in rows.items() if value not in (None, {}, [], "")}
    # An empty list says something here: no role is trained but where a message says so.
    trained = rows.get("roles_to_train")
    mappings = dict(given.get("message_property_mappings") or {})
    for ours, legacy in (("role", "message_field_role"), ("content", "message_field_content")):
        if given.get(legacy):
            mappings.setdefault(ours, given[legacy])
    keys = {str(theirs): ours for ours, theirs in mappings.items() if theirs not in _SAME.get(ours, (ours,))}
    keys |= {
        str(given[key]): ours
        for key, ours in (
            ("field_thinking", _THINKING),
            ("template_thinking_key", _THINKING),
            ("message_field_training", _TRAINING),
            ("message_field_training_detail", _DETAIL),
        )
        if given.get(key) and given[key] != ours
    }
    columns = {
        ours: str(given[key])
        for key, ours in (("field_messages", _MESSAGES), ("field_tools", _TOOLS))
        if given.get(key) and given[key] not in (ours, "conversations")
    }
    roles = {str(theirs): ours for ours, names in (given.get("roles") or {}).items() for theirs in names}
    answers, ignored = _trained_roles(trained)
    options = RowOptions(
        columns=tuple(sorted(columns.items())),
        keys=tuple(sorted(keys.items())),
        roles=tuple(sorted((theirs, ours) for theirs, ours in roles.items() if theirs != ours)),
        answers=answers,
        drop_system=bool(given.get("drop_system_message")),
        train_on="all" if cfg.get("train_on_inputs") else None,
        thoughts="train" if given.get("split_thinking") else None,
    )
    return options, [*ignored, *_ignored(cfg, given)]


def _trained_roles(named: Any) -> tuple[bool, list[str]]:
    if named is None:
        return True, []
    names = [named] if isinstance(named, str) else [str(name) for name in named]
    others = [name for name in names if name not in ("assistant", "gpt")]
    said = [f"roles_to_train: {', '.join(others)}, because here only the assistant is trained, or with "
            "train_on_inputs: true everybody"] if others else []  # fmt: skip
    return len(others) < len(names), said


def _ignored(cfg: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """Sentences for what the data set or the config asks of axolotl's own encoder."""
    found = []
    for key in ("train_on_eos", "train_on_eot"):
        if given.get(key) not in (None, "turn"):
            found.append(f"{key}: {given[key]}, because the stop token of each trained turn is trained, and no other")
    template = given.get("chat_template")
    if given.get("chat_template_jinja") or template not in (None, "tokenizer_default"):
        found.append(f"chat_template: {template or 'jinja'}, because the model was trained with its own")
    found += [f"{key}: {given[key]}" for key in _FOREIGN if key in given]
    for key in ("chat_template_kwargs", "eot_tokens", "default_system_message"):
        if cfg.get(key):
            found.append(f"{key}: {cfg[key]}, because only axolotl's own encoder reads it")
    return found


def read(row: Mapping[str, Any], options: RowOptions) -> dict[str, Any]:
    """The row with its messages' keys and roles as this package names them, and each answer marked as to be trained."""
    keys, roles = dict(options.keys), dict(options.roles)
    columns = dict(options.columns)
    changed = dict(row)
    for column in {columns.get(_MESSAGES, _MESSAGES), "messages", "conversations"}:
        messages = changed.get(column)
        if isinstance(messages, list):
            turns = (_turn(message, keys, roles, options) for message in messages)
            changed[column] = [turn for turn in turns if turn is not None]
    return changed


def _turn(message: Any, keys: Mapping[str, str], roles: Mapping[str, str], options: RowOptions) -> Any:
    if not isinstance(message, Mapping):
        return message
    # A name that is ours already, next to one that is mapped to it, is another thing in this data set.
    mapped = {ours for theirs, ours in keys.items() if message.get(theirs) is not None}
    turn = {keys.get(key, key): value for key, value in message.items() if keys.get(key) or key not in mapped}
    place = "role" if turn.get("role") is not None else "from"
    role = str(turn.get(place))
    if role in roles:
        turn[place] = role = roles[role]
    if role in ("system", "developer") and options.drop_system:
        return None
    if not options.answers and role in ("assistant", "gpt") and turn.get(_TRAINING) is None:
        turn[_TRAINING] = bool(turn.get(_DETAIL))
    return turn
