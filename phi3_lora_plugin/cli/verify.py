"""`phi3-lora verify`: is every file of an adapter, a checkpoint or a whole store as it was written?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from phi3_lora_plugin.cli.overrides import AsJson

if TYPE_CHECKING:
    from phi3_lora_plugin.store.manifest import Report


def verify_command(
    path: Annotated[Path, typer.Argument(help="Adapter, checkpoint store or run folder.")], as_json: AsJson = False
) -> None:
    """Verify every file and tensor of an adapter or a run.

    Files are compared with their manifest; nothing is changed. Exit code 1: damaged.
    """
    from phi3_lora_plugin.inspect.weights import weights_problems
    from phi3_lora_plugin.store.checkpoint import verify
    from phi3_lora_plugin.store.manifest import MANIFEST, Report

    foreign = (path / "adapter_config.json").is_file() and not (path / MANIFEST).is_file()
    report = Report(path) if foreign else verify(path)
    checked = report.checkpoints or (report,)
    problems = list(report.problems)
    for one in checked:
        problems += [f"{one.folder.name}/{problem}" for problem in weights_problems(one.folder)]
    if as_json:
        found = [{"folder": str(one.folder), "step": one.step, "files": dict(one.files)} for one in checked]
        print(json.dumps({"folder": str(path), "ok": not problems, "problems": problems, "checkpoints": found}))
    else:
        for one in checked:
            print(f"{one.folder}: {_state(one, foreign)}")
        for problem in problems:
            print(f"  {problem}")
    if problems:
        raise typer.Exit(1)


def _state(one: Report, foreign: bool) -> str:
    """What a folder is, in a few words."""
    from phi3_lora_plugin.store.manifest import MANIFEST

    if foreign:
        return "no manifest (saved by another program); checked tensors only"
    if not (one.folder / MANIFEST).is_file():
        return f"not a checkpoint: no {MANIFEST}"
    size = sum((one.folder / name).stat().st_size for name, state in one.files.items() if state == "ok")
    step = "" if one.step is None else f", step {one.step}"
    return f"{'ok' if one else 'DAMAGED'}{step}, {len(one.files)} files, {size:,} bytes"
