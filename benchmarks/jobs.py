"""A measured run as a function of a job, for processes that are forked: nothing heavy is imported here."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def run_job(variant: str, job: dict[str, Any], quiet: bool = False) -> None:
    """Measure `variant` and write the result where the job says; what it prints goes to the job's log if `quiet`."""
    if quiet:
        log = os.open(job["log"], os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
    from benchmarks.variants import measure

    Path(job["result"]).write_text(json.dumps(measure(variant, job)))
