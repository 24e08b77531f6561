"""Batches without their padding: rows and packs become one row of documents that attend to themselves.

A batch padded to its longest row spends as much on padding as on text of the same length, in every layer. Here the
decoder sees the real tokens only, end to end, and its hidden states are put back where they belong: whatever stands
above it (our loss, TRL's head, stock code) sees the shapes it knows. Embeddings are made before, in the shape of the
batch, wherever something hangs on them: NEFTune scales its noise by that shape.
"""

# Imported only inside functions, like everything that is heavy.
from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch  # noqa: TID253
from transformers.modeling_outputs import BaseModelOutputWithPast  # noqa: TID253

from phi3_lora_plugin.model.families import rope_of
from phi3_lora_plugin.speed import varlen_kernels
from phi3_lora_plugin.speed.attention import NAME, by_documents, register_attention
from phi3_lora_plugin.speed.bounds import Documents, PackingError, packed, refuse_mask, right_padded
from phi3_lora_plugin.speed.varlen_kernels import Kernels

__all__ = ["PackingError", "attention_used", "documents_obstacle", "fuse_documents", "restore_documents"]


@dataclass(frozen=True)
class _Call:
    """What the model that stands above the decoder was called with, as far as the decoder has to know it."""

    labelled: bool = False
    mask: Any = None
    real: Any = None
    """[rows, tokens] on the CPU: where `mask` has text; None if there is no such mask."""
    trains_padding: bool = False
    """Whether what is padding for attention is text for the loss: then its hidden states count, and stay stock's."""


def documents_obstacle(base: Any) -> str | None:
    """Why this causal model (PEFT taken off) cannot run document by document; None if it can."""
    if getattr(base.config, "model_type", None) != "phi3" or type(getattr(base, "model", None)).__name__ != "Phi3Model":
        return f"{type(base).__name__} is not Phi-3 as transformers has it"
    attention = base.config._attn_implementation
    if attention not in ("sdpa", NAME) and not str(attention).startswith(("flash_attention", "kernels-community/")):
        return f"attention {attention!r} was asked for"
    return None


def fuse_documents(model: Any, base: Any, devices: Iterable[torch.device] = ()) -> None:
    """Let the decoder of `base` take padding out and packs apart; `restore_documents` takes it back.

    Args:
        model: what a Trainer calls: `base` itself, or PEFT around it.
        devices: where it will run, beside where it is; the kernels of attention are tried there, now.
    """
    decoder = base.model
    if "_stock_forward" not in decoder.__dict__:
        decoder._stock_forward, decoder._stock_attention = decoder.forward, base.config._attn_implementation
        decoder._call, decoder._dropouts, decoder._kernels = _Call(), None, Kernels()
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
    if base.config._attn_implementation == NAME:
        decoder._kernels = _proved(decoder, devices)


def restore_documents(base: Any) -> None:
    """Undo `fuse_documents`."""
    decoder = next((each for each in base.modules() if "_stock_attention" in each.__dict__), None)
    if decoder is None:
        return
    for handle in decoder._looks:
        handle.remove()
    if base.config._attn_implementation == NAME:
        base.set_attn_implementation(decoder._stock_attention)
    for module in (decoder, decoder.rotary_emb):
        del module.forward
        for name in _OURS:
            module.__dict__.pop(name, None)


_OURS = (
    "_stock_forward", "_stock_attention", "_call", "_dropouts", "_kernels", "_looks", "_documents", "_original_context"
)  # fmt: skip


def attention_used(base: Any) -> str:
    """Which attention runs in the fused `base`, and why not a better one."""
    if base.config._attn_implementation != NAME:
        return f"{base.config._attn_implementation} of transformers, as asked for"
    return str(base.model._kernels)


def _proved(decoder: Any, devices: Iterable[torch.device]) -> Kernels:
    """What `decoder` has proved already, and what holds on devices that are new."""
    attention = next(each for each in decoder.modules() if hasattr(each, "qkv_proj") and hasattr(each, "scaling"))
    config, known = decoder.config, decoder._kernels
    tried = {device for device, _, _ in (*known.proved, *known.refused)}
    places = {str(place): place for place in (*_cards(decoder), *devices)}
    new = varlen_kernels.prove(
        [place for name, place in places.items() if name not in tried],
        config.num_attention_heads,
        config.num_key_value_heads,
        attention.head_dim,
        attention.scaling,
        getattr(config, "sliding_window", None),
    )
    return Kernels(known.proved | new.proved, known.refused | new.refused)


def _cards(decoder: Any) -> set[torch.device]:
    """The GPUs that the decoder is on, or, while it is still on the CPU, the one that it will be moved to."""
    found = {parameter.device for parameter in decoder.parameters()}
    cards = {device for device in found if device.type == "cuda"}
    if not cards and all(device.type == "cpu" for device in found) and torch.cuda.is_available():
        cards.add(torch.device("cuda", torch.cuda.current_device()))
    return cards


def _look(decoder: Any, module: Any, args: Any, kwargs: Any) -> None:
    if args:  # positional arguments by their names
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        kwargs = dict(zip(names, args, strict=False)) | kwargs
    labels, mask = kwargs.get("labels"), kwargs.get("attention_mask")
    if not torch.is_tensor(mask) or mask.dim() != 2 or mask.dtype.is_floating_point:
        decoder._call = _Call(labels is not None)
    elif labels is None or mask.shape != labels.shape:
        decoder._call = _Call(labels is not None, mask, mask.ne(0).cpu())
    else:  # both in one go: each transfer waits for the card
        real, supervised = torch.stack([mask != 0, labels != -100]).cpu()
        decoder._call = _Call(True, mask, real, bool((supervised & ~real).any()))


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
    call, self._call = self._call, _Call()  # of this call alone: the decoder is called without its model, too

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
    real = call.real if attention_mask is call.mask else None
    starts = kwargs.get("cu_seq_lens_q")
    if starts is not None or position_ids is not None:
        bounds = packed(given, position_ids, starts, real)
        if bounds is not None:
            refuse_mask(attention_mask, given)
            return _flat(self, given, position_ids, None, bounds, kwargs, input_ids is None, by_document=True)
        if starts is not None:
            return stock()
    if not _cacheless(self, use_cache, call.labelled) or call.trains_padding:
        return stock()
    rows, width = given.shape[:2]
    if attention_mask is None:
        lengths = [width] * rows
    elif attention_mask.shape != given.shape[:2] or attention_mask.dtype.is_floating_point:
        return stock()
    else:
        real = attention_mask.ne(0).cpu() if real is None else real
        found = right_padded(real)
        if found is None:
            return stock()
        lengths = found
    full = min(lengths) == width
    window = getattr(self.config, "sliding_window", None)
    if full and (window is None or width <= window):
        return stock(attention_mask=None, use_cache=False)
    if max(lengths) == 0:
        return stock()
    if (self.training and _draws(self)) or _switches_rope(self, lengths, width):
        return stock(attention_mask=None, use_cache=False)
    bounds = [0]
    for length in lengths:
        if length:
            bounds.append(bounds[-1] + length)
    return _flat(self, given, position_ids, None if full else real, bounds, kwargs, input_ids is None)


def _wants_more(decoder: Any, kwargs: Any) -> bool:
    """Whether hidden states or attention weights of every layer are asked for, in the shapes of the batch."""
    return any(
        kwargs.get(name) or (name not in kwargs and getattr(decoder.config, name, False))
        for name in ("output_hidden_states", "output_attentions")
    )


def _cacheless(decoder: Any, use_cache: bool | None, labelled: bool) -> bool:
    """Whether nobody wants keys and values back. Who computes a loss does not, unless they say so."""
    if use_cache is None:
        return decoder.training or labelled or not decoder.config.use_cache
    return not use_cache


def _draws(decoder: Any) -> bool:
    """Whether dropout draws a number for every position: the same losses then need the same shape as stock's."""
    if getattr(decoder.config, "attention_dropout", 0.0):
        return True
    parts = [part for layer in decoder.layers for block in layer.children() for part in block.children()]
    known = decoder._dropouts
    if known is None or len(known[0]) != len(parts) or any(a is not b for a, b in zip(known[0], parts, strict=True)):
        # Adapters come and go: the walk over all modules is made again when a projection is another object.
        kinds = (torch.nn.ModuleDict, torch.nn.modules.dropout._DropoutNd)
        holders = [module for module in decoder.modules() if isinstance(module, kinds)]
        known = decoder._dropouts = parts, holders
    for holder in known[1]:
        for module in holder.values() if isinstance(holder, torch.nn.ModuleDict) else (holder,):
            if getattr(module, "p", 0.0):
                return True
    return False


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
    """Run the decoder on one row; `real` [rows, tokens] on the CPU says which positions are text, None for all."""
    rows, tokens = given.shape[:2]
    if not embedded and _hangs_on(decoder.embed_tokens):
        given, embedded = decoder.embed_tokens(given), True
    if position_ids is None:
        position_ids = torch.arange(tokens, device=given.device)[None]
    flat = given.reshape(1, rows * tokens, *given.shape[2:])
    positions = position_ids.expand(rows, tokens).reshape(1, -1)
    where = None
    if real is not None:
        where = _to(real.flatten().nonzero().flatten(), given.device)
        flat, positions = flat.index_select(1, where), positions.index_select(1, where)
    documents = Documents(bounds, given.device, decoder._kernels)
    extra = {name: value for name, value in kwargs.items() if name not in _FLASH}
    if decoder.config._attn_implementation == NAME:
        extra["documents"] = documents
    else:  # a flash kernel of transformers
        extra |= dict(
            cu_seq_lens_q=documents.limits,
            cu_seq_lens_k=documents.limits,
            max_length_q=documents.longest,
            max_length_k=documents.longest,
        )
    decoder.rotary_emb._documents = documents.bounds if by_document else None
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
    if where is None:
        hidden = hidden.view(rows, tokens, -1)
    else:
        padded = hidden.new_zeros(rows * tokens, hidden.shape[-1])
        hidden = padded.index_copy(0, where, hidden[0]).view(rows, tokens, -1)
    return BaseModelOutputWithPast(last_hidden_state=hidden)


_FLASH = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx", "documents")


def _hangs_on(embedding: Any) -> bool:
    """Whether more happens at the embedding than a look-up: NEFTune's hook, an adapter, another forward."""
    plain = type(embedding) is torch.nn.Embedding and "forward" not in embedding.__dict__
    return not plain or bool(embedding._forward_hooks or embedding._forward_pre_hooks)


def _to(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host on the device, without waiting for the device."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


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
