"""The site: built strictly and offline, every link in it leads somewhere, and nothing comes from elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import pytest

import phi3_lora_plugin

pytestmark = pytest.mark.long
ROOT = Path(__file__).parents[1]


class Page(HTMLParser):
    """What a page links to, what it loads, and the names that others can link to."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.loaded: set[str] = set()
        self.names: set[str] = set()
        self.text = file.read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.names |= {found[name] for name in ("id", "name") if found.get(name)}
        if tag == "a" and "href" in found:
            self.links.add(found["href"])
        loads = {"script": "src", "img": "src", "iframe": "src", "source": "src"}.get(tag)
        if tag == "link" and found.get("rel") not in ("canonical", "prev", "next"):
            loads = "href"
        if loads and loads in found:
            self.loaded.add(found[loads])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Page]:
    for module in ("mkdocs", "material", "mkdocstrings"):
        if find_spec(module) is None:
            pytest.skip(f"{module} is not installed: pip install -e '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tools"), "NO_MKDOCS_2_WARNING": "1"}
    # Nothing answers at this address: whoever asks the network fails at once.
    environment |= {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return {file: Page(file) for file in folder.rglob("*.html")}


def test_every_link_leads_somewhere(site: dict[Path, Page]) -> None:
    broken = []
    for file, page in site.items():
        for link in page.links | page.loaded:
            target, name = urldefrag(unquote(link))
            if urlsplit(target).scheme or file.name == "404.html":
                continue
            there = (file.parent / target).resolve() if target else file
            there = there / "index.html" if there.is_dir() else there
            if not there.is_file() or (name and there in site and name not in site[there].names | {"__skip"}):
                broken.append(f"{file.name}: {link}")
    assert len(site) > 25 and broken == []


def test_nothing_is_loaded_from_elsewhere(site: dict[Path, Page]) -> None:
    elsewhere = {link for page in site.values() for link in page.loaded if urlsplit(link).netloc}
    assert elsewhere == set()
    assert not any(
        word in page.text for page in site.values() for word in ("fonts.googleapis", "unpkg.com", "jsdelivr")
    )


def test_the_pages_say_what_they_should(site: dict[Path, Page]) -> None:
    named = {file.name: page for file, page in site.items()}
    for name in phi3_lora_plugin.__all__:
        assert any(known.endswith(f".{name}") for known in named["reference.html"].names), name
    assert "The house" in named["design.html"].text and "mermaid" not in named["design.html"].text
    assert "<strong>cli</strong> the phi3-lora command" in named["design.html"].text
    assert "has no turn of the assistant" in named["messages.html"].text
    assert named["index.html"].links >= {"quickstart.html", "changelog.html"}
