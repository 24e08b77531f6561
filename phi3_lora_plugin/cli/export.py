"""`phi3-lora export`: an adapter for the program that will serve it, proved there before it is saved."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from phi3_lora_plugin.cli.overrides import AsJson


def export_command(
    adapter: Annotated[Path, typer.Argument(help="Adapter, checkpoint or run folder; an MLX adapter too.")],
    to: Annotated[
        str, typer.Option(help="Target; `phi3-lora plugins` lists them, `phi3-lora docs deploy` describes them.")
    ],
    out: Annotated[Path | None, typer.Option(help="Folder to write; default: NAME-TARGET in this folder.")] = None,
    base: Annotated[str | None, typer.Option(help="Base model, if it moved since training.")] = None,
    merged: Annotated[
        bool | None, typer.Option("--merged/--adapter", help="Ship the merged model, or the adapter next to its base.")
    ] = None,
    quantize: Annotated[str | None, typer.Option(help="Quantised forms, such as q8_0,q4_k_m or int4.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")] = "auto",
    context: Annotated[int | None, typer.Option(min=1, help="Context length to set up; default: the model's.")] = None,
    system: Annotated[
        str | None, typer.Option(help="System message to ship; default: the one of the training data.")
    ] = None,
    push: Annotated[str | None, typer.Option(help="Hub repository to push to, as owner/name (target hub).")] = None,
    prompts: Annotated[
        str | None, typer.Option(help="How many held-out prompts to compare on, or a file of chats; 0: none.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum new tokens per compared answer.")] = 64,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Overwrite existing output.")] = False,
    as_json: AsJson = False,
) -> None:
    """Export an adapter for Ollama, llama.cpp, ONNX, MLX and more.

    Held-out prompts are answered in the target and compared with the original.
    """
    from phi3_lora_plugin.plugins.discovery import load_plugins

    exporter = load_plugins().pick("exporters", to)

    from phi3_lora_plugin.export.export import export
    from phi3_lora_plugin.export.exporter import Wanted

    forms = tuple(filter(None, (part.strip().lower() for part in (quantize or "").split(","))))
    wanted = Wanted(merged, forms, dtype, context, system, push)
    folder = out or Path(f"{adapter.resolve().name}-{to}")
    chosen = int(prompts) if prompts is not None and prompts.isdecimal() else prompts
    with _progress() as progress:
        report = export(
            adapter, exporter, to, folder, wanted, base=base, prompts=chosen, max_new_tokens=max_new_tokens,
            overwrite=overwrite, progress=progress,
        )  # fmt: skip
    print(json.dumps(report.as_dict(), ensure_ascii=False) if as_json else "\n".join(report.lines()))


@contextmanager
def _progress() -> Iterator[Callable[[str, int | None], Any]]:
    """A bar on the terminal, or a line for each step where stderr is not one."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True, highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        current: list[Any] = []

        def step(text: str, steps: int | None) -> None:
            if not text:
                bar.advance(current[-1])
                return
            for task in current:
                bar.remove_task(task)
            current[:] = [bar.add_task(text, total=steps)]
            if not console.is_terminal:
                console.print(text, markup=False)

        yield step
