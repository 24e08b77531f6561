"""`phi3-lora recipes`, `show`, `validate` and `schema`: look at recipes before running one."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from phi3_lora_plugin.cli.overrides import AsJson, Overrides, RecipeName
from phi3_lora_plugin.error import Phi3LoraError
from phi3_lora_plugin.wording import human, read_size

if TYPE_CHECKING:
    from phi3_lora_plugin.recipe import Recipe
    from phi3_lora_plugin.recipe.yaml_file import Problem


class SizeError(Phi3LoraError):
    """A size of memory that cannot be read."""


def recipes_command(
    room: Annotated[
        str | None, typer.Option("--for", metavar="MEMORY", help="Only those that fit, for example 16GB.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the available recipes.

    --for leaves out what does not fit into the memory of your card, by the figures of phi3-lora plan.
    """
    from phi3_lora_plugin.cli.recipe_table import print_table

    memory = None if room is None else _memory(room)
    rows = all_cards()
    if memory is not None:
        fitting = [row for row in rows if row.get("peak") is not None and row["need"].fits_into(memory)]
        if not fitting:
            smallest = min((row for row in rows if row.get("peak") is not None), key=lambda row: row["peak"])
            print(
                f"nothing fits {room}; the smallest is {smallest['name']} with {human(smallest['peak'])}",
                file=sys.stderr,
            )
            raise typer.Exit(1)
        rows = fitting
    if as_json:
        print(json.dumps([{key: value for key, value in row.items() if key != "need"} for row in rows], indent=2))
    else:
        print_table(rows)


def _memory(text: str) -> int:
    memory = None if text.strip().isdigit() else read_size(text)  # a bare number is bytes, which nobody has few of
    if memory is None:
        raise SizeError(f"--for {text}: not a size; write 24GB, 16GiB or 500MB")
    return memory


def all_cards() -> list[dict[str, Any]]:
    """What the list knows of every recipe that is installed, of the broken ones too."""
    from phi3_lora_plugin.plugins.discovery import load_plugins
    from phi3_lora_plugin.recipe import RecipeError, load_recipe

    plugins = load_plugins()
    rows: list[dict[str, Any]] = []
    for name in sorted(plugins.named("recipes")):
        try:
            recipe = load_recipe(name, find=lambda wanted: plugins.pick("recipes", wanted))
        except RecipeError as error:
            rows.append({"name": name, "group": "broken", "problems": [str(problem) for problem in error.problems]})
        else:
            owner = plugins.owner("recipes", name)
            rows.append({"name": name} | _card(recipe, owner.is_ours) | {"plugin": owner.name})
    for name, problem in plugins.contested("recipes").items():
        rows.append({"name": name, "group": "broken", "problems": [problem]})
    return rows


def show_command(
    name: RecipeName,
    overrides: Overrides = None,
    resolved: Annotated[bool, typer.Option("--resolved", help="Show merged values and their sources.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print a recipe.

    As written, or with --resolved or overrides as it would run.
    """
    from phi3_lora_plugin.plugins.discovery import load_plugins
    from phi3_lora_plugin.recipe import RecipeError, load_recipe

    plugins = load_plugins()
    try:
        recipe = load_recipe(name, overrides or (), find=lambda wanted: plugins.pick("recipes", wanted))
    except RecipeError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        raise typer.Exit(2) from error
    for problem in _unsupported_base(recipe):
        print(problem, file=sys.stderr)
    if as_json:
        about_it = {"name": recipe.name, "source": str(recipe.source), "digest": recipe.digest()}
        print(json.dumps({**about_it, "recipe": recipe.resolved(), "provenance": dict(recipe.provenance)}, indent=2))
    elif resolved or overrides:
        print(annotated(recipe), end="")
    else:
        assert recipe.source is not None
        print(recipe.source.read_text(encoding="utf-8-sig"), end="")


def validate_command(
    files: Annotated[list[str], typer.Argument(help="YAML files or presets, then overrides.")], as_json: AsJson = False
) -> None:
    """Validate recipes in full.

    Checks the loader, format and files they name as well. Exit code 2: something is wrong.
    """
    from phi3_lora_plugin.plugins.discovery import load_plugins
    from phi3_lora_plugin.recipe import RecipeError, load_recipe

    plugins = load_plugins()
    overrides = [file for file in files if "=" in file and not Path(file).exists()]
    found: dict[str, tuple[Recipe | None, Sequence[Problem]]] = {}
    for file in (file for file in files if file not in overrides):
        try:
            recipe = load_recipe(file, overrides, find=lambda name: plugins.pick("recipes", name))
        except RecipeError as error:
            found[file] = (None, error.problems)
        else:
            found[file] = (
                recipe,
                [*_unregistered(recipe, plugins.pick), *_unsupported_base(recipe), *_missing_data(recipe)],
            )
    if not found:
        print("nothing to validate: name a recipe before its overrides", file=sys.stderr)
        raise typer.Exit(2)
    if as_json:
        print(json.dumps([_verdict(file, *verdict) for file, verdict in found.items()], indent=2))
    else:
        for file, (checked, problems) in found.items():
            for line in [*(_notes(checked) if checked else ()), *map(str, problems)]:
                print(line, file=sys.stderr)
            count = f"{len(problems)} problem{'s'[: len(problems) != 1]}"
            print(f"{file}: {count}" if problems or checked is None else f"{file}: fine ({checked.digest()[:12]})")
    if any(problems for _, problems in found.values()):
        raise typer.Exit(2)


def schema_command() -> None:
    """Print the JSON Schema of recipe files, for editors."""
    from phi3_lora_plugin.recipe.schema import recipe_schema

    print(json.dumps(recipe_schema(), indent=2))


def annotated(recipe: Recipe) -> str:
    """The resolved recipe as YAML that loads again, each line with where its value came from."""
    from phi3_lora_plugin.recipe.yaml_file import dump_line

    lines: list[tuple[str, str]] = []

    def write(data: Mapping[str, Any], key: str, indent: str) -> None:
        for name, value in data.items():
            dotted = f"{key}{name}"
            if isinstance(value, dict) and value:
                lines.append((f"{indent}{dump_line(name)}:", ""))
                write(value, f"{dotted}.", indent + "  ")
            else:
                text = f"{indent}{dump_line(name)}: {dump_line(value)}"
                lines.append((text, recipe.provenance.get(dotted, "")))

    write({name: value for name, value in recipe.resolved().items() if name != "about"}, "", "")
    width = min(max(len(text) for text, _ in lines), 60)
    head = [f"# {recipe.name}, {recipe.digest()[:12]}, from {recipe.source}", *(f"# {note}" for note in recipe.notes)]
    body = [f"{text:<{width}}  # {origin}" if origin else text for text, origin in lines]
    return "\n".join([*head, *body]) + "\n"


def _unregistered(recipe: Recipe, pick: Callable[[str, str], Any]) -> list[Problem]:
    """Names that a recipe gives to plugins and that none of them knows."""
    from phi3_lora_plugin.recipe.yaml_file import Problem

    problems = []
    for kind, key, name in (
        ("models", "model.loader", recipe.model.loader),
        ("dataset_adapters", "data.format", recipe.data.format),
    ):
        if name == "auto":
            continue
        try:
            pick(kind, name)
        except ValueError as error:
            problems.append(Problem(recipe.provenance.get(key, ""), key, str(error)))
    return problems


def _unsupported_base(recipe: Recipe) -> list[Problem]:
    """A base that no loader of ours can train; a loader of another package may."""
    from phi3_lora_plugin.model.published import why_refused
    from phi3_lora_plugin.recipe.yaml_file import Problem

    why = why_refused(recipe.model.path, recipe.model.revision) if recipe.model.loader == "phi3" else None
    return [Problem(recipe.provenance.get("model.path", ""), "model.path", why)] if why else []


def _missing_data(recipe: Recipe) -> list[Problem]:
    """Local data that is not there or cannot be read; of hub ids, only a run can tell."""
    from phi3_lora_plugin.chat.mixture import sources_of
    from phi3_lora_plugin.chat.readers import SourceError
    from phi3_lora_plugin.chat.sources import find_sources
    from phi3_lora_plugin.recipe.yaml_file import Problem

    problems = []
    data = recipe.data
    wanted: list[tuple[str, Any, str | None]] = [("path", path, own.split) for path, own, _ in sources_of(data)]
    for key, path, split in [*wanted, ("eval_path", data.eval_path, data.eval_split)]:
        if path is None:
            continue
        try:
            find_sources(path, split, "", hub=False)
        except SourceError as error:
            where = recipe.provenance.get(f"data.{key}", "")
            problems += [Problem(where, f"data.{key}", text.removeprefix(": ")) for text in error.problems]
    return problems


def _notes(recipe: Recipe) -> list[str]:
    missing = ["data.path is not set; a run needs it: data.path=FILE"] if recipe.data.path is None else []
    return [*recipe.notes, *missing]


def _verdict(file: str, recipe: Recipe | None, problems: Sequence[Problem]) -> dict[str, Any]:
    listed = [{"where": p.where, "key": p.key, "message": p.message} for p in problems]
    good = recipe is not None and not problems
    return {"recipe": file, "valid": good, "problems": listed, "notes": _notes(recipe) if recipe else []}


def _card(recipe: Recipe, ours: bool) -> dict[str, Any]:
    """One line of `phi3-lora recipes` about a recipe."""
    from phi3_lora_plugin.plan.presets import preset_needs

    about, quantized = recipe.about, recipe.model.quantize != "none"
    needs = list(about.needs)
    if quantized and not any("qlora" in need for need in needs):
        needs.append("phi3-lora-plugin[qlora]")
    if recipe.data.path is None:
        needs.append("data.path")
    need = preset_needs().get(recipe.name) if ours else None
    return {
        "group": about.group or "other",
        "base": recipe.model.path,
        "learns": "reward" if recipe.reward else recipe.preference.loss,
        "method": about.method or ("QLoRA" if quantized else "LoRA"),
        "memory": about.memory,
        "device": None if need is None else need.device,
        "peak": None if need is None else need.peak,
        "need": need,
        "needs": needs,
        "source": about.source,
        "file": str(recipe.source),
    }
