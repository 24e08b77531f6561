"""`phi3-lora data check`: what would be trained on, row by row, before any model is loaded."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from phi3_lora_plugin.cli.overrides import AsJson, Overrides, RecipeName, or_demonstration


def check_command(
    recipe: RecipeName = "tiny-cpu",
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=0, help="Encoded rows to show.")] = 3,
    near: Annotated[
        float | None, typer.Option(min=0.1, max=1.0, help="Report rows at least this alike, for example 0.8.")
    ] = None,
    html: Annotated[bool, typer.Option("--html", help="Write the report as a page, data.html.")] = False,
    output: Annotated[Path, typer.Option(help="File for --html.")] = Path("data.html"),
    as_json: AsJson = False,
) -> None:
    """Encode the data of a recipe and report on it.

    Needs the tokenizer, not the model.
    """
    from rich.console import Console

    from phi3_lora_plugin.plugins.discovery import load_plugins
    from phi3_lora_plugin.recipe import load_recipe

    recipe, overrides = or_demonstration(recipe, overrides)
    plugins = load_plugins()
    run = load_recipe(recipe, overrides, find=lambda name: plugins.pick("recipes", name))

    from phi3_lora_plugin.chat.dataset import load_data
    from phi3_lora_plugin.chat.near_duplicates import near_duplicates
    from phi3_lora_plugin.chat.report_view import show_near, show_rows
    from phi3_lora_plugin.model.config import read_config
    from phi3_lora_plugin.model.families import row_limit
    from phi3_lora_plugin.model.folder import ModelError, find_config
    from phi3_lora_plugin.model.tokenizer import load_tokenizer

    if isinstance(sys.stdout, io.TextIOWrapper):  # data may hold what the terminal's encoding does not
        sys.stdout.reconfigure(encoding="utf-8" if as_json else None, errors="replace")
    console = Console(stderr=as_json, highlight=False)
    for note in run.notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    tokenizer = load_tokenizer(run.model.path, run.model.revision)
    try:
        config = read_config(find_config(run.model.path, run.model.revision, download=True)).to_dict()
    except ModelError as error:  # a tokenizer alone is enough to look at data
        console.print(f"note: no limit on row length: the model's config was not found: {error}")
        longest = run.data.max_length
    else:
        longest = row_limit(run.data.max_length, config)
    data = load_data(run, tokenizer, plugins.adapters(run.data.format), max_length=longest, cache=True)
    if data.cached is not None:
        console.print(
            f"note: using rows encoded by an earlier run, cached in {data.cached} (PHI3_LORA_CACHE=off disables this)"
        )
    alike = near_duplicates(data.train, data.eval, near) if near is not None else None
    if as_json:
        found = {}
        if alike is not None:
            pairs = zip(("near_duplicates", "near_leaked"), alike, strict=True)
            found = {name: [asdict(one) for one in some] for name, some in pairs}
        print(json.dumps(json.loads(data.report.to_json()) | found, ensure_ascii=False))
    else:
        data.report.render(console)
        if alike is not None:
            show_near(console, alike)
        show_rows(console, data.train, tokenizer, rows)
    if html:
        from phi3_lora_plugin.chat.marked import marked_rows
        from phi3_lora_plugin.cli.report import write_page
        from phi3_lora_plugin.report.page import render_data

        page = render_data(data.report, marked_rows(data.train, tokenizer, rows), f"Data of {run.name}")
        write_page(output, page, console)
