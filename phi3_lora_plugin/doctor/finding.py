"""One thing that was found out, and all of them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Literal

State = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        area: heading it stands under, such as "libraries".
        name: what was looked at.
        text: what was found.
        state: ok; note: works, and is worth knowing; problem: something will fail.
        remedy: what to do, for a problem and for some notes.
    """

    area: str
    name: str
    text: str
    state: State = "ok"
    remedy: str = ""


@dataclass(frozen=True)
class Report:
    """All findings, in the order of the checks."""

    findings: tuple[Finding, ...]

    @property
    def problems(self) -> tuple[Finding, ...]:
        """What will fail."""
        return tuple(finding for finding in self.findings if finding.state == "problem")

    def to_json(self) -> str:
        """`{"ok": ..., "findings": [...]}`, indented, for issue reports and scripts."""
        rows = [asdict(finding) for finding in self.findings]
        return json.dumps({"ok": not self.problems, "findings": rows}, indent=2, ensure_ascii=False)
