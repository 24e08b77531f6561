"""The rows of one source, or of several that are read alike -> encoded rows, and the fate of those that are not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from phi3_lora_plugin.chat.adapt import Reading, conversations
from phi3_lora_plugin.chat.encode import EncodeError, Policy, encode_batch
from phi3_lora_plugin.chat.formats import Adapter
from phi3_lora_plugin.chat.judged import Judged, encode_judged, read_judged
from phi3_lora_plugin.chat.pairs import encode_pairs, read_pairs
from phi3_lora_plugin.chat.preferences import Pair
from phi3_lora_plugin.chat.readers import Place, Problem, SourceError
from phi3_lora_plugin.chat.report import Left, SourceReport
from phi3_lora_plugin.chat.rows import Rows
from phi3_lora_plugin.chat.sources import Found
from phi3_lora_plugin.chat.tasks import Task, encode_tasks, read_tasks
from phi3_lora_plugin.chat.templates import template_for
from phi3_lora_plugin.chat.tool_formats import ToolFormat, lost_by, tool_format

if TYPE_CHECKING:
    from phi3_lora_plugin.recipe import Recipe
    from phi3_lora_plugin.recipe.sections import DataSection, MixtureSource

_BATCH = 256  # conversations rendered and tokenised in one go; more keep the garbage collector busier
_CHARACTERS = 20_000_000  # of one batch at most, so that a few long rows do not fill the memory


@dataclass(frozen=True)
class Part:
    """Rows that are read alike, to train on or to evaluate on, and where they come from."""

    key: str  # of the recipe, for errors
    found: Found
    data: DataSection  # how they are read
    most: int | None = None  # rows to read
    source: MixtureSource | None = None  # what of them goes into a mixture


@dataclass
class Fate:
    """What happened to rows that are not used as they stand, and how the sources were read."""

    problems: list[Problem] = field(default_factory=list)
    dropped: list[Left] = field(default_factory=list)
    truncated: list[Left] = field(default_factory=list)
    empty: list[Left] = field(default_factory=list)
    unreadable: list[Left] = field(default_factory=list)
    calls: int = 0
    sources: list[SourceReport] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    unread: Counter[str] = field(default_factory=Counter)
    read: int = 0


def read_part(part: Part, adapters: Mapping[str, Adapter], fate: Fate, recipe: Recipe) -> Iterator[tuple[Place, Any]]:
    """Rows of one part from the top, as what the recipe learns from; what is wrong with some goes into `fate`.

    Raises:
        SourceError: a source that cannot be read at all, once the others are read.
    """
    data = part.data
    fate.left_out += part.found.left_out
    left = part.most
    broken: list[str] = []
    for source in part.found.sources:
        reading = Reading(source.name)
        try:
            items: Iterator[Any]
            if recipe.rows == "pairs":
                items = read_pairs(source, reading, data)
            elif recipe.rows == "tasks":
                items = read_tasks(source, reading, data, numbers="gsm8k" in recipe.rewards)
            else:
                read = read_judged if recipe.rows == "judged" else conversations
                items = read(source, reading, data, adapters)
            for item in items:
                if left is not None and reading.rows > left:
                    reading.rows -= 1  # one row may give several items, so it is read before it is one too many
                    break
                if isinstance(item, Problem):
                    fate.problems.append(item)
                else:
                    yield item
        except SourceError as error:
            broken += error.problems
        fate.sources.append(SourceReport(reading.name, reading.format, reading.because, reading.rows))
        fate.unread.update(reading.unread)
        fate.read += reading.rows
        left = None if left is None else left - reading.rows
        if left is not None and left <= 0:
            break
    if broken:
        raise SourceError(broken)


def encoded(
    read: Iterator[tuple[Place, Any]], tokenizer: Any, data: DataSection, limit: int | None, fate: Fate
) -> Rows:
    """What was read as rows; those that have nothing to train, or cannot be encoded, go into `fate`."""
    policy = Policy.of(data)
    how = tool_format(data.tool_format, template_for(tokenizer, data.template).name)
    rows = Rows()
    for batch in _batches(read):
        encode_all = _ENCODERS.get(type(batch[0][1]), encode_batch)
        encoded = encode_all([item for _, item in batch], tokenizer, limit, policy, data.template)
        for (place, item), row in zip(batch, encoded, strict=True):
            chat = _chats(item)[0]
            if isinstance(row, EncodeError):
                if row.reason in ("untrained", "truncated"):
                    fate.dropped.append(Left(str(place), str(row)))
                else:
                    fate.problems.append(Problem(place, str(row)))
                continue
            for turn in chat:
                fate.calls += len(turn.get("calls", ()))
            if servers := _lost(chat, how):
                why = f"{', '.join(servers)} stops at the first ], so it loses a call with a list or a bracket"
                fate.unreadable.append(Left(str(place), why))
            if (empty := _empty(chat, isinstance(item, Pair | Judged))) is not None:
                fate.empty.append(Left(str(place), empty))
            if row["truncated"]:
                fate.truncated.append(Left(str(place), f"longer than {limit} tokens; its end was cut off"))
            rows.add(str(place), row, tuple(message["role"] for message in chat))
    return rows


def _batches(read: Iterator[tuple[Place, Any]]) -> Iterator[list[tuple[Place, Any]]]:
    """Batches of what was read, of so many and, where they are long, of so many characters."""
    batch: list[tuple[Place, Any]] = []
    size = 0
    for item in read:
        chats = _chats(item[1])
        batch.append(item)
        size += sum(len(turn["content"]) for chat in chats for turn in chat)
        if len(batch) == _BATCH or size > _CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


_ENCODERS: dict[type, Any] = {Pair: encode_pairs, Judged: encode_judged, Task: encode_tasks}


def _chats(item: Any) -> tuple[Sequence[Mapping[str, Any]], ...]:
    """The chats of what was read of one row; of a pair the chosen one first."""
    match item:
        case Pair():
            return item.chosen, item.rejected
        case Judged():
            return (item.chat,)
        case Task():
            return (item.messages,)
    return (item,)


def _lost(chat: Sequence[Mapping[str, Any]], how: ToolFormat) -> tuple[str, ...]:
    """Servers that cannot read a trained call of the chat."""
    calls = [call for turn in chat if turn.get("train", True) for call in turn.get("calls", ())]
    return lost_by(calls, how) if calls else ()


def _empty(chat: Sequence[Mapping[str, Any]], last_only: bool) -> str | None:
    """Say which trained turns of the assistant are empty, if any."""
    turns = [(number, turn) for number, turn in enumerate(chat, 1) if turn["role"] in ("assistant", "text")]
    for number, turn in turns[-1:] if last_only else turns:
        if turn.get("train", True) and not turn["content"].strip() and not turn.get("calls"):
            return f"turn {number}, the assistant's, is empty: it is trained to say nothing"
    return None
