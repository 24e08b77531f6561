"""`phi3-lora docs`: the pages of the documentation, from the installed package; messages name them by this command."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from phi3_lora_plugin.error import Phi3LoraError
from phi3_lora_plugin.shipped import shipped
from phi3_lora_plugin.wording import nearest


class NoSuchPage(Phi3LoraError):
    """A page that does not exist."""


def pages() -> dict[str, str]:
    """Page -> its heading, by name."""
    found = {}
    for file in shipped("docs").iterdir():
        if file.name.endswith(".md"):
            head = file.read_text(encoding="utf-8").partition("\n")[0]
            found[file.name.removesuffix(".md")] = head.lstrip("# ")
    return dict(sorted(found.items()))


def complete_page(incomplete: str) -> list[str]:
    """Pages, for a shell."""
    return [name for name in pages() if name.startswith(incomplete)]


def docs_command(
    page: Annotated[str | None, typer.Argument(help="Page, for example data.", autocompletion=complete_page)] = None,
) -> None:
    """Read the documentation; without a page, list them."""
    known = pages()
    if page is None:
        width = max(map(len, known))
        for name, head in known.items():
            print(f"{name:<{width}}  {head}")
        return
    name = page.removesuffix(".md").rpartition("/")[2]
    if name not in known:
        raise NoSuchPage(f"no page {page!r}{nearest(name, known)}; available: {', '.join(known)}")
    text = (shipped("docs") / f"{name}.md").read_text(encoding="utf-8")
    if not sys.stdout.isatty():
        print(text, end="")
        return
    from rich.console import Console
    from rich.markdown import Markdown

    console = Console()
    with console.pager(styles=True, links=True):
        console.print(Markdown(text))
