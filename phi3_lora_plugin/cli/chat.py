"""`phi3-lora chat`: talk to an adapter, or ask it one thing."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer


def chat_command(
    adapter: Annotated[Path, typer.Argument(help="Adapter, checkpoint or run folder.")],
    prompt: Annotated[str | None, typer.Option(help="Ask this once and leave.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message before the conversation.")] = None,
    base: Annotated[str | None, typer.Option(help="Base model, if it is not where the adapter says.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")] = "auto",
    quantize: Annotated[str, typer.Option(help="none, nf4 or int8")] = "none",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
) -> None:
    """Stream answers of an adapter, rendered and stopped as in training."""
    from phi3_lora_plugin.evaluate.generate import load_adapter, stream
    from phi3_lora_plugin.store.adapter_folder import read_adapter

    found = read_adapter(adapter)
    encoding = {"system": "error", **found.chat, "control_tokens": "escape"}  # nobody types a turn's end
    model, tokenizer = load_adapter(found, base=base, dtype=dtype, quantize=quantize, device=device)
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []

    def answer(text: str) -> None:
        messages.append({"role": "user", "content": text})
        said = []
        for piece in stream(
            model, tokenizer, messages, max_new_tokens=max_new_tokens, temperature=temperature, **encoding
        ):
            said.append(piece)
            print(piece, end="", flush=True)
        print()
        messages.append({"role": "assistant", "content": "".join(said)})

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
