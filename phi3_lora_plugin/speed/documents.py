"""Batches without their padding: rows and packs become one row of documents that attend to themselves.

A batch padded to its longest row spends as much on padding as on text of the same length, in every layer. Here the
decoder sees the real tokens only, end to end, and its hidden states are put back where they belong: the code above
it (our loss, TRL's head, stock code) sees the shapes it knows. Embeddings are made before, in the shape of the
batch, wherever something hangs on them: NEFTune scales its noise by that shape.
"""

# Imported only inside functions, like everything that is heavy.
from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from itertools import accumulate
from typing import Any

import torch  # noqa: TID253
from transformers.modeling_outputs import BaseModelOutputWithPast  # noqa: TID253
from transformers.utils import can_return_tuple  # noqa: TID253

from phi3_lora_plugin.seams import obstacle
from phi3_lora_plugin.speed import varlen_kernels
from phi3_lora_plugin.speed.arguments import by_name
from phi3_lora_plugin.speed.attention import (
    NAME,
    attend_by,
    by_blocks,
    by_documents,
    needs_mask,
    no_mask,
    register_attention,
)
from phi3_lora_plugin.speed.bounds import (
    Documents,
    Facts,
    PackingError,
    facts,
    facts_of_call,
    packed,
    refuse_mask,
    right_padded,
    to_device,
)
from phi3_lora_plugin.speed.long_factors import long_of_call, long_tokens, original_context, rotary_forward, switches
from phi3_lora_plugin.speed.proved_kernels import cards_of
from phi3_lora_plugin.speed.varlen_kernels import Kernels

__all__ = ["PackingError", "attention_used", "documents_obstacle", "fuse_documents", "restore_documents"]


def documents_obstacle(base: Any) -> str | None:
    """Why this causal model (PEFT taken off) cannot run document by document; None if it can."""
    if getattr(base.config, "model_type", None) != "phi3" or type(getattr(base, "model", None)).__name__ != "Phi3Model":
        return f"{type(base).__name__} is not Phi-3 as transformers has it"
    if changed := obstacle("transformers.attention"):
        return changed
    attention = base.config._attn_implementation
    if attention not in ("sdpa", NAME) and not str(attention).startswith(("flash_attention", "kernels-community/")):
        return f"attention {attention!r} was asked for"
    return None


def fuse_documents(model: Any, base: Any, devices: Iterable[torch.device] = ()) -> None:
    """Let the decoder of `base` drop padding and separate the documents of packs; `restore_documents` undoes it.

    Args:
        model: what a Trainer calls: `base` itself, or PEFT around it.
        devices: where it will run, in addition to where it is; the kernels of attention are tried there, now.
    """
    decoder = base.model
    if "_stock_forward" not in decoder.__dict__:
        decoder._stock_forward, decoder._stock_attention = decoder.forward, base.config._attn_implementation
        decoder._dropouts, decoder._kernels = None, Kernels()
        decoder.forward = partial(_forward, decoder)
        rotary = decoder.rotary_emb
        rotary._stock_forward = rotary.forward
        rotary._original_context = original_context(base.config)
        rotary.forward = partial(rotary_forward, rotary)
        if decoder._stock_attention == "sdpa":
            attend_by(base, register_attention())

        # `partial` and methods, not closures: a copy of the model then has hooks of its own, and it can be pickled
        tops = [model] if model is base else [model, base]
        look = partial(_look, decoder, model)
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
        attend_by(base, decoder._stock_attention)
    for module in (decoder, decoder.rotary_emb):
        del module.forward
        for name in _OURS:
            module.__dict__.pop(name, None)


_OURS = (
    "_stock_forward", "_stock_attention", "_dropouts", "_kernels", "_looks", "_original_context", "_counted"
)  # fmt: skip


def attention_used(base: Any) -> str:
    """Which attention runs in the fused `base`, and why not a better one."""
    if base.config._attn_implementation != NAME:
        return f"{base.config._attn_implementation} of transformers, as asked for"
    weight, kernels = base.model.norm.weight, base.model._kernels
    if not (kernels.proved or kernels.refused) and by_blocks(weight):
        return "blocks of queries on the CPU"
    return str(kernels)


def _proved(decoder: Any, devices: Iterable[torch.device]) -> Kernels:
    """What `decoder` has proved already, and what holds on devices that are new."""
    attention = next(each for each in decoder.modules() if hasattr(each, "qkv_proj") and hasattr(each, "scaling"))
    config, known = decoder.config, decoder._kernels
    tried = {device for device, _, _ in (*known.proved, *known.refused)}
    places = {str(place): place for place in (*cards_of(decoder), *devices)}
    new = varlen_kernels.prove(
        [place for name, place in places.items() if name not in tried],
        config.num_attention_heads,
        config.num_key_value_heads,
        attention.head_dim,
        attention.scaling,
        getattr(config, "sliding_window", None),
    )
    return Kernels(known.proved | new.proved, known.refused | new.refused)


def _look(decoder: Any, outermost: Any, module: Any, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling():
        return
    kwargs = by_name(type(module), args, kwargs)
    of = tuple(kwargs.get(name) for name in ("labels", "attention_mask", "cu_seq_lens_q", "position_ids"))
    if kwargs.get("past_key_values") is not None:
        facts_of_call.set(Facts())  # a token of generation: nothing here is wanted
        return
    known = facts_of_call.get().of
    # What is known in the outermost model already is from a call that failed: its tensors may hold another batch now.
    if module is outermost or len(known) != 4 or any(a is not b for a, b in zip(known, of, strict=True)):
        found = facts(*of)
        facts_of_call.set(found)
        decoder._counted = found.counted()


def reads_documents(decoder: Any) -> bool:
    """Whether this decoder is fused."""
    return "_stock_attention" in decoder.__dict__


@can_return_tuple  # type: ignore[untyped-decorator]
def _forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    if torch.compiler.is_compiling():  # or exported: it would be compiled for each number of documents
        return self._stock_forward(*args, **kwargs)
    kwargs = by_name(type(self), args, kwargs)
    embedded = kwargs.get("input_ids") is None
    given = kwargs.get("inputs_embeds" if embedded else "input_ids")
    mask, starts, positions = (kwargs.get(name) for name in ("attention_mask", "cu_seq_lens_q", "position_ids"))
    known = facts_of_call.get()
    facts_of_call.set(Facts())  # they are of this call alone: the decoder is called without its model, too
    if given is None or kwargs.get("past_key_values") is not None or _by_row(self):
        return self._stock_forward(**kwargs)
    if mask is not None and getattr(mask, "ndim", 0) != 2:
        return self._stock_forward(**kwargs)  # it says itself who sees whom
    if not known.are_of(mask, starts, positions):
        known = facts(None, mask, starts, positions)
    bounds = packed(given, known)
    if bounds is not None:
        refuse_mask(mask, given)
        return _flat(self, given, positions, known, bounds, kwargs, embedded, by_document=True)
    if wants_more(self, kwargs) or known.trains_padding():
        return self._stock_forward(**kwargs)
    if not _cacheless(self, kwargs.get("use_cache"), known.supervised is not None):
        return self._stock_forward(**kwargs)
    rows, width = given.shape[:2]
    if mask is None:
        lengths = [width] * rows
    elif known.real is None or known.real.shape != given.shape[:2]:
        return self._stock_forward(**kwargs)
    else:
        found = right_padded(known.real)
        if found is None:
            token = needs_mask.set(True)
            try:
                return self._stock_forward(**kwargs)
            finally:
                needs_mask.reset(token)
        lengths = found
    window = getattr(self.config, "sliding_window", None)
    unmasked = kwargs | {"attention_mask": None, "use_cache": False}
    if min(lengths) == width and (window is None or width <= window):
        none = no_mask(self.config._attn_implementation, given.device)
        return self._stock_forward(**unmasked | {"attention_mask": none})
    if max(lengths) == 0:
        return self._stock_forward(**kwargs)
    if (self.training and draws(self)) or switches(self, known, lengths, width):
        return self._stock_forward(**unmasked)
    bounds = [0, *accumulate(length for length in lengths if length)]
    return _flat(self, given, positions, known, bounds, kwargs, embedded)


def wants_more(decoder: Any, kwargs: Any) -> bool:
    """Whether hidden states or attention weights of every layer are asked for, in the shapes of the batch."""
    return any(
        kwargs.get(name) or (name not in kwargs and getattr(decoder.config, name, False))
        for name in ("output_hidden_states", "output_attentions")
    )


def _by_row(decoder: Any) -> bool:
    """Whether PEFT has hung on each layer which adapter each row wants (`adapter_names`): it does so in evaluation."""
    if decoder.training:
        return False
    blocks = [block for layer in decoder.layers for block in layer.children()]
    adapted = (*blocks, *(part for block in blocks for part in block.children()))
    hooks = (hook for module in adapted for hook in module._forward_pre_hooks.values())
    return any("adapter_names" in getattr(hook, "keywords", ()) for hook in hooks)


def _cacheless(decoder: Any, use_cache: bool | None, labelled: bool) -> bool:
    """Whether the caller does not want keys and values back. One that computes a loss does not, unless it asks."""
    if use_cache is None:
        return decoder.training or labelled or not decoder.config.use_cache
    return not use_cache


def draws(decoder: Any) -> bool:
    """Whether dropout draws a number for every position: the same losses then need the same shape as stock's."""
    if getattr(decoder.config, "attention_dropout", 0.0):
        return True
    parts = [part for layer in decoder.layers for block in layer.children() for part in block.children()]
    known = decoder._dropouts
    if known is None or len(known[0]) != len(parts) or any(a is not b for a, b in zip(known[0], parts, strict=True)):
        # Adapters are added and removed: walk over all modules again when a projection is another object.
        kinds = (torch.nn.ModuleDict, torch.nn.modules.dropout._DropoutNd)
        holders = [module for module in decoder.modules() if isinstance(module, kinds)]
        known = decoder._dropouts = parts, holders
    for holder in known[1]:
        for module in holder.values() if isinstance(holder, torch.nn.ModuleDict) else (holder,):
            if getattr(module, "p", 0.0):
                return True
    return False


def _flat(
    decoder: Any,
    given: Any,
    position_ids: Any,
    known: Facts,
    bounds: list[int],
    kwargs: dict[str, Any],
    embedded: bool,
    by_document: bool = False,
) -> Any:
    """Run the decoder on one row: of documents, each embedded as alone if `by_document`, or of rows without padding."""
    rows, tokens = given.shape[:2]
    if not embedded and _hangs_on(decoder.embed_tokens):
        given, embedded = decoder.embed_tokens(given), True
    if position_ids is None:
        position_ids = torch.arange(tokens, device=given.device)[None]
    flat = given.reshape(1, rows * tokens, *given.shape[2:])
    positions = position_ids.expand(rows, tokens).reshape(1, -1)
    where = None
    if bounds[-1] < rows * tokens and known.real is not None:
        where = to_device(known.real.flatten().nonzero().flatten(), given.device)
        flat, positions = flat.index_select(1, where), positions.index_select(1, where)
    documents = Documents(bounds, given.device, decoder._kernels)
    extra = {name: value for name, value in kwargs.items() if name not in _OF_THE_BATCH}
    if decoder.config._attn_implementation == NAME:
        extra["documents"] = documents
    else:  # a flash kernel of transformers
        extra |= dict(
            cu_seq_lens_q=documents.limits,
            cu_seq_lens_k=documents.limits,
            max_length_q=documents.longest,
            max_length_k=documents.longest,
        )
    if where is not None and (asked := extra.get("supervised")) is not None:
        extra["supervised"] = asked.among(known.real)
    long = long_of_call.set(long_tokens(decoder, documents, known) if by_document else None)
    token = by_documents.set(True)
    try:
        outputs = decoder._stock_forward(
            **{"inputs_embeds" if embedded else "input_ids": flat},
            position_ids=positions,
            attention_mask=no_mask(decoder.config._attn_implementation, given.device),
            use_cache=False,
            **extra,
        )
    finally:
        by_documents.reset(token)
        long_of_call.reset(long)
    hidden, layers = outputs.last_hidden_state, outputs.hidden_states
    if by_document and layers is not None:
        layers = tuple(None if each is None else each.view(rows, tokens, -1) for each in layers)  # those asked for
    if hidden.shape[1] < bounds[-1]:
        pass  # supervised positions alone, as asked for: see `last_layer`
    elif where is None:
        hidden = hidden.view(rows, tokens, -1)
    else:
        padded = hidden.new_zeros(rows * tokens, hidden.shape[-1])
        hidden = padded.index_copy(0, where, hidden[0]).view(rows, tokens, -1)
    return BaseModelOutputWithPast(last_hidden_state=hidden, hidden_states=layers, attentions=outputs.attentions)


#: What the flat row has its own of.
_OF_THE_BATCH = frozenset(
    "input_ids inputs_embeds attention_mask position_ids past_key_values use_cache cache_position "
    "cu_seq_lens_q cu_seq_lens_k max_length_q max_length_k seq_idx documents".split()
)


def _hangs_on(embedding: Any) -> bool:
    """Whether more happens at the embedding than a look-up: NEFTune's hook, an adapter, another forward."""
    if type(embedding) is not torch.nn.Embedding or "forward" in embedding.__dict__ or embedding._forward_pre_hooks:
        return True
    return any(getattr(hook, "__name__", "") not in _HARMLESS for hook in embedding._forward_hooks.values())


#: Hooks of transformers and PEFT that ask for gradients of the input, whatever its shape.
_HARMLESS = ("make_inputs_require_grads", "make_inputs_require_grad")
