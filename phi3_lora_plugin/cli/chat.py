"""`phi3-lora chat`: talk to an adapter, or ask it one thing."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer


def chat_command(
    adapter: Annotated[Path, typer.Argument(help="Adapter, checkpoint or run folder.")],
    prompt: Annotated[str | None, typer.Option(help="Ask this once and leave.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message before the conversation.")] = None,
    tools: Annotated[
        Path | None, typer.Option(help="A JSON list of tools to declare, as in the training data.")
    ] = None,
    hide_thoughts: Annotated[bool, typer.Option("--hide-thoughts", help="Print answers only.")] = False,
    base: Annotated[str | None, typer.Option(help="Base model, if it is not where the adapter says.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")] = "auto",
    quantize: Annotated[str, typer.Option(help="none, nf4 or int8")] = "none",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
) -> None:
    """Stream answers of an adapter, rendered and stopped as in training."""
    from phi3_lora_plugin.chat.thoughts import hidden
    from phi3_lora_plugin.chat.turns import read_turns
    from phi3_lora_plugin.evaluate.generate import load_adapter, stream
    from phi3_lora_plugin.store.adapter_folder import read_adapter

    found = read_adapter(adapter)
    encoding = {"system": "error", **found.chat, "control_tokens": "escape"}  # nobody types a turn's end
    model, tokenizer = load_adapter(found, base=base, dtype=dtype, quantize=quantize, device=device)
    declared = _declared(tools)
    messages: list[dict[str, Any]] = (
        [{"role": "system", "content": system or ""} | declared] if system or declared else []
    )

    def kept(pieces: Iterator[str], said: list[str]) -> Iterator[str]:
        for piece in pieces:
            said.append(piece)
            yield piece

    def answer(text: str) -> None:
        messages.append({"role": "user", "content": text})
        said: list[str] = []
        pieces = kept(
            stream(model, tokenizer, messages, max_new_tokens=max_new_tokens, temperature=temperature, **encoding), said
        )
        for piece in hidden(pieces) if hide_thoughts else pieces:
            print(piece, end="", flush=True)
        print()
        # Read as a row is, so that its calls and thoughts stand in the next prompt as they do in training.
        messages.extend(read_turns([{"role": "assistant", "content": "".join(said)}]))

    if prompt is not None:
        answer(prompt)
        return
    if sys.stdin.isatty():
        print("Ctrl-D leaves.")
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if text.strip():
            answer(text)


def _declared(file: Path | None) -> dict[str, Any]:
    """`tools` of a system message, as a row that declares them in a list has them."""
    from phi3_lora_plugin.chat.row_error import RowError
    from phi3_lora_plugin.chat.turns import read_tools
    from phi3_lora_plugin.error import Phi3LoraError

    if file is None:
        return {}
    try:
        declared = read_tools(json.loads(file.read_text(encoding="utf-8-sig")), str(file))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, RowError):
            raise
        raise Phi3LoraError(f"--tools {file}: is not a JSON list of tools: {error}") from error
    return {} if declared is None else {"tools": declared}
