"""`phi3-lora` as its script starts it, in the process of a test."""

from __future__ import annotations

import sys

import pytest

from phi3_lora_plugin.cli import main


def phi3_lora(*words: object) -> int:
    """The exit code of `phi3-lora WORDS`; what it prints goes where the test's own output goes."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as left:
        patch.setattr(sys, "argv", ["phi3-lora", *map(str, words)])
        main()
    return int(left.value.code or 0)
