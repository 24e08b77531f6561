"""`phi3-lora train`: run a recipe and report the result."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from phi3_lora_plugin.cli.overrides import AsJson, Overrides, RecipeName, or_demonstration
from phi3_lora_plugin.error import Phi3LoraError
from phi3_lora_plugin.wording import human

if TYPE_CHECKING:
    from rich.console import Console

    from phi3_lora_plugin.pipeline import Result
    from phi3_lora_plugin.recipe import Recipe

#: What a run leaves in its folder; a folder with one of these belongs to a run.
_TRACES = ("lora", "_lora", "recipe.yaml", "data_report.json")
#: What a run can be resumed from, and what may not be lost.
_SAVED = ("lora/step-*", "_lora/step-*", "checkpoint-*")


class OutputDirError(Phi3LoraError):
    """The folder that a run was to write into is taken, or cannot be written."""


def train_command(
    recipe: RecipeName = "tiny-cpu",
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume from the newest complete checkpoint.")] = False,
    allow_drift: Annotated[
        list[str] | None, typer.Option(help="Setting allowed to differ on resume; repeatable.")
    ] = None,
    samples: Annotated[int, typer.Option(min=0, help="Held-out prompts to answer before and after training.")] = 3,
    check: Annotated[bool, typer.Option(help="Reload with plain PEFT and compare.")] = True,
    ray: Annotated[
        list[str] | None,
        typer.Option("--ray", metavar="KEY=VALUE", help="Run on Ray, for example num_workers=2; repeatable."),
    ] = None,
    same_batch: Annotated[bool, typer.Option("--same-batch", help="Split the batch across processes.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print only the final report.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train a LoRA adapter.

    Without a recipe, run the embedded demonstration.
    """
    from rich.console import Console

    from phi3_lora_plugin.plugins.discovery import load_plugins
    from phi3_lora_plugin.recipe import load_recipe

    main_process = os.environ.get("RANK", "0") == "0"
    console = Console(stderr=as_json, quiet=quiet or not main_process, highlight=False, markup=False)
    recipe, overrides = or_demonstration(recipe, overrides)
    plugins = load_plugins()
    run = load_recipe(recipe, overrides, find=lambda name: plugins.pick("recipes", name))
    cluster = None
    if ray:
        from phi3_lora_plugin.hosts.ray_settings import read_settings, storage_of

        cluster = read_settings(ray)
    elsewhere = resume and cluster is not None and storage_of(cluster, Path(run.output_dir).expanduser()).has_run()
    run = _with_output_dir(run, resume, elsewhere)
    others = [override for override in overrides if not override.startswith("output_dir=")]
    again = shlex.join([_command(), "train", recipe, *others, f"output_dir={run.output_dir}", "--resume"])
    again += "".join(f" --ray {shlex.quote(one)}" for one in ray or ()) + " --same-batch" * same_batch
    options: dict[str, Any] = dict(resume=resume, allow_drift=allow_drift or (), samples=samples, check=check)
    try:
        with _sigterm_as_ctrl_c():
            console.print(f"recipe {run.name} -> {run.output_dir}", soft_wrap=True)
            processes = int(os.environ.get("WORLD_SIZE", "1"))
            if cluster is not None and cluster.fewest < cluster.most:
                console.print(f"{cluster.fewest} to {cluster.most} processes, which divide the recipe's batch")
            elif (processes := processes if cluster is None else cluster.most) > 1:
                run = _batch_of(processes, run, same_batch, console)

            from phi3_lora_plugin.pipeline import TrainingError, train

            if cluster is not None:
                from phi3_lora_plugin.hosts.ray import train_on_ray

                result = train_on_ray(run, cluster, quiet=quiet or as_json, **options)
            else:
                with redirect_stdout(sys.stderr) if as_json else nullcontext():  # trackers print
                    result = train(run, plugins=plugins, console=console, **options)
    except KeyboardInterrupt:  # outside of training, or the second signal; maybe before the next name is there
        if main_process:
            print(_interrupted(run.output_dir, again), file=sys.stderr)
        raise typer.Exit(130) from None
    except TrainingError as error:
        print(f"stopped: {error}", file=sys.stderr)
        raise typer.Exit(1) from error
    finally:
        _leave_group()
    if not main_process:
        return
    if as_json:
        print(result.to_json())
    report(result, again, Console(stderr=as_json, highlight=False, markup=False))
    if result.status == "interrupted":
        raise typer.Exit(130)


def _batch_of(processes: int, recipe: Recipe, same: bool, console: Console) -> Recipe:
    """Say how many rows a step of several processes has; divide those of the recipe if they are to be the same."""
    from phi3_lora_plugin.training.arguments import same_batch

    if same:
        recipe = same_batch(recipe, processes)
    rows = int(recipe.training.get("per_device_train_batch_size", 8))
    steps = int(recipe.training.get("gradient_accumulation_steps", 1))
    hint = "" if same else "; --same-batch divides the recipe's batch among them, for the result of one process"
    console.print(f"{processes} processes of {rows} rows, {steps} a step: {processes * rows * steps} rows{hint}")
    return recipe


def _leave_group() -> None:
    """Processes that end with their group open may abort as Python takes them down."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """SIGTERM ends loading and evaluating as Ctrl-C does; training itself has its own way (see `interrupt`)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupted(output_dir: str, again: str) -> str:
    from phi3_lora_plugin.store.checkpoint import latest_complete

    saved = latest_complete(output_dir)
    if saved is None:
        return "\ninterrupted; nothing was saved"
    return f"\ninterrupted; saved to {saved}; resume with:\n  {again}"


def report(result: Result, again: str, console: Console) -> None:
    """Print the end of a run: losses, answers, sizes, where the adapter was saved, and what to try next."""
    from rich.table import Table
    from rich.text import Text

    from phi3_lora_plugin.chat.report_view import printable

    if result.status == "interrupted":
        console.print(f"\nstopped after step {result.steps}; adapter saved to {result.adapter}", soft_wrap=True)
        console.print(f"resume with:\n  {again}", soft_wrap=True)
        return
    if result.samples:
        table = Table(title="held-out prompts", title_justify="left")
        for column in ("prompt", "before", "after", "expected"):
            table.add_column(column, overflow="fold")
        for sample in result.samples:
            texts = (sample.prompt, sample.before, sample.after, sample.expected)
            table.add_row(*(Text(printable(text)) for text in texts))
        console.print(table)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in _figures(result):
        table.add_row(name, Text(value))
    console.print(table)
    if result.adapter:
        console.print("\ntry next:")
        for name, *options in (("chat",), ("eval",), ("export", "--to", "ollama")):
            console.print(f"  {shlex.join([_command(), name, result.adapter, *options])}", soft_wrap=True)


def _figures(result: Result) -> list[tuple[str, str]]:
    share = 100 * result.trainable_parameters / max(1, result.total_parameters)
    rows = [
        ("steps", f"{result.steps} ({result.epochs:.2f} epochs, {result.tokens:,} tokens) in {result.seconds:.0f} s"),
        ("trained", f"{result.trainable_parameters:,} of {result.total_parameters:,} parameters ({share:.2f}%)"),
    ]
    if result.eval_loss_before is not None and result.eval_loss_after is not None:
        rows.append(("held-out loss", f"{result.eval_loss_before:.4f} before, {result.eval_loss_after:.4f} after"))
    if result.eval_reward_before is not None and result.eval_reward_after is not None:
        rows.append(
            ("held-out reward", f"{result.eval_reward_before:.4f} before, {result.eval_reward_after:.4f} after")
        )
    if result.adapter:
        ratio = result.base_bytes / max(1, result.adapter_bytes)
        rows.append(
            ("adapter", f"{human(result.adapter_bytes)}, the full model {human(result.base_bytes)} ({ratio:.0f} times)")
        )
        rows.append(("saved to", result.adapter))
    if (page := Path(result.output_dir) / "report.html").is_file():
        rows.append(("report", str(page)))
    if result.reload_difference is not None:
        far = f"differ by at most {result.reload_difference:.1e}" if result.reload_difference else "identical"
        rows.append(("reloaded", f"with plain PEFT in a fresh process: logits {far}"))
    return rows


def _command() -> str:
    """How this shell reaches the command: by its name, or by the path that it was called by (`make demo` does)."""
    called = Path(sys.argv[0])
    known = shutil.which("phi3-lora")
    if called.name != "phi3-lora" or not called.exists() or (known is not None and Path(known).samefile(called)):
        return "phi3-lora"
    return os.path.relpath(called)


def _with_output_dir(recipe: Recipe, resume: bool, elsewhere: bool = False) -> Recipe:
    """The recipe with a folder that is free, or, to resume, with the run that is meant.

    A folder without a chosen name gets a number when it is taken; a chosen one is never overwritten.

    Args:
        elsewhere: Ray keeps checkpoints of the run to resume, so that there need be none here.

    Raises:
        OutputDirError: the named folder holds another run or cannot be written, or has no run to resume.
    """
    from phi3_lora_plugin.store.layout import numbered

    if os.environ.get("RANK", "0") != "0":
        return recipe  # rank zero decides, and fails for all
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    named = not alone or recipe.provenance.get("output_dir", "default") != "default"
    folder = Path(recipe.output_dir).expanduser()
    taken = [folder, *numbered(folder)] if not named else [folder]
    runs = [path for path in taken if any((path / trace).exists() for trace in _TRACES)]
    saved = [path for path in taken if any(any(path.glob(pattern)) for pattern in _SAVED)]
    if resume:
        if not saved and not elsewhere:
            raise OutputDirError(f"{folder} has no run to resume; run without --resume or pass output_dir=FOLDER")
        folder = max(saved, key=lambda path: path.stat().st_mtime, default=folder)
    elif saved and named:
        raise OutputDirError(f"{folder} already has a run; pass --resume, or another output_dir=FOLDER")
    elif runs and not named:
        free = (folder.with_name(f"{folder.name}-{number}") for number in count(2))
        folder = next(path for path in chain([folder], free) if path not in runs)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OutputDirError(
            f"{folder} cannot be written: {error.strerror or error}; pass another output_dir=FOLDER"
        ) from error
    return recipe.model_copy(update={"output_dir": str(folder)})
