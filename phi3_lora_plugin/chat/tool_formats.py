"""How a tool call is written for a model, and who reads it back: the table, as data, and the text it makes.

What a model was trained on and what servers parse differ; each entry names its source. Results and declarations stand
where the model's own chat template has a place for them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Calls = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class ToolFormat:
    """One way to write calls.

    Attributes:
        name: as `data.tool_format` takes it.
        before, after: what stands around the list of calls.
        alone: whether a single call stands without the list around it.
        separators: of the JSON, between items and after keys, as those who write it write it.
        gap: between the text before a call and the call.
        tokens: control tokens that the tokenizer has to have.
        readers: servers that read it, with the name of their parser.
        first_bracket: those of them that stop at the first `]`, so that lists and brackets in text are lost.
        source: where it is published.
    """

    name: str
    before: str = ""
    after: str = ""
    alone: bool = False
    separators: tuple[str, str] = (", ", ": ")
    gap: str = "\n"
    tokens: tuple[str, ...] = ()
    readers: tuple[str, ...] = ()
    first_bracket: tuple[str, ...] = ()
    source: str = ""


TOOL_FORMATS = {
    one.name: one
    for one in (
        ToolFormat(
            "functools",
            before="functools",
            readers=("vLLM phi4_mini_json", "SGLang phi4mini", "vllm-mlx", "Foundry Local", "Dynamo"),
            first_bracket=("vLLM phi4_mini_json",),
            source="Microsoft's function-calling sample of Foundry Local; vllm-project/vllm phi4mini_tool_parser.py; "
            "sgl-project/sglang#17132",
        ),
        ToolFormat(
            "phi4-mini",
            before="<|tool_call|>",
            after="<|/tool_call|>",
            separators=(",", ":"),
            gap="",
            tokens=("<|tool_call|>", "<|/tool_call|>"),
            readers=("Ollama", "llama.cpp"),
            source="ollama.com/library/phi4-mini (blob 813f53fdc6e5); ggml-org/llama.cpp#12288",
        ),
        ToolFormat("text", alone=True, source="no parser of a server; lenient agents read it"),
    )
}
# By template, what the model's own card says; every other model was not trained to call tools.
AUTO = {"phi-4-mini": "functools"}


def tool_format(wanted: str, template: str) -> ToolFormat:
    """The format that `data.tool_format` means for a model with this template."""
    return TOOL_FORMATS[AUTO.get(template, "text") if wanted == "auto" else wanted]


def render_calls(calls: Calls, how: ToolFormat, control: re.Pattern[str]) -> str:
    """Calls as the text that the model is to write.

    A control token inside an argument is spelled with JSON's own escape, which any reader takes back.
    """
    plain = [{"name": call["name"], "arguments": call["arguments"]} for call in calls]
    value = plain[0] if how.alone and len(plain) == 1 else plain
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=how.separators)
    text = control.sub(lambda match: f"\\u{ord(match.group()[0]):04x}{match.group()[1:]}", text)
    return f"{how.before}{text}{how.after}"


def said_and_called(said: str, calls: Calls, how: ToolFormat, control: re.Pattern[str]) -> str:
    """What the assistant says, then the calls."""
    gap = how.gap if said and not said[-1].isspace() else ""
    return f"{said}{gap}{render_calls(calls, how, control)}"


def lost_by(calls: Calls, how: ToolFormat) -> tuple[str, ...]:
    """Servers whose own reader of this format cannot take these calls."""
    inside = json.dumps(list(calls), ensure_ascii=False)[1:-1]
    return how.first_bracket if "]" in inside else ()
