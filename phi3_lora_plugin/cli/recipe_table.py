"""The table of `phi3-lora recipes`: one group a heading, 80 columns wide, names never cut."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from phi3_lora_plugin.wording import human

#: What a recipe needs, as the table writes it, and what that means.
NEEDS = {
    "data": "your rows: data.path=FILE",
    "qlora": "pip install 'phi3-lora-plugin[qlora]'",
    "hub": "the data set comes from the hub",
}
_SHORT = {"data.path": "data", "phi3-lora-plugin[qlora]": "qlora", "the data set from the hub": "hub"}
_PLACES = {"cpu": "CPU", "mps": "Mac"}


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print cards of recipes (see `recipes.all_cards`) by group, then what the words mean and what to run next."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, markup=False)
    whole = [row for row in rows if row["group"] != "broken"]
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    longest = max((len(row["name"]) for row in whole), default=0)
    table.add_column("recipe", min_width=min(longest, console.width - 45), overflow="fold")
    for column, width in (("method", 9), ("memory", 10), ("peak", 8), ("needs", 12)):
        table.add_column(column, width=width, overflow="fold")
    used: list[str] = []
    for group in dict.fromkeys(row["group"] for row in sorted(whole, key=_rank)):
        table.add_row()
        table.add_row(Text(group, style="bold"))
        for row in (row for row in whole if row["group"] == group):
            needs = [_SHORT.get(need, need) for need in row["needs"]]
            used += [need for need in needs if need in NEEDS and need not in used]
            cells = (row["name"], row["method"], _memory(row), peak(row), ", ".join(needs) or "-")
            table.add_row(*(Text(str(cell)) for cell in cells))
    with console.capture() as drawn:
        console.print(table)
    print("\n".join(line.rstrip() for line in drawn.get().splitlines()))
    for row in (row for row in rows if row["group"] == "broken"):
        print("\n    ".join([f"\nbroken: {row['name']}", *row["problems"]]))
    print("\nmemory: of the device it is made for; peak: what `phi3-lora plan` expects")
    for need in used:
        print(f"{need}: {NEEDS[need]}")
    print("\nphi3-lora recipes --for 16GB           only those that fit")
    print("phi3-lora show NAME                    one of them")
    print("phi3-lora train NAME data.path=FILE    run it")


def _memory(row: Mapping[str, Any]) -> str:
    """The size that a recipe states, with the kind of device where that is not a card."""
    text = str(row["memory"] or "-")
    found = re.match(r"\d+ GB", text)
    return f"{found[0]} {_PLACES[row['device']]}" if found and row["device"] in _PLACES else text


def peak(row: Mapping[str, Any]) -> str:
    """What the plan of a preset says; recipes of other packages have none."""
    return "-" if row.get("peak") is None else human(row["peak"])


def _rank(row: Mapping[str, Any]) -> tuple[int, str]:
    """The one to try first on top, other packages' at the end."""
    return {"try it": 0, "published": 2, "other": 3}.get(row["group"], 1), row["group"]
