"""`phi3-lora new`: a first recipe for your rows and your card, by flags or by asking."""

from __future__ import annotations

import re
import sys
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from phi3_lora_plugin.cli.completion import complete_recipe
from phi3_lora_plugin.error import Phi3LoraError
from phi3_lora_plugin.wording import human, nearest, read_size

_FEW = 10  # rows below which none is held out
_BASE = "microsoft/Phi-3-mini-4k-instruct"


class NewRecipeError(Phi3LoraError):
    """A recipe that cannot be written as asked; says which flag, and what it takes."""


def new_command(
    file: Annotated[Path, typer.Argument(metavar="FILE.yaml", help="Recipe to write; never overwritten.")],
    data: Annotated[str | None, typer.Option(help="Your rows: file, glob, folder or hub id.")] = None,
    room: Annotated[
        str | None, typer.Option("--for", metavar="MEMORY", help="Memory of your card, for example 16GB, or cpu.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Base model; default: Phi-3-mini-4k.")] = None,
    preset: Annotated[
        str | None, typer.Option("--from", help="Start from this preset.", autocompletion=complete_recipe)
    ] = None,
) -> None:
    """Write a commented recipe for your data and card.

    Asks for what no flag gives; without a terminal, --data and --for or --from are required.
    """
    from phi3_lora_plugin.cli.starter import starter
    from phi3_lora_plugin.recipe import load_recipe

    if not re.search(r"\.ya?ml$", file.name):
        raise NewRecipeError(f"{file}: a recipe's name ends in .yaml")
    if file.exists():
        raise NewRecipeError(f"{file} exists and is never overwritten; choose another name")
    data, room, base = _asked(data, room, base, preset)
    learns, columns, few = _look_at(data)
    chosen = preset or _choose(room or "", base or _BASE, learns)
    start = load_recipe(chosen, find=_find)
    if preset and learns != "none" and not start.preference.on:
        raise NewRecipeError(f"--from {preset} trains on answers, and {data} has {_HAS[learns]}")
    changes: dict[str, Any] = {}
    if learns != "none" and not start.preference.on:
        changes["preference.loss"] = learns
    if preset and base:
        changes["model.path"] = base
    if columns:
        changes["data.columns"] = columns
    if start.data.eval_path is not None:
        changes["data.eval_path"] = None
    changes["data.eval_fraction"] = 0.0 if few else 0.1
    text = starter(start, file, data, changes)
    try:
        with file.open("x", encoding="utf-8") as stream:  # whatever was written there since the look above stays
            stream.write(text)
    except OSError as error:
        raise NewRecipeError(f"{file} cannot be written: {error.strerror or error}") from error
    load_recipe(file, find=_find)
    print(f"wrote {file}, from {chosen}; next:")
    print(f"  phi3-lora data check {file}\n  phi3-lora plan {file}\n  phi3-lora train {file}")


def _asked(
    data: str | None, room: str | None, base: str | None, preset: str | None
) -> tuple[str, str | None, str | None]:
    """The flags, and answers for those that are missing."""
    if not sys.stdin.isatty():
        missing = [] if data else ["--data FILE"]
        missing += [] if room or preset else ["--for MEMORY (or --from PRESET)"]
        if missing:
            raise NewRecipeError(f"there is no terminal to ask on; pass {' and '.join(missing)}")
        assert data is not None
        return data, room, base
    data = data or typer.prompt("Your rows (file, glob, folder or hub id)")
    if preset is None:
        room = room or typer.prompt("Memory of your card, or cpu", default="24GB")
        base = base or typer.prompt("Base model", default=_BASE)
    return str(data), room, base


def _find(name: str) -> Any:
    from phi3_lora_plugin.plugins.discovery import load_plugins

    return load_plugins().pick("recipes", name)


#: `preference.loss` of a preset for rows that are not answers alone -> what such rows have.
_HAS = {"sigmoid": "chosen and rejected ones", "kto": "labels, good and bad ones"}


def _choose(room: str, base: str, learns: str) -> str:
    """The preset of ours for a base that makes most of a card: unquantised if that fits, then the largest that fits."""
    from phi3_lora_plugin.cli.recipes import all_cards

    cards = [card for card in all_cards() if card.get("need") is not None and card["group"] != "published"]
    if room.strip().lower() == "cpu":
        return next(str(card["name"]) for card in cards if card["device"] == "cpu" and card["learns"] == "none")
    memory = None if room.strip().isdigit() else read_size(room)
    if memory is None:
        raise NewRecipeError(f"--for {room}: not a size; write 16GB, or cpu")
    bases = sorted({card["base"] for card in cards if card["device"] == "cuda"})
    known = {name.lower(): one for one in bases for name in (one, one.rpartition("/")[2])}
    known |= {name.removesuffix("-instruct"): one for name, one in known.items()}
    wanted = known.get(base.lower())
    if wanted is None:
        near = nearest(base, known, f"; available: {', '.join(bases)}")
        raise NewRecipeError(f"--base {base}: no preset has it{near}; another base needs --from PRESET")
    mine = [card for card in cards if card["device"] == "cuda" and card["base"] == wanted]
    mine = [card for card in mine if card["learns"] == learns]
    if not mine:
        raise NewRecipeError(f"no preset trains {wanted} on {_HAS.get(learns, 'answers')}; start from one with --from")
    fitting = [card for card in mine if card["need"].fits_into(memory)]
    if not fitting:
        least = min(mine, key=lambda card: card["peak"])
        raise NewRecipeError(
            f"--for {room}: {wanted} takes {human(least['peak'])} at least ({least['name']}); "
            "phi3-lora recipes --for lists what fits"
        )

    def made_for(card: dict[str, Any]) -> tuple[bool, bool, int]:
        stated = read_size(" ".join(str(card["memory"]).split()[:2])) or 0
        return stated <= memory, card["method"] != "QLoRA", stated

    return str(max(fitting, key=made_for)["name"])


def _look_at(data: str) -> tuple[str, dict[str, str] | None, bool]:
    """(`preference.loss` for rows like these, the columns to write down, whether there are too few to hold some out).

    Only the first rows are looked at, and none of a hub id.

    Raises:
        SourceError: there is no such file, or none of its rows can be read.
    """
    import yaml

    from phi3_lora_plugin.chat.formats import detect
    from phi3_lora_plugin.chat.marks import label_of
    from phi3_lora_plugin.chat.propose import propose
    from phi3_lora_plugin.chat.readers import Row
    from phi3_lora_plugin.chat.sources import find_sources

    rows: list[dict[str, Any]] = []
    sources = find_sources(data, "train", hub=False).sources
    for source in sources[:1]:
        rows = [row.values for row in islice(source.rows(), 50) if isinstance(row, Row)]
    few = len(sources) == 1 and len({str(row) for row in rows}) < _FEW
    pairs = any({"chosen", "rejected"} <= row.keys() for row in rows)
    # A label is KTO's only where some are false; rows that are all good can be learned as they are.
    judged = not pairs and any(label_of(row) is False for row in rows)
    learns = "sigmoid" if pairs else "kto" if judged else "none"
    if not rows or pairs or any(detect(row) for row in rows):
        return learns, None, few
    proposed = propose(rows)
    return learns, yaml.safe_load(proposed.partition("=")[2].strip("'")) if proposed else None, few
