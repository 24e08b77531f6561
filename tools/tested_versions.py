"""Write what `phi3-lora doctor` and docs/versions.md call tested, from the constraints of the gate.

python tools/tested_versions.py
"""

import json
import re
import tomllib
from pathlib import Path

from phi3_lora_plugin.doctor.extras import DEVELOPERS

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "phi3_lora_plugin" / "doctor" / "tested.json"
SOURCES = {"oldest": ".ci/constraints-oldest.txt", "newest": "constraints.txt"}


def tested() -> dict[str, dict[str, str]]:
    """Library that users install -> the version in each file of constraints that names it."""
    table: dict[str, dict[str, str]] = {}
    for end, file in SOURCES.items():
        for name, version in re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE):
            if name in installed_by_users():
                table.setdefault(name, {})[end] = version
    return dict(sorted(table.items()))


def installed_by_users() -> set[str]:
    """Names of the requirements, those of the extras for developers left out."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [some for extra, some in project["optional-dependencies"].items() if extra not in DEVELOPERS]
    lines = [*project["dependencies"], *(line for some in extras for line in some)]
    return {re.split(r"[\[<>=; ]", line)[0] for line in lines}


if __name__ == "__main__":
    TABLE.write_text(json.dumps(tested(), indent=1) + "\n", encoding="utf-8")
