"""run.json: what a run is and came to, for reports; written by the run, changed at its milestones."""

from __future__ import annotations

import json
import math
import os
import socket
import time
from pathlib import Path
from typing import Any

from phi3_lora_plugin.small_file import BadFile, read_json
from phi3_lora_plugin.store.layout import replace_file

RUN = "run.json"
RUNNING, DONE, INTERRUPTED, FAILED, KILLED = "running", "done", "interrupted", "failed", "killed"


class RunFile:
    """The file of one run. What cannot be written is left out: no run fails because of what is written about it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.content: dict[str, Any] = {}

    def begin(self, resumed: bool, **facts: Any) -> None:
        """Start the file; of the run that is resumed, its earlier sessions stay."""
        sessions = read_run(self.folder).get("sessions") if resumed else None
        now = {"started": time.time(), "pid": os.getpid(), "host": socket.gethostname()}
        earlier = [one for one in sessions if isinstance(one, dict)] if isinstance(sessions, list) else []
        self.content = {"status": RUNNING, "sessions": [*earlier, now], **facts}
        self._write()

    def end(self, status: str, **facts: Any) -> None:
        """What became of the run; nothing if it never began."""
        if self.content:
            self.content["sessions"][-1]["ended"] = time.time()
            self.content |= {"status": status, **facts}
            self._write()

    def _write(self) -> None:
        try:
            text = json.dumps(finite(self.content), ensure_ascii=False, allow_nan=False, indent=1)
            replace_file(self.folder / RUN, text.encode())
        except (OSError, ValueError, TypeError):
            return


def read_run(folder: Path) -> dict[str, Any]:
    """The content of a run's file; {} where there is none that can be read. A dead process's run is `killed`."""
    try:
        content = read_json(folder / RUN)
    except BadFile:
        return {}
    if not isinstance(content, dict):
        return {}
    if content.get("status") == RUNNING and _is_dead(content.get("sessions")):
        content["status"] = KILLED
    return content


def finite(value: Any) -> Any:
    """The same with null for what JSON has no number for."""
    if isinstance(value, dict):
        return {name: finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_dead(sessions: Any) -> bool:
    last = sessions[-1] if isinstance(sessions, list) and sessions else {}
    if not isinstance(last, dict) or last.get("host") != socket.gethostname() or not isinstance(last.get("pid"), int):
        return False
    import psutil

    try:
        return not psutil.pid_exists(last["pid"])
    except OverflowError:
        return False
