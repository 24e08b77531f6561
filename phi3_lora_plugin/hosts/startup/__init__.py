"""Activation from the environment, for hosts that ask nobody: `PYTHONPATH=$(phi3-lora host-path startup)`.

Python runs the `sitecustomize` of that folder as it starts, in each process that inherits the environment, `torchrun`'s
and the restarts of LLaMA-Factory among them. Without `PHI3_LORA_ACTIVATE=1` it does nothing.
"""

from __future__ import annotations

from pathlib import Path


def folder() -> Path:
    """The folder for PYTHONPATH; nothing else lies in it."""
    return Path(__file__).parent / "path"
