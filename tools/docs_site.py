"""Hooks of `mkdocs build`: pages made from files outside `docs/`, and the house of docs/design.md as a picture.

README.md is the front page. Everything here only reads; `docs/` itself is what ships in the wheel.
"""

import html
import re
from pathlib import Path

from messages import every_message
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
ELSEWHERE = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}


def on_files(files: Files, config: dict[str, object]) -> Files:
    """Add the pages that stand at the top of the checkout, and the list of messages."""
    for source, name in ELSEWHERE.items():
        files.append(File.generated(config, name, content=from_the_top((ROOT / source).read_text(encoding="utf-8"))))  # type: ignore[arg-type]
    files.append(File.generated(config, "messages.md", content=messages_page()))  # type: ignore[arg-type]
    return files


def on_page_markdown(markdown: str, page: object, config: dict[str, object], files: Files) -> str:
    """Point at the repository where a page links to a file that is not a page; draw the house."""
    code = f"{config['repo_url']}/tree/main/"
    markdown = re.sub(r"\]\(\.\./([^)]+)\)", lambda found: f"]({ELSEWHERE.get(found[1]) or code + found[1]})", markdown)
    return re.sub(r"^```mermaid\n(.*?)^```$", lambda found: house(found[1]), markdown, flags=re.MULTILINE | re.DOTALL)


def from_the_top(text: str) -> str:
    """Markdown of a file at the top of the checkout, with links as from inside `docs/`."""
    text = re.sub(r"\]\(docs/([^)]+)\)", r"](\1)", text)
    return re.sub(r"\]\((\w+\.md)\)", lambda found: f"]({ELSEWHERE.get(found[1]) or found[1]})", text)


def house(drawing: str) -> str:
    """The layers of the Mermaid picture as rows of boxes, which need no script."""
    names = dict(re.findall(r'(\w+)\["([^"]+)"\]', drawing))
    bare = re.sub(r'\["[^"]*"\]', "", drawing)
    arrows = [[end.split(" & ") for end in line.strip().split(" --> ")] for line in bare.splitlines()[1:]]
    rows = [arrows[0][0], *(arrow[1] for arrow in arrows)]
    lines = ['<div style="display:grid;gap:.3rem;margin:1rem 0">']
    for row in rows:
        lines.append('<div style="display:flex;gap:.3rem">')
        for name in row:
            title, _, text = names[name].partition(": ")
            box = "flex:1;border:1px solid currentColor;border-radius:.2rem;padding:.2rem .5rem"
            lines.append(f'<div style="{box}"><strong>{html.escape(title)}</strong> {html.escape(text)}</div>')
        lines.append("</div>")
    return "\n".join([*lines, "</div>"])


def messages_page() -> str:
    """Every message that an error of this package can have, by the module that raises it."""
    lines = ["# Messages", "", "Every error of this package, read from its source. `...` stands for what differs.", ""]
    for module, found in every_message().items():
        lines += [f"## {module}", ""]
        lines += [f"- `{kind}`: {_escaped(text)}" for kind, text in found]
        lines.append("")
    return "\n".join(lines)


def _escaped(text: str) -> str:
    return re.sub(r"([\\`*_<>\[\]{}|#])", r"\\\1", " ".join(text.split()))
