"""Questions out of encoded rows, and a model's greedy answers to them, each ended by the right stop token."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from phi3_lora_plugin.chat.encode import IGNORE
from phi3_lora_plugin.chat.tasks import Task
from phi3_lora_plugin.evaluate.answer_scores import score_answers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Question:
    """Ids that ask for a turn, and what the data says there; `row` counts from 0."""

    row: int
    ids: tuple[int, ...]
    expected: str


@dataclass(frozen=True)
class Answer:
    """What a model said; `stopped` if it ended its turn itself and was not cut off."""

    text: str
    tokens: int
    stopped: bool


def questions(
    rows: Iterable[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, stops: Sequence[int], most: int
) -> list[Question]:
    """The last trained turn of each of the first `most` rows, and all that stands before it.

    Those ids are what `prompt_ids` gives for the same messages. A turn that was cut off is skipped for the one
    before it; a row without a whole one is left out.

    Args:
        rows: as `encode` gives them, with only the assistant's turns trained; of pairs the chosen chat;
            of tasks all of it is asked for.
        stops: the tokens that end a turn.
    """
    found = []
    for number, row in zip(range(most), rows, strict=False):
        if "task" in row:  # a prompt alone, and what its answer should hold
            answer = Task.from_json(row["task"]).columns.get("answer", "")
            found.append(Question(number, tuple(row["input_ids"]), str(answer).strip()))
            continue
        ids, labels = (list(row[name])[: row.get("cut")] for name in ("input_ids", "labels"))
        end = next((at for at in range(len(ids), 0, -1) if labels[at - 1] in stops), 0)
        start = next((at for at in range(end, 0, -1) if labels[at - 1] == IGNORE), 0)
        if start:
            expected = tokenizer.decode(ids[start:end], skip_special_tokens=True)
            found.append(Question(number, tuple(ids[:start]), expected.strip()))
    return found


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 256,
    batch_size: int = 8,
) -> list[Answer]:
    """Greedy answers to prompts, in their order, each ended by one of the family's stop tokens.

    Prompts of equal length go through the model together, so that nothing is padded and an answer does not depend on
    which others were asked for.

    Args:
        prompts: ids from `prompt_ids`.
        max_new_tokens: where an answer that does not end is cut off.
        batch_size: prompts in one call at most.
    """
    import torch

    from phi3_lora_plugin.evaluate.generate import generate_ids, stop_ids

    stops = set(stop_ids(model, tokenizer))
    device = model.get_input_embeddings().weight.device
    lengths: dict[int, list[int]] = {}
    for number, ids in enumerate(prompts):
        lengths.setdefault(len(ids), []).append(number)
    made: dict[int, Answer] = {}
    was_training = model.training
    model.eval()
    try:
        for length, numbers in sorted(lengths.items(), reverse=True):
            for start in range(0, len(numbers), batch_size):
                chosen = numbers[start : start + batch_size]
                asked = torch.tensor([list(prompts[number]) for number in chosen], device=device)
                said = generate_ids(model, tokenizer, asked, max_new_tokens=max_new_tokens)[:, length:].tolist()
                made.update(zip(chosen, (ended(ids, stops, tokenizer) for ids in said), strict=True))
    finally:
        model.train(was_training)
    return [made[number] for number in range(len(prompts))]


def score(made: Sequence[Answer], asked: Sequence[Question], measures: Sequence[str]) -> dict[str, float]:
    """The mean score of answers by each measure, and the share that ended by themselves; {} where none were asked for.

    Raises:
        AnswerError: as `score_answers`.
    """
    if not made:
        return {}
    scores = score_answers([one.text for one in made], [question.expected for question in asked], measures)
    return scores | {"stopped": sum(one.stopped for one in made) / len(made)}


def ended(ids: Sequence[int], stops: set[int], tokenizer: Any) -> Answer:
    """One answer out of a batch: after its first stop token the others were still speaking."""
    end = next((index for index, token in enumerate(ids) if token in stops), None)
    text = tokenizer.decode(ids[:end], skip_special_tokens=True).strip()
    return Answer(text, len(ids) if end is None else end + 1, end is not None)
