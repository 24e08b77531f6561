"""Write what `phi3-lora doctor` and docs/versions.md call tested, from the constraints of the gate.

python tools/tested_versions.py
"""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "phi3_lora_plugin" / "doctor" / "tested.json"
SOURCES = {"oldest": ".ci/constraints-oldest.txt", "newest": "constraints.txt"}


def tested() -> dict[str, dict[str, str]]:
    """Library -> the version in each file of constraints that names it."""
    table: dict[str, dict[str, str]] = {}
    for end, file in SOURCES.items():
        for name, version in re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE):
            table.setdefault(name, {})[end] = version
    return dict(sorted(table.items()))


if __name__ == "__main__":
    TABLE.write_text(json.dumps(tested(), indent=1) + "\n", encoding="utf-8")
