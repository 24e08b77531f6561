"""The same words, everywhere: an exported model in its own runtime against base and adapter in transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from phi3_lora_plugin.error import Phi3LoraError
from phi3_lora_plugin.export.exporter import Variant
from phi3_lora_plugin.export.merge_check import with_adapter
from phi3_lora_plugin.export.scores import in_measure
from phi3_lora_plugin.model.logits import logit_limit

if TYPE_CHECKING:
    from phi3_lora_plugin.export.adapted import Adapted

_BATCH = 8


class ProofError(Phi3LoraError, RuntimeError):
    """An exported model does not give the adapter's words; says where they part. Nothing was written."""


@dataclass(frozen=True)
class Comparison:
    """One variant against the adapter.

    Attributes:
        variant: its name, and `exact` whether it has to agree.
        prompts: how many were compared.
        ids_equal: on how many the runtime's template and tokenizer gave the ids of training.
        answers_equal: on how many the greedy answer is the adapter's, token by token.
        stopped: how many answers ended on a stop token.
        would_stop: how many of the adapter's own answers do, within the same length.
        difference: largest difference of the next token's scores, and `mean_difference` its average.
        measure: what scores are, logits or log-probabilities; empty where the runtime shows none.
        largest: the largest score.
        odd: the first prompt whose ids or answer differ, told for people.
    """

    variant: str
    exact: bool
    prompts: int
    ids_equal: int
    answers_equal: int
    stopped: int
    would_stop: int
    difference: float
    mean_difference: float
    measure: str
    largest: float
    odd: str = ""

    @property
    def holds(self) -> bool:
        """Whether the variant gives the adapter's words, as far as it has to."""
        if self.ids_equal < self.prompts:
            return False
        if not self.exact:
            return True
        return (
            self.answers_equal == self.prompts
            and self.stopped == self.would_stop
            and self.difference <= logit_limit("float32", self.largest)
        )

    def line(self) -> str:
        """The comparison in one line, for people."""
        ended = "" if self.would_stop == self.prompts else f" (of the adapter's own: {self.would_stop})"
        scores = "the runtime shows no scores with an adapter"
        if self.measure:
            scores = f"{self.measure} differ by at most {self.difference:.1e}, {self.mean_difference:.1e} on average"
        return (
            f"{self.variant}: {self.prompts} prompts; prompt ids equal {self.ids_equal}, greedy answers equal "
            f"{self.answers_equal}, stopped {self.stopped}{ended}; {scores}"
        )


class Reference:
    """Base and adapter in transformers and PEFT, float32 on the CPU: what training made, and what must come out."""

    def __init__(self, adapted: Adapted, prompts: Sequence[Sequence[Mapping[str, Any]]], room: int) -> None:
        """Render prompts; those are left out that training would refuse, or that leave no room for the answer.

        Args:
            room: tokens of prompt and answer together, beyond which runtimes and training differ by design.
        """
        from phi3_lora_plugin.chat.encode import EncodeError, prompt_ids

        self.adapted, self.stops = adapted, set(adapted.stops())
        self.prompts: list[Sequence[Mapping[str, Any]]] = []
        self.ids: list[list[int]] = []
        self.refused: list[str] = []
        # What training escaped or folded is for the caller to do at a server, so such prompts are left out.
        strict = {**adapted.encoding, "control_tokens": "error", "system": "error"}
        for prompt in prompts:
            try:
                ids = prompt_ids(prompt, adapted.tokenizer, **strict)
            except EncodeError as error:
                self.refused.append(str(error))
                continue
            if len(ids) > room:
                self.refused.append(f"{len(ids)} tokens and an answer do not fit into the context")
                continue
            self.prompts.append(prompt)
            self.ids.append(ids)
        self._model: Any = None

    def logits(self, rows: Sequence[Sequence[int]], firsts: Sequence[int]) -> list[Any]:
        """For each row of ids: logits [len(row) - first + 1, vocabulary] from the one after `first` ids on, numpy."""
        import torch

        model = self._load()
        found: list[Any] = []
        with torch.inference_mode():
            for start in range(0, len(rows), _BATCH):
                some = rows[start : start + _BATCH]
                ids = torch.zeros(len(some), max(map(len, some)), dtype=torch.long)
                mask = torch.zeros_like(ids)
                for number, row in enumerate(some):  # padded on the right, which no earlier token sees
                    ids[number, : len(row)] = torch.tensor(row)
                    mask[number, : len(row)] = 1
                logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
                for number, row in enumerate(some):
                    found.append(logits[number, firsts[start + number] - 1 : len(row)].float().numpy())
        return found

    def _load(self) -> Any:
        from phi3_lora_plugin.model.load import load_model

        if self._model is None:
            base = load_model(str(self.adapted.base), dtype="float32", device="cpu", attention="sdpa")
            self._model = with_adapter(base, self.adapted.adapter)
        return self._model


def compare(
    reference: Reference, variant: Variant, max_new_tokens: int, advance: Callable[[], None] = lambda: None
) -> Comparison:
    """Compare one variant on every prompt of the reference.

    An answer is the adapter's greedy one if each of its tokens is the adapter's likeliest after the ones before it; one
    forward pass over prompt and answer tells. Tokens nearer to each other than the tolerance count as equally likely.
    """
    with variant.open() as runtime:
        measure, measured = runtime.measure, []
        for messages, ids in zip(reference.prompts, reference.ids, strict=True):
            prompt, scores = list(runtime.prompt_ids(messages)), runtime.next_scores(ids)
            measured.append((prompt, scores, list(runtime.answer(ids, max_new_tokens))))
            advance()
    rows = [list(ids) + answer for ids, (_, _, answer) in zip(reference.ids, measured, strict=True)]
    wanted = reference.logits(rows, [len(ids) for ids in reference.ids])
    equal_ids = equal = stopped = would_stop = 0
    worst, total, largest, odd = 0.0, 0.0, 0.0, ""
    for number, ((got_ids, scores, answer), ids) in enumerate(zip(measured, reference.ids, strict=True)):
        mine = wanted[number]
        if measure:
            first = in_measure(mine[0], measure)[: len(scores)]
            difference = abs(scores - first)
            worst, total = max(worst, float(difference.max())), total + float(difference.mean())
            largest = max(largest, float(abs(first).max()))
        best = [int(row.argmax()) for row in mine]
        near = logit_limit("float32", float(abs(mine).max()))
        same = all(float(row.max() - row[token]) <= near for row, token in zip(mine, answer, strict=False))
        ends = bool(answer) and answer[-1] in reference.stops
        early = any(token in reference.stops for token in answer[:-1])
        would_stop += ends if same else best[len(answer) - 1 if answer else 0] in reference.stops
        equal_ids += got_ids == ids
        equal += same and not early
        stopped += ends and not early
        if not odd and got_ids != ids:
            odd = _parted("prompt ids", got_ids, ids, reference)
        elif not odd and (not same or early):
            odd = _parted("answer", answer, best[: len(answer)], reference)
    count = len(reference.ids)
    return Comparison(
        variant.name, variant.exact, count, equal_ids, equal, stopped, would_stop, worst, total / max(1, count),
        measure, largest, odd,
    )  # fmt: skip


def _parted(what: str, got: Sequence[int], wanted: Sequence[int], reference: Reference) -> str:
    tokenizer = reference.adapted.tokenizer
    return f"{what}: {tokenizer.decode(got)!r} instead of {tokenizer.decode(wanted)!r}"
