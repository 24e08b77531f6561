"""Loss, perplexity and token accuracy of a model on encoded rows, counted token by token over the whole set."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from phi3_lora_plugin.chat.encode import IGNORE
from phi3_lora_plugin.chat.pad import pad
from phi3_lora_plugin.error import Phi3LoraError
from phi3_lora_plugin.model.families import rope_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: Rows of logits held at one time; 256 rows of Phi-4-mini's 200,064 words are 205 MB in float32.
_CHUNK = 256
#: Families whose logits are the head applied to the last hidden states and nothing else.
_PLAIN_HEADS = ("phi3", "phimoe", "phi4_multimodal")


class NothingTrained(Phi3LoraError):
    """Rows without a trained token, on which nothing can be measured."""


@dataclass(frozen=True)
class TokenScores:
    """What a model makes of the trained tokens of a set of rows.

    `loss` is the mean over all of them in nats, so a row counts by its trained tokens; where rows have `weights`, each
    token's is multiplied by its own, as in training. `perplexity` is e to the power of the mean without weights;
    `token_accuracy` is the share whose most likely token is the right one, given the right ones before it.
    """

    tokens: int
    loss: float
    perplexity: float
    token_accuracy: float


def token_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Sequence[int]]],
    batch_size: int = 8,
) -> TokenScores:
    """Measure a causal model, with or without an adapter on it, on encoded rows.

    The result does not depend on `batch_size`, on the order of the rows or on dropout, but for the last digits of
    floating point. Logits are formed at trained positions only, so memory does not grow with the vocabulary.

    Args:
        model: from `load_model`, or a PeftModel over it; its mode (training or not) is left as it was.
        tokenizer: gives the pad token, which is masked.
        rows: `input_ids`, `labels` (-100 where untrained) and maybe `weights`, as `encode` gives them; not shifted, not
            padded.
        batch_size: rows in one forward pass.

    Raises:
        NothingTrained: no row has a token that is trained and has something before it.
    """
    import torch

    device = model.get_input_embeddings().weight.device
    filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    tokens, right, total, plain = 0, 0, 0.0, 0.0
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for batch in _batches(rows, batch_size, model.config.to_dict()):
                ids = pad([row["input_ids"] for row in batch], filler).to(device)
                mask = pad([[1] * len(row["input_ids"]) for row in batch], 0).to(device)
                labels = pad([row["labels"] for row in batch], IGNORE).to(device)
                weights = pad([row.get("weights") or [1.0] * len(row["labels"]) for row in batch], 0.0)
                weights = weights.to(device)[:, 1:][labels[:, 1:] != IGNORE].double()
                done = 0
                for logits, targets in _supervised(model, ids, mask, labels):
                    losses = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none").double()
                    much = weights[done : done + len(targets)].to(losses.device)
                    done += len(targets)
                    plain += losses.sum().item()
                    total += (losses * much).sum().item()
                    right += int((logits.argmax(-1) == targets).sum())
                    tokens += len(targets)
    finally:
        model.train(was_training)
    if not tokens:
        raise NothingTrained("no row has a trained token: nothing to measure")
    return TokenScores(tokens, total / tokens, perplexity(plain / tokens), right / tokens)


def perplexity(loss: float) -> float:
    """e to the power of a loss in nats; infinite where a float holds no such number."""
    return math.exp(loss) if loss < 700 else math.inf


def _supervised(model: Any, ids: Any, mask: Any, labels: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(logits [n, vocabulary], targets [n]) of the trained positions of a batch, at most `_CHUNK` at a time."""
    wanted = labels[:, 1:] != IGNORE
    targets = labels[:, 1:][wanted]
    stem = model.get_base_model() if hasattr(model, "get_base_model") else model
    if getattr(stem.config, "model_type", None) in _PLAIN_HEADS:
        hidden = stem.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        rows = hidden[:, :-1][wanted.to(hidden.device)]
        for start in range(0, len(targets), _CHUNK):
            logits = stem.lm_head(rows[start : start + _CHUNK])
            yield logits, targets[start : start + _CHUNK].to(logits.device)
        return
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    yield logits[:, :-1][wanted.to(logits.device)], targets.to(logits.device)


def _batches(
    rows: Sequence[Mapping[str, Sequence[int]]], size: int, config: Mapping[str, Any]
) -> Iterator[list[Mapping[str, Sequence[int]]]]:
    """Rows of similar length together, the longest first, so that what does not fit into memory shows at once.

    Never rows from both sides of longrope's switch: the short ones would be computed with the long ones' factors.
    """
    rope = rope_of(config)
    limit = int(rope["original_max_position_embeddings"]) if rope["rope_type"] == "longrope" else None
    batch: list[Mapping[str, Sequence[int]]] = []
    for row in sorted(rows, key=lambda row: -len(row["input_ids"])):
        crosses = limit is not None and batch and len(batch[0]["input_ids"]) > limit >= len(row["input_ids"])
        if len(batch) == size or crosses:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
