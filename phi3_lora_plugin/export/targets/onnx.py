"""ONNX Runtime GenAI: the merged model, whole or in 4 bits, or the base with an adapter that can be switched on.

The graph is made by onnxruntime-genai's own builder. For the adapter form it builds base and adapter together; the
adapter's factors then become inputs of the graph that are zero unless an `.onnx_adapter` file gives them.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from phi3_lora_plugin.export.adapted import Adapted
from phi3_lora_plugin.export.exporter import ExportError, Runtime, Shipped, Variant, Wanted, refuse, require
from phi3_lora_plugin.export.scores import ShowsLogits
from phi3_lora_plugin.model.families import rope_of
from phi3_lora_plugin.model.folder import read_json
from phi3_lora_plugin.model.shards import write_json

FORMS = ("int4", "int8")
ADAPTER = "adapter.onnx_adapter"

_SCRIPT = '''"""Ask the model in this folder: python ask.py "your question"."""

import json
import sys
from pathlib import Path

import onnxruntime_genai as og

here, adapter = Path(__file__).parent, ADAPTER
model = og.Model(str(here))
tokenizer = og.Tokenizer(model)
params = og.GeneratorParams(model)
chat = json.dumps([{"role": "user", "content": " ".join(sys.argv[1:])}])
ids = tokenizer.encode(tokenizer.apply_chat_template(chat, add_generation_prompt=True))
params.set_search_options(max_length=len(ids) + 256, do_sample=False)
generator = og.Generator(model, params)
if adapter:
    adapters = og.Adapters(model)
    adapters.load(str(here / adapter), "lora")
    generator.set_active_adapter(adapters, "lora")
generator.append_tokens(ids)
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)[len(ids) :]).strip())
'''


def export(adapted: Adapted, wanted: Wanted, folder: Path) -> Shipped:
    """Write a folder for ONNX Runtime GenAI; see `exporter`."""
    refuse("onnx", wanted, adapted.config.get("model_type"), kinds=("phi3",), quantize=FORMS, dtypes=("float32",),
           one="a folder holds one model")  # fmt: skip
    _fits(adapted.config)
    require("onnx", "onnxruntime_genai", "onnxruntime", "onnx", "onnx_ir", what="an export to ONNX Runtime GenAI")
    if wanted.merged is False:
        return _adapter(adapted, wanted, folder)
    merged = adapted.merged()
    if wanted.quantize:
        exact, form = adapted.scratch / "onnx", wanted.quantize[0]
        wanted.progress(f"building {form}")
        build(merged, folder, form, adapted.scratch)
        if wanted.prove:
            wanted.progress("building float32")
            build(merged, exact, "fp32", adapted.scratch)
        variants = [
            Variant("float32", partial(open_onnx, exact, None)),
            Variant(form, partial(open_onnx, folder, None), exact=False),
        ]
    else:
        wanted.progress("building float32")
        build(merged, folder, "fp32", adapted.scratch)
        variants = [Variant("float32", partial(open_onnx, folder, None))]
    return Shipped((_ask(folder),), tuple(variants))


def _adapter(adapted: Adapted, wanted: Wanted, folder: Path) -> Shipped:
    adapted.plain_loras("onnx", "an .onnx_adapter")
    if wanted.quantize:
        raise ExportError("onnx: --quantize makes forms of the merged model; leave out --adapter")
    wanted.progress("building base and adapter")
    build(adapted.base_float32(), folder, "fp32", adapted.scratch, adapted.adapter)
    wanted.progress("writing the adapter")
    factors = _take_out(folder)
    name = "float32 base with adapter"
    notes = (f"{factors} factors of the adapter are inputs of the graph; without an adapter it is the base",)
    commands = (_ask(folder, ADAPTER),)
    return Shipped(commands, (Variant(name, partial(open_onnx, folder, folder / ADAPTER)),), notes)


def _fits(config: Mapping[str, Any]) -> None:
    """Refuse what the builder or the runtime would compute otherwise, or not at all."""
    heads = int(config["num_attention_heads"])
    head = int(config.get("head_dim") or config["hidden_size"] // heads)
    problems = []
    if head % 16:
        problems.append(f"the head size is {head}; ONNX Runtime's attention needs a multiple of 16")
    rotated = int(rope_of(config)["partial_rotary_factor"] * head)
    if rotated % 16:
        problems.append(f"{rotated} dimensions of a head are rotated; ONNX Runtime's attention needs a multiple of 16")
    if problems:
        raise ExportError("\n".join(f"onnx: {problem}" for problem in problems))


def build(model: Path, folder: Path, precision: str, scratch: Path, adapter: Path | None = None) -> None:
    """Run onnxruntime-genai's model builder for the CPU, quietly.

    Raises:
        ExportError: the builder failed; with its output.
    """
    from onnxruntime_genai.models.builder import create_model, parse_extra_options

    folder.mkdir(exist_ok=True)
    # The builder's cache of a window's length fails on a CPU once it is full; see `_set_window`.
    extra = ["windowed_kv_cache=false", *([f"adapter_path={adapter}"] if adapter is not None else [])]
    _name_rope(model / "config.json")
    arguments = (None, str(model), str(folder), precision, "cpu", str(scratch / "cache"))
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            create_model(*arguments, **parse_extra_options(*arguments, extra))
    except OSError:  # a full disk has an error of its own
        raise
    except Exception as error:
        raise ExportError(f"onnx: the model builder failed: {type(error).__name__}: {error}") from error
    _set_window(folder / "model.onnx", read_json(model / "config.json"))


def _set_window(file: Path, config: Mapping[str, Any]) -> None:
    """Let every attention of a graph look back as far as the model's sliding window, over a whole cache."""
    import onnx

    window = config.get("sliding_window")
    if not window:
        return
    graph = onnx.load(file, load_external_data=False)
    nodes = [node for node in graph.graph.node if "Attention" in node.op_type]
    lengths = [each for node in nodes for each in node.attribute if each.name == "local_window_size"]
    if not nodes or len(lengths) != len(nodes):
        raise ExportError(f"onnx: the builder made attention without the model's sliding window of {window}")
    for length in lengths:
        length.i = int(window)
    onnx.save(graph, file)


def _name_rope(file: Path) -> None:
    """Longrope by its older name too, which the builder looks for."""
    config = read_json(file)
    rope = config.get("rope_parameters")
    if rope and "type" not in rope:
        write_json(file, config | {"rope_parameters": {**rope, "type": rope.get("rope_type", "default")}})


def _take_out(folder: Path) -> int:
    """Move the LoRA factors of a graph into an `.onnx_adapter`; the graph keeps zeros and takes others as inputs."""
    import numpy
    import onnx
    import onnxruntime
    from onnx import numpy_helper

    graph = onnx.load(folder / "model.onnx")
    values = {}
    for initializer in graph.graph.initializer:
        if ".lora_A." in initializer.name or ".lora_B." in initializer.name:
            value = numpy_helper.to_array(initializer)
            values[initializer.name] = numpy.ascontiguousarray(value)
            initializer.CopyFrom(numpy_helper.from_array(numpy.zeros_like(value), initializer.name))
            graph.graph.input.append(
                onnx.helper.make_tensor_value_info(initializer.name, initializer.data_type, list(value.shape))
            )
    if not values:
        raise ExportError("onnx: the builder put no factors of the adapter into the graph; pass --merged")
    parameters = {name: onnxruntime.OrtValue.ortvalue_from_numpy(value) for name, value in values.items()}
    file = onnxruntime.AdapterFormat()
    file.set_adapter_version(1)
    file.set_model_version(1)
    file.set_parameters(parameters)
    file.export_adapter(str(folder / ADAPTER))
    (folder / "model.onnx.data").unlink(missing_ok=True)
    onnx.save(graph, folder / "model.onnx", save_as_external_data=True, location="model.onnx.data")
    return len(values)


def _ask(folder: Path, adapter: str | None = None) -> str:
    """Write a script that asks the model, which the package has no command for; returns the line that runs it."""
    (folder / "ask.py").write_text(_SCRIPT.replace("ADAPTER", repr(adapter)), encoding="utf-8")
    return "python {out}/ask.py 'Hello'"


@contextmanager
def open_onnx(folder: Path, adapter: Path | None = None) -> Iterator[Runtime]:
    """A folder in onnxruntime-genai, with or without an `.onnx_adapter`."""
    import onnxruntime_genai

    model = onnxruntime_genai.Model(str(folder))
    adapters = None
    if adapter is not None:
        adapters = onnxruntime_genai.Adapters(model)
        adapters.load(str(adapter), "lora")
    yield _Onnx(model, adapters)


class _Onnx(ShowsLogits):
    """onnxruntime-genai with its own tokenizer, template and search."""

    def __init__(self, model: Any, adapters: Any) -> None:
        import onnxruntime_genai

        self._model, self._adapters = model, adapters
        self._tokenizer = onnxruntime_genai.Tokenizer(model)

    def prompt_ids(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        text = self._tokenizer.apply_chat_template(json.dumps(list(messages)), add_generation_prompt=True)
        return [int(each) for each in self._tokenizer.encode(text)]

    def answer(self, ids: Sequence[int], max_new_tokens: int) -> list[int]:
        generator = self._generator(ids, max_new_tokens)
        said: list[int] = []
        while not generator.is_done():
            generator.generate_next_token()
            said.append(int(generator.get_next_tokens()[0]))
        return said

    def _logits(self, ids: Sequence[int]) -> Any:
        import numpy

        return numpy.array(self._generator(ids, 1).get_output("logits"), dtype=numpy.float32)[0]

    def _generator(self, ids: Sequence[int], most: int) -> Any:
        import numpy
        import onnxruntime_genai

        params = onnxruntime_genai.GeneratorParams(self._model)
        params.set_search_options(max_length=len(ids) + most, do_sample=False)
        generator = onnxruntime_genai.Generator(self._model, params)
        if self._adapters is not None:
            generator.set_active_adapter(self._adapters, "lora")
        generator.append_tokens(numpy.array(ids, dtype=numpy.int32))
        return generator
