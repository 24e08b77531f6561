"""TRL with our templates and exact masks: `SFTTrainer(assistant_only_loss=True)` and conversational preference rows.

TRL has training templates for two of the family, which it finds by comparing texts, and takes masks from characters:
role tokens that swallow white space are then trained. Here templates are found by what they render, and rows of
messages come from our own encoder. Also `phi3-lora trl sft ...`, which runs the scripts of TRL's command line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

from phi3_lora_plugin.error import Phi3LoraError
from phi3_lora_plugin.hosts.base import family_template
from phi3_lora_plugin.hosts.on_import import undo_all, when_imported
from phi3_lora_plugin.seams import ActivationError, is_installed, look_into, look_up


class TrlError(Phi3LoraError):
    """Rows that cannot be trained on as they are, or a command that TRL does not have."""


def exact_rows(partly: bool = False) -> tuple[list[str], Callable[[], None]]:
    """Wrap what TRL finds templates with and how its trainers encode, each as it is imported; (sentences, undo).

    Args:
        partly: where TRL has changed, say so and leave out what cannot be wrapped.

    Raises:
        ActivationError: TRL has changed, and `partly` is false.
    """
    unusable = _unusable()
    if unusable and (partly or "installed" in unusable):
        return [f"TRL {unusable}: part trl does nothing"], lambda: None
    sentences: list[str] = []
    undone = [when_imported("trl.chat_template_utils", _our_templates)]
    for seam, module, wrap, sentence in _TRAINERS:
        try:
            look_into(seam)
        except ActivationError as error:
            if not partly:
                undo_all(undone)()
                raise
            sentences.append(str(error))
        else:
            undone.append(when_imported(module, wrap))
            sentences.append(sentence)
    return sentences, undo_all(undone)


def _unusable() -> str | None:
    """Why nothing of TRL can be imported; None if something can. Its package itself imports next to nothing."""
    if not is_installed("trl"):
        return "is not installed"
    try:
        import_module("trl")
    except Exception as error:  # whatever a broken release raises
        return f"cannot be imported ({type(error).__name__}: {error})"
    return None


def _our_templates(module: Any) -> Callable[[], None]:
    """Have TRL's search for a training template find ours; older ones have no such search."""
    stock = getattr(module, "get_training_chat_template", None)
    if stock is None:
        return lambda: None

    def get_training_chat_template(*given: Any, **named: Any) -> Any:
        tokenizer = given[0] if given else named.get("processing_class") or named.get("tokenizer")
        found = family_template(tokenizer)
        return found.text if found is not None else stock(*given, **named)

    get_training_chat_template.__wrapped__ = stock  # type: ignore[attr-defined]
    module.get_training_chat_template = get_training_chat_template

    def undo() -> None:
        module.get_training_chat_template = stock

    return undo


def _wrap_sft(module: Any) -> Callable[[], None]:
    """Rows of messages of a Phi tokenizer come from our encoder, if masks are asked for; everything else is TRL's."""
    template = getattr(module, "get_training_chat_template", None)
    stock, trainer = look_up("trl.sft_rows"), module.SFTTrainer
    if template is not None:  # imported by name, perhaps before it was ours
        from trl import chat_template_utils

        module.get_training_chat_template = chat_template_utils.get_training_chat_template

    def _prepare_dataset(self: Any, dataset: Any, processing_class: Any, args: Any, *others: Any, **named: Any) -> Any:
        if getattr(args, "assistant_only_loss", False) and family_template(processing_class) is not None:
            dataset = encoded(dataset, processing_class)
        return stock(self, dataset, processing_class, args, *others, **named)

    trainer._prepare_dataset = _prepare_dataset

    def undo() -> None:
        trainer._prepare_dataset = stock
        if template is not None:
            module.get_training_chat_template = getattr(template, "__wrapped__", template)

    return undo


def _wrap_dpo(module: Any) -> Callable[[], None]:
    """Preferences between chats of a Phi tokenizer come from our encoder; preferences between texts are TRL's."""
    stock, trainer = look_up("trl.dpo_rows"), module.DPOTrainer

    def _prepare_dataset(self: Any, dataset: Any, processing_class: Any, args: Any, *others: Any, **named: Any) -> Any:
        if not _takes_pairs(module) or family_template(processing_class) is None or not _are_chats(next(iter(dataset))):
            return stock(self, dataset, processing_class, args, *others, **named)
        made = pairs(dataset, processing_class)
        if args.max_length is None or getattr(args, "truncation_mode", "keep_start") != "keep_start":
            return made
        return made.filter(lambda row: len(row["prompt_ids"]) < args.max_length)  # as TRL does: no answer is left

    trainer._prepare_dataset = _prepare_dataset

    def undo() -> None:
        trainer._prepare_dataset = stock

    return undo


#: (seam, module, how to wrap its trainer, what that gives).
_TRAINERS = (
    (
        "trl.sft_rows",
        "trl.trainer.sft_trainer",
        _wrap_sft,
        "SFTTrainer masks rows of Phi-3 chats exactly where assistant_only_loss asks for masks",
    ),
    (
        "trl.dpo_rows",
        "trl.trainer.dpo_trainer",
        _wrap_dpo,
        "DPOTrainer reads preferences of Phi-3 chats in every common shape, and compares answers only",
    ),
)


def _takes_pairs(module: Any) -> bool:
    """Whether this TRL pads rows of the columns that `pairs` makes; before version 1 they had other names."""
    try:
        module.DataCollatorForPreference(pad_token_id=0)([{"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}])
    except Exception:  # whatever an older collator raises for a row that it does not know
        return False
    return True


def _are_chats(row: dict[str, Any]) -> bool:
    known = any(row.get(name) is not None for name in ("messages", "conversations", "instruction"))
    return row.get("chosen") is not None and (known or not isinstance(row["chosen"], str))


def pairs(dataset: Any, tokenizer: Any) -> Any:
    """Rows that `chat.preferences` reads -> `prompt_ids`, `chosen_ids` and `rejected_ids`, TRL's own columns.

    An answer is what is trained of it: the turn and its stop token, nothing after.

    Raises:
        TrlError: a row that cannot be encoded, with its number and the reason.
    """

    def encode_rows(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        from phi3_lora_plugin.chat.preferences import preference
        from phi3_lora_plugin.chat.row_error import RowError

        chats: list[list[dict[str, Any]]] = []
        for index, values in zip(indices, zip(*batch.values(), strict=True), strict=True):
            try:
                pair = preference(dict(zip(batch, values, strict=True)))
            except RowError as error:
                raise TrlError(f"row {index + 1}: {error}") from error
            chats += [pair.chosen, pair.rejected]
        made: dict[str, list[Any]] = {"prompt_ids": [], "chosen_ids": [], "rejected_ids": []}
        rows = list(_encode(chats, tokenizer, [index for index in indices for _ in "ab"]))
        for chosen, rejected in zip(rows[::2], rows[1::2], strict=True):
            (prompt, better), (_, worse) = _answer(chosen), _answer(rejected)
            made["prompt_ids"].append(prompt)
            made["chosen_ids"].append(better)
            made["rejected_ids"].append(worse)
        return made

    columns = list(next(iter(dataset)))
    return dataset.map(encode_rows, batched=True, with_indices=True, remove_columns=columns)


def _answer(row: dict[str, Any]) -> tuple[list[int], list[int]]:
    """(ids before what is trained, ids of what is trained)."""
    trained = [index for index, label in enumerate(row["labels"]) if label != -100]
    return row["input_ids"][: trained[0]], row["input_ids"][trained[0] : trained[-1] + 1]


def _encode(chats: list[list[dict[str, Any]]], tokenizer: Any, indices: list[int]) -> Iterator[dict[str, Any]]:
    from phi3_lora_plugin.chat.encode import EncodeError, Policy, encode_batch

    policy = Policy(system="fold", tools="text", thoughts="train")
    for index, row in zip(indices, encode_batch(chats, tokenizer, policy=policy), strict=True):
        if isinstance(row, EncodeError):
            raise TrlError(f"row {index + 1} cannot be trained on: {row}")
        if "weights" in row:
            raise TrlError(f"row {index + 1} has a weight between 0 and 1, which TRL's loss does not honour")
        yield row


def encoded(dataset: Any, tokenizer: Any) -> Any:
    """Rows with `messages`, or `prompt` and `completion` messages -> `input_ids` and masks, in TRL's own columns.

    Raises:
        TrlError: a row that cannot be encoded, with its number and the reason.
    """
    first = next(iter(dataset))
    if "input_ids" in first or not isinstance(first.get("messages", first.get("completion")), list):
        return dataset
    both = "completion" in first
    columns = [name for name in ("messages", "prompt", "completion") if name in first]

    def encode_rows(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        chats = [_conversation(row, index) for row, index in zip(rows, indices, strict=True)]
        made = list(_encode(chats, tokenizer, indices))
        masks = [[int(label != -100) for label in row["labels"]] for row in made]
        both_masks = {"assistant_masks": masks} | ({"completion_mask": masks} if both else {})
        return {"input_ids": [row["input_ids"] for row in made], **both_masks}

    return dataset.map(encode_rows, batched=True, with_indices=True, remove_columns=columns)


def _conversation(row: dict[str, Any], index: int) -> list[dict[str, Any]]:
    from phi3_lora_plugin.chat.adapt import adapted
    from phi3_lora_plugin.chat.formats import ADAPTERS
    from phi3_lora_plugin.chat.row_error import RowError

    name = "prompt_completion" if "completion" in row else "messages"
    try:
        return adapted(ADAPTERS[name], row, name)
    except RowError as error:
        raise TrlError(f"row {index + 1}: {error}") from error
