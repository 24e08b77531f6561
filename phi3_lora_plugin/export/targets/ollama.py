"""Ollama: a merged GGUF and a Modelfile, whose Go template gives the ids of training.

Ollama from 0.34.1 on takes no `ADAPTER` (ollama#14969), so the merged model is the only form.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from phi3_lora_plugin.chat.tool_formats import tool_format
from phi3_lora_plugin.export.adapted import Adapted
from phi3_lora_plugin.export.exporter import ExportError, Runtime, Shipped, Wanted, refuse, require
from phi3_lora_plugin.export.gguf import ARCHITECTURES
from phi3_lora_plugin.export.gguf_quantize import FORMS
from phi3_lora_plugin.export.go_template import go_template, render_go
from phi3_lora_plugin.export.targets import llama_cpp
from phi3_lora_plugin.model.families import row_limit


def export(adapted: Adapted, wanted: Wanted, folder: Path) -> Shipped:
    """Write a GGUF and a Modelfile; see `exporter`."""
    if wanted.merged is False:
        raise ExportError("ollama: Ollama 0.34.1 and later take no ADAPTER (ollama#14969); leave out --adapter")
    refuse("ollama", wanted, adapted.config.get("model_type"), kinds=ARCHITECTURES, quantize=FORMS,
           dtypes=("float32", "float16", "bfloat16"), one="a Modelfile names one file")  # fmt: skip
    require("ollama", "gguf", *(("xllamacpp",) if wanted.prove else ()), what="an export to Ollama")
    if adapted.template is None:
        raise ExportError(f"ollama: {adapted.notes[-1]}; without a known template no Modelfile can be written")
    tokens = {"bos_token": adapted.tokenizer.bos_token, "eos_token": adapted.tokenizer.eos_token}
    calls = tool_format(str(adapted.encoding.get("tool_format") or "auto"), adapted.template.name)
    template = go_template(adapted.template, tokens, str(adapted.encoding.get("system") or "error"), calls)
    context = wanted.context or row_limit(None, adapted.config)
    stops = adapted.tokenizer.convert_ids_to_tokens(adapted.stops())
    modelfile = folder / "Modelfile"
    [file], variants, notes = llama_cpp.write_merged(
        adapted, wanted, folder, lambda gguf: _opened(gguf, context, modelfile)
    )
    modelfile.write_text(_modelfile(file, template, stops, context, wanted.system), encoding="utf-8")
    notes = (*notes, "Ollama samples at temperature 0.8 unless a request says otherwise")
    if wanted.system:
        notes = (*notes, f"SYSTEM is {wanted.system[:60]!r}, used for chats without a system message of their own")
    name = re.sub(r"[^a-z0-9._-]+", "-", adapted.name.lower()).strip("-.") or "phi3"
    commands = (f"ollama create {name} -f {{out}}/Modelfile", f"ollama run {name}")
    return Shipped(commands, variants, notes)


def _modelfile(file: str, template: str, stops: Sequence[str], context: int, system: str | None) -> str:
    lines = [f"FROM ./{file}", f'TEMPLATE """{template}"""']
    if system:
        if '"""' in system:
            raise ExportError('ollama: the system message has """ in it, which a Modelfile cannot hold')
        lines.append(f'SYSTEM """{system}"""')
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    return "\n".join([*lines, f"PARAMETER num_ctx {context}"]) + "\n"


def read_modelfile(text: str) -> list[tuple[str, str]]:
    """(instruction, argument) of each line of a Modelfile, by Ollama's rules for quotes.

    Raises:
        ExportError: a quotation without its end, or a line that is not an instruction.
    """
    found = []
    for match in re.finditer(r'\s*(\w+)[ \t]+(?:"""(.*?)"""|([^\n]*))|\s*(\S[^\n]*)', text, re.DOTALL):
        if match[4] is not None or (match[3] or "").startswith('"""'):
            raise ExportError(f"Modelfile: {(match[4] or match[0])[:60]!r} cannot be read")
        found.append((match[1].upper(), match[2] if match[2] is not None else match[3].strip()))
    return found


@contextmanager
def _opened(gguf: Path, context: int, modelfile: Path) -> Iterator[Runtime]:
    """llama.cpp, which Ollama runs, asked through the Modelfile's template as Ollama does it."""
    template = dict(read_modelfile(modelfile.read_text(encoding="utf-8")))["TEMPLATE"]
    with llama_cpp.open_gguf(gguf, context) as server:
        yield _Ollama(server, template)


class _Ollama:
    """llama.cpp's server with prompts that Go's template language renders."""

    def __init__(self, server: Any, template: str) -> None:
        self._server, self._template, self.measure = server, template, server.measure

    def prompt_ids(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        return list(self._server.text_ids(render_go(self._template, messages)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._server, name)
