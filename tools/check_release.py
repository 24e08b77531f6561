"""Refuse a release whose tag, version, changelog and repository do not agree.

python tools/check_release.py vX.Y.Z [REPOSITORY_URL]
"""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def problems(tag: str, repository: str | None, project: dict[str, object], changelog: str) -> list[str]:
    """What does not agree, a sentence each."""
    version, urls = str(project["version"]), dict(project["urls"])  # type: ignore[call-overload]
    found = []
    if tag != f"v{version}":
        found.append(f"the tag is {tag}, and pyproject.toml has version {version}")
    if not re.search(rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$", changelog, re.MULTILINE):
        found.append(f"CHANGELOG.md has no heading `## [{version}] - YYYY-MM-DD`")
    wrong = [name for name, url in urls.items() if repository and not url.startswith(repository)]
    if wrong:
        found.append(f"project.urls {', '.join(wrong)}: not in {repository}")
    return found


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    found = problems(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None, project, changelog)
    print("\n".join(found) or f"{sys.argv[1]} can be released")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
