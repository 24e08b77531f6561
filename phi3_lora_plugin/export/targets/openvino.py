"""OpenVINO: the merged model as IR, or the base's IR and an adapter for openvino-genai's AdapterConfig."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from phi3_lora_plugin.export.adapted import Adapted
from phi3_lora_plugin.export.exporter import ExportError, Runtime, Shipped, Variant, Wanted, refuse, require
from phi3_lora_plugin.export.openvino_ir import write_ir, write_tokenizer_ir
from phi3_lora_plugin.export.recast import copy_settings
from phi3_lora_plugin.export.scores import ShowsLogits
from phi3_lora_plugin.export.signal_stack import signal_stack_kept
from phi3_lora_plugin.model.families import rope_of, row_limit

ADAPTER = "adapter.safetensors"
#: The stateful graph as it is, in float32: no paged cache, which has no sliding window.
_EXACT = {"ATTENTION_BACKEND": "SDPA", "INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
_SCRIPT = '''"""Ask the model in this folder: python ask.py "your question"."""

import sys
from pathlib import Path

import openvino_genai as genai

here, adapter = Path(__file__).parent, ADAPTER
options = {"adapters": genai.AdapterConfig(genai.Adapter(here / adapter))} if adapter else {}
pipe = genai.LLMPipeline(here, "CPU", ATTENTION_BACKEND="SDPA", **options)
history = genai.ChatHistory([{"role": "user", "content": " ".join(sys.argv[1:])}])
print(pipe.generate(history, max_new_tokens=256, do_sample=False).texts[0].strip())
'''


def export(adapted: Adapted, wanted: Wanted, folder: Path) -> Shipped:
    """Write IR, tokenizer and settings; see `exporter`."""
    refuse("openvino", wanted, adapted.config.get("model_type"), kinds=("phi3",), dtypes=("float32", "float16"))
    require("openvino", "openvino", "openvino_tokenizers", "openvino_genai", what="an export to OpenVINO")
    adapter = None
    if wanted.merged is False:
        _write_adapter(adapted, folder / ADAPTER)
        adapter = ADAPTER
    source = adapted.base_float32() if wanted.merged is False else adapted.merged()
    wanted.progress("converting to IR")
    half = wanted.dtype == "float16"
    write_ir(source, folder, half)
    write_tokenizer_ir(adapted.tokenizer, folder)
    copy_settings(source, folder)
    (folder / "ask.py").write_text(_SCRIPT.replace("ADAPTER if", "adapter if").replace(", ADAPTER", f", {adapter!r}"))
    notes = []
    if rope_of(adapted.config)["rope_type"] == "longrope":
        limit = row_limit(None, adapted.config)
        notes.append(
            f"the graph has longrope's short factors; prompts and answers of more than {limit} tokens "
            "would need the long ones, which OpenVINO does not switch to"
        )
    name = "float32" if adapter is None else "float32 base with adapter"
    variant = Variant(name if not half else "float16", partial(open_openvino, folder, adapter), exact=not half)
    return Shipped(("python {out}/ask.py 'Hello'",), (variant,), tuple(notes))


def _write_adapter(adapted: Adapted, file: Path) -> None:
    """One safetensors file of A and B by PEFT's names; the scaling is in B, since AdapterConfig's alpha is 1."""
    from safetensors.torch import save_file

    tensors = {}
    for lora in adapted.plain_loras("openvino", "an adapter"):
        tensors[f"base_model.model.{lora.module}.lora_A.weight"] = lora.a.float().contiguous().clone()
        tensors[f"base_model.model.{lora.module}.lora_B.weight"] = (lora.b.float() * lora.scaling).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})


@contextmanager
def open_openvino(folder: Path, adapter: str | None = None) -> Iterator[Runtime]:
    """A folder in openvino-genai, with or without its adapter, computing in float32."""
    with signal_stack_kept():
        yield _OpenVino(folder, adapter)


class _OpenVino(ShowsLogits):
    """openvino-genai's pipeline with its own template, tokenizer and search; scores by its own model."""

    def __init__(self, folder: Path, adapter: str | None) -> None:
        import openvino
        import openvino_genai

        options: dict[str, Any] = dict(_EXACT)
        if adapter is not None:
            config = openvino_genai.AdapterConfig(openvino_genai.Adapter(folder / adapter))
            options["adapters"] = config
        self._pipe = openvino_genai.LLMPipeline(folder, "CPU", **options)
        self._tokenizer = self._pipe.get_tokenizer()
        self._tensor = openvino.Tensor
        self.measure = "logits" if adapter is None else ""
        settings = {name: value for name, value in _EXACT.items() if name != "ATTENTION_BACKEND"}
        model = openvino.Core().compile_model(folder / "openvino_model.xml", "CPU", settings)
        self._graph, self._logits_of = model.create_infer_request(), model.output("logits")

    def prompt_ids(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        text = self._tokenizer.apply_chat_template(list(messages), add_generation_prompt=True)
        return [int(each) for each in self._tokenizer.encode(text, add_special_tokens=False).input_ids.data[0]]

    def answer(self, ids: Sequence[int], max_new_tokens: int) -> list[int]:
        return [int(each) for each in self._generate(ids, max_new_tokens).tokens[0]]

    def next_scores(self, ids: Sequence[int]) -> Any:
        return super().next_scores(ids) if self.measure else None

    def log_probabilities(self, ids: Sequence[int], first: int) -> tuple[list[float], list[bool]]:
        if not self.measure:
            raise ExportError("openvino: openvino-genai shows no scores with an adapter on; evaluate the merged model")
        return super().log_probabilities(ids, first)

    def _logits(self, ids: Sequence[int]) -> Any:
        import numpy

        count = len(ids)
        self._graph.reset_state()
        inputs = {
            "input_ids": numpy.array([list(ids)], dtype=numpy.int64),
            "attention_mask": numpy.ones((1, count), dtype=numpy.int64),
            "position_ids": numpy.arange(count, dtype=numpy.int64)[None],
            "beam_idx": numpy.zeros(1, dtype=numpy.int32),
        }
        return numpy.array(self._graph.infer(inputs)[self._logits_of][0], dtype=numpy.float32)

    def _generate(self, ids: Sequence[int], most: int) -> Any:
        import numpy

        config = self._pipe.get_generation_config()
        config.max_new_tokens, config.do_sample, config.apply_chat_template = most, False, False
        return self._pipe.generate(self._tensor(numpy.array([list(ids)], dtype=numpy.int64)), config)
