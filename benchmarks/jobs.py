"""A measured run as a function of a job, for processes that are forked: nothing heavy is imported here."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

#: What a forked process ends with where something it was forked from has touched CUDA: a fork cannot use it then.
BAD_FORK = 77


def run_job(variant: str, job: dict[str, Any], quiet: bool = False) -> None:
    """Measure `variant` and write the result to the job's file; what it prints goes to the job's log if `quiet`."""
    if quiet:
        log = os.open(job["log"], os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
    import torch

    from benchmarks.variants import measure

    if torch.cuda._is_in_bad_fork():
        sys.exit(BAD_FORK)
    try:
        result = measure(variant, job)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        result = {"variant": variant, "failed": f"out of memory: {(str(error).splitlines() or [''])[0][:160]}"}
    Path(job["result"]).write_text(json.dumps(result))


def out_of_memory(error: BaseException) -> bool:
    """Whether a card or the machine is out of memory: PyTorch has no class for the second."""
    import torch

    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
