"""A Phi-3 folder as OpenVINO IR with its key-value cache as a state, as openvino-genai runs it.

optimum-intel, which does this for many models, does not go with transformers 5.6 and later; the conversion here is
OpenVINO's own, of a module that takes the cache as arguments and masks it itself.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_INPUTS = ("input_ids", "attention_mask", "position_ids", "beam_idx")


def write_ir(folder: Path, out: Path, half: bool = False) -> None:
    """Write `openvino_model.xml` and `.bin` of a float32 model folder into `out`.

    Args:
        half: store weights in 16 bits.
    """
    import openvino
    import torch
    from openvino._offline_transformations import apply_make_stateful_transformation
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    # The switch to longrope's long factors is a branch of Python, which a graph does not have.
    model.model.rotary_emb.rope_type = "default"
    config = model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kept = (2, config.num_key_value_heads, 3, head)
    past = tuple((torch.zeros(kept), torch.zeros(kept)) for _ in range(config.num_hidden_layers))
    example = {
        "input_ids": torch.ones(2, 4, dtype=torch.long),
        "attention_mask": torch.ones(2, 7, dtype=torch.long),
        "position_ids": torch.arange(3, 7).expand(2, 4),
        "beam_idx": torch.tensor([0, 1], dtype=torch.int32),
        "past": past,
    }
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer: branches that the example decides, as it shall
        graph = openvino.convert_model(_with_cache(model), example_input=example)
    names = _name(graph, config.num_key_value_heads, head)
    apply_make_stateful_transformation(graph, names)
    _empty_states(graph, config.num_key_value_heads, head)
    openvino.save_model(graph, out / "openvino_model.xml", compress_to_fp16=half)


def write_tokenizer_ir(tokenizer: Any, out: Path) -> None:
    """Write tokenizer and detokenizer as OpenVINO IR, the chat template with them."""
    import openvino
    from openvino_tokenizers import convert_tokenizer

    made, back = convert_tokenizer(tokenizer, with_detokenizer=True, skip_special_tokens=True)
    openvino.save_model(made, out / "openvino_tokenizer.xml")
    openvino.save_model(back, out / "openvino_detokenizer.xml")


def _with_cache(model: Any) -> Any:
    """The model as a module of the cache's keys and values, whose rows `beam_idx` picks."""
    import torch
    from transformers.cache_utils import DynamicCache, DynamicLayer

    window = getattr(model.config, "sliding_window", None)

    class WithCache(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(
            self, input_ids: Any, attention_mask: Any, position_ids: Any, beam_idx: Any, past: Sequence[Any]
        ) -> tuple[Any, ...]:
            cache = DynamicCache()
            for keys, values in past:
                layer: Any = DynamicLayer()
                layer.keys, layer.values = keys.index_select(0, beam_idx), values.index_select(0, beam_idx)
                layer.dtype, layer.device, layer.is_initialized = keys.dtype, keys.device, True
                cache.layers.append(layer)
            length, total = input_ids.shape[1], attention_mask.shape[1]
            columns = torch.arange(total)
            rows = columns[total - length :][:, None]
            seen = columns[None] <= rows
            if window:
                seen = seen & (columns[None] > rows - window)
            seen = seen[None, None] & attention_mask[:, None, None, :].bool()
            mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
            out = self.model(
                input_ids=input_ids,
                attention_mask=mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=True,
            )
            return (out.logits, *(t for layer in out.past_key_values.layers for t in (layer.keys, layer.values)))

    return WithCache()


def _name(graph: Any, heads: int, head: int) -> dict[str, str]:
    """Name inputs and outputs as openvino-genai expects them; returns input of the cache -> output of the cache."""
    import openvino

    found = {}
    for place, entry in enumerate(graph.inputs):
        if place < len(_INPUTS):
            entry.set_names({_INPUTS[place]})
            entry.node.set_partial_shape(openvino.PartialShape([-1] if place == 3 else [-1, -1]))
            continue
        number, part = divmod(place - len(_INPUTS), 2)
        kind = "value" if part else "key"
        entry.set_names({f"past_key_values.{number}.{kind}"})
        entry.node.set_partial_shape(openvino.PartialShape([-1, heads, -1, head]))
        found[f"past_key_values.{number}.{kind}"] = f"present.{number}.{kind}"
    graph.outputs[0].set_names({"logits"})
    for entry, name in zip(graph.outputs[1:], found.values(), strict=True):
        entry.set_names({name})
    graph.validate_nodes_and_infer_types()
    return found


def _empty_states(graph: Any, heads: int, head: int) -> None:
    """Begin every state with no tokens, for as many rows as the ids have."""
    import numpy
    from openvino import opset13 as op

    shape = op.shape_of(graph.input("input_ids"), output_type="i64")
    rows = op.gather(shape, op.constant([0], dtype=numpy.int64), op.constant(0, dtype=numpy.int64))
    for node in graph.get_ops():
        if node.get_type_name() == "ReadValue":
            sizes = [op.constant(numpy.array([size], numpy.int64)) for size in (heads, 0, head)]
            empty = op.broadcast(op.constant(0.0, dtype=numpy.float32), op.concat([rows, *sizes], axis=0))
            node.set_arguments([empty])
    graph.validate_nodes_and_infer_types()
