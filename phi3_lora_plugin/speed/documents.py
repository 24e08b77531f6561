"""Training batches without their padding: rows and packs become one row of documents that attend to themselves.

A batch padded to its longest row spends as much on padding as on text of the same length, in every layer. Here the
decoder sees the real tokens only, end to end, and its hidden states are put back where they belong: whatever stands
above it (our loss, TRL's head, stock code) sees the shapes it knows.
"""

# Imported only inside functions, like everything that is heavy.
from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch  # noqa: TID253
from transformers.modeling_outputs import BaseModelOutputWithPast  # noqa: TID253

from phi3_lora_plugin.error import Phi3LoraError
from phi3_lora_plugin.model.families import rope_of
from phi3_lora_plugin.speed.attention import NAME, by_documents, register_attention


class PackingError(Phi3LoraError):
    """A batch holds packed documents that stock code would let see each other."""


def documents_obstacle(base: Any) -> str | None:
    """Why this causal model (PEFT taken off) cannot run document by document; None if it can."""
    if getattr(base.config, "model_type", None) != "phi3" or type(getattr(base, "model", None)).__name__ != "Phi3Model":
        return f"{type(base).__name__} is not Phi-3 as transformers has it"
    attention = base.config._attn_implementation
    if attention not in ("sdpa", NAME) and not str(attention).startswith(("flash_attention", "kernels-community/")):
        return f"attention {attention!r} was asked for"
    return None


def fuse_documents(model: Any, base: Any) -> None:
    """Let the decoder of `base` take padding out and packs apart; `restore_documents` takes it back.

    Args:
        model: what a Trainer calls: `base` itself, or PEFT around it.
    """
    decoder = base.model
    if "_stock_forward" in decoder.__dict__:
        return
    decoder._stock_forward, decoder._stock_attention = decoder.forward, base.config._attn_implementation
    decoder._keep_padding = False
    # Where dropout draws for every position, another shape would draw others: the same losses need the same shape.
    decoder._same_shape = any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in model.modules())
    decoder.forward = partial(_forward, decoder)
    rotary = decoder.rotary_emb
    rotary._documents, rotary._stock_forward = None, rotary.forward
    rotary._original_context = _original_context(base.config)
    rotary.forward = partial(_rotary, rotary)
    if decoder._stock_attention == "sdpa":
        base.set_attn_implementation(register_attention())

    # `partial` and methods, not closures: a copy of the model then has hooks of its own, and it can be pickled
    look = partial(_look, decoder)
    tops = {id(model): model, id(base): base}.values()
    decoder._looks = [top.register_forward_pre_hook(look, with_kwargs=True) for top in tops]


def restore_documents(base: Any) -> None:
    """Undo `fuse_documents`."""
    decoder = getattr(base, "model", None)
    if decoder is None or "_stock_forward" not in decoder.__dict__:
        return
    for handle in decoder._looks:
        handle.remove()
    if base.config._attn_implementation == NAME:
        base.set_attn_implementation(decoder._stock_attention)
    for module in (decoder, decoder.rotary_emb):
        del module.forward
        for name in (
            "_stock_forward",
            "_stock_attention",
            "_keep_padding",
            "_same_shape",
            "_looks",
            "_documents",
            "_original_context",
        ):
            module.__dict__.pop(name, None)


def _look(decoder: Any, module: Any, args: Any, kwargs: Any) -> None:
    decoder._keep_padding = _supervised_padding(kwargs.get("labels"), kwargs.get("attention_mask"))


def _supervised_padding(labels: Any, mask: Any) -> bool:
    """Whether what is padding for attention is text for the loss: then its hidden states count, and stay stock's."""
    if labels is None or mask is None or mask.shape != labels.shape:
        return False
    return bool(((mask == 0) & (labels != -100)).any())


def _forward(
    self: Any,
    input_ids: Any = None,
    attention_mask: Any = None,
    position_ids: Any = None,
    past_key_values: Any = None,
    inputs_embeds: Any = None,
    use_cache: Any = None,
    **kwargs: Any,
) -> Any:
    given = inputs_embeds if input_ids is None else input_ids

    def stock(**changes: Any) -> Any:
        inputs = dict(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
        )
        return self._stock_forward(**(inputs | changes), **kwargs)

    if given is None or past_key_values is not None or _wants_more(self, kwargs):
        return stock()
    starts = kwargs.get("cu_seq_lens_q")
    if starts is not None or position_ids is not None:
        bounds = _packed(given, position_ids, starts)
        if bounds is not None:
            _refuse_mask(attention_mask, given)
            return _flat(self, given, position_ids, None, bounds, kwargs, input_ids is None, by_document=True)
        if starts is not None:
            return stock()
    if not self.training or attention_mask is None or attention_mask.shape != given.shape[:2] or self._keep_padding:
        return stock()
    lengths = _right_padded(attention_mask)
    if lengths is None:
        return stock()
    if min(lengths) == given.shape[1] or self._same_shape or _switches_rope(self, lengths, given.shape[1]):
        return stock(attention_mask=None, use_cache=False)
    bounds = [0]
    for length in lengths:
        if length:
            bounds.append(bounds[-1] + length)
    if len(bounds) == 1:
        return stock()
    return _flat(self, given, position_ids, attention_mask.bool(), bounds, kwargs, input_ids is None)


def _wants_more(decoder: Any, kwargs: Any) -> bool:
    """Whether hidden states or attention weights of every layer are asked for, in the shapes of the batch."""
    return any(
        kwargs.get(name) or (name not in kwargs and getattr(decoder.config, name, False))
        for name in ("output_hidden_states", "output_attentions")
    )


def _packed(given: Any, position_ids: Any, starts: Any) -> list[int] | None:
    """[documents + 1] bounds over all rows end to end, if a row holds several documents; None if each is one."""
    rows, tokens = given.shape[:2]
    if starts is not None:
        bounds = [int(bound) for bound in starts.tolist()]
        if rows != 1 or bounds[0] != 0 or bounds[-1] != tokens:
            raise PackingError(
                f"packed documents end at {bounds[-1]} in {rows} row(s) of {tokens} tokens; expected one row"
            )
        return bounds
    if position_ids.dim() != 2 or position_ids.shape[1] != tokens:
        return None
    new = position_ids.diff(dim=1).ne(1)  # transformers' own sign of a new document
    if not bool(new.any()):
        return None
    first = torch.ones_like(new[:, :1])
    flat = torch.cat([first, new], dim=1).expand(rows, tokens).reshape(-1)
    return [*flat.nonzero().flatten().tolist(), rows * tokens]


def _refuse_mask(mask: Any, given: Any) -> None:
    if mask is None:
        return
    raise PackingError(
        f"attention_mask {tuple(mask.shape)} came along with documents packed into {given.shape[0]} row(s): beside it "
        "transformers ignores where documents begin and lets them see each other; leave attention_mask out of the batch"
    )


def _right_padded(mask: Any) -> list[int] | None:
    """Tokens of each row, if padding stands on the right only."""
    if mask.dtype.is_floating_point:
        return None
    real = mask != 0
    if bool((real[:, 1:] & ~real[:, :-1]).any()):
        return None
    return [int(count) for count in real.sum(dim=1).tolist()]


def _switches_rope(decoder: Any, lengths: Sequence[int], width: int) -> bool:
    """Whether only the padding goes past the original context, from where stock longrope takes its long factors."""
    limit = decoder.rotary_emb._original_context
    return limit is not None and max(lengths) <= limit < width


def _original_context(config: Any) -> int | None:
    """The tokens from which longrope takes its long factors; None for other embeddings."""
    rope = rope_of(config.to_dict())
    return int(rope["original_max_position_embeddings"]) if rope["rope_type"] == "longrope" else None


def _flat(
    decoder: Any,
    given: Any,
    position_ids: Any,
    real: Any,
    bounds: list[int],
    kwargs: dict[str, Any],
    embedded: bool,
    by_document: bool = False,
) -> Any:
    """Run the decoder on one row; `real` [rows, tokens] says which positions are text, None for all of them."""
    rows, tokens = given.shape[:2]
    if position_ids is None:
        ends = torch.arange(tokens, device=given.device)
        position_ids = ends[None]
    positions = position_ids.expand(rows, tokens)
    if real is not None:
        flat, positions = given[real][None], positions[real][None]
    else:
        flat, positions = given.reshape(1, rows * tokens, *given.shape[2:]), positions.reshape(1, -1)
    lengths = [stop - start for start, stop in zip(bounds, bounds[1:], strict=False)]
    extra = {name: value for name, value in kwargs.items() if name not in _FLASH}
    if decoder.config._attn_implementation == NAME:
        extra["documents"] = tuple(bounds)
    else:  # a flash kernel of transformers
        limits = torch.tensor(bounds, dtype=torch.int32, device=given.device)
        extra |= dict(cu_seq_lens_q=limits, cu_seq_lens_k=limits, max_length_q=max(lengths), max_length_k=max(lengths))
    decoder.rotary_emb._documents = tuple(bounds) if by_document else None
    token = by_documents.set(True)
    try:
        outputs = decoder._stock_forward(
            **{"inputs_embeds" if embedded else "input_ids": flat},
            position_ids=positions,
            attention_mask=None,
            use_cache=False,
            **extra,
        )
    finally:
        by_documents.reset(token)
        decoder.rotary_emb._documents = None
    hidden = outputs.last_hidden_state
    if real is None:
        hidden = hidden.view(rows, tokens, -1)
    else:
        padded = hidden.new_zeros(rows * tokens, hidden.shape[-1])
        hidden = padded.index_copy(0, real.flatten().nonzero().flatten(), hidden[0]).view(rows, tokens, -1)
    return BaseModelOutputWithPast(last_hidden_state=hidden)


_FLASH = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx", "documents")


def _rotary(self: Any, x: Any, position_ids: Any) -> Any:
    """Longrope by document: stock takes long factors for all of a batch if one document exceeds the original context.

    A document then has the embeddings it has alone, whatever it is packed with.
    """
    limit = self._original_context
    if self._documents is None or limit is None:
        return self._stock_forward(x, position_ids)
    ends = position_ids[0, [stop - 1 for stop in self._documents[1:]]]
    counts = torch.tensor(self._documents, device=ends.device).diff()
    long = (ends >= limit).repeat_interleave(counts)
    if not bool(long.any()) or bool(long.all()):
        return self._stock_forward(x, position_ids)
    short = self._stock_forward(x, position_ids.masked_fill(long, 0))
    both = zip(self._stock_forward(x, position_ids), short, strict=True)
    return tuple(torch.where(long[None, :, None], mine, other) for mine, other in both)
