"""Fixtures and the environment of the suite: offline, quiet, the same everywhere."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CI", "1")
os.environ["PHI3_LORA_CACHE"] = "off"  # tests write nothing into a real home

import pytest
from hypothesis import HealthCheck, settings

# How fast examples run depends on who else is on the machine; a test is about what comes out.
settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")

SHARED = Path(os.environ.get("PHI3_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real Phi-3 tokenizers, configs, templates and chats; skips where it is not."""
    if not SHARED.is_dir():
        pytest.skip(f"real inputs are not here: {SHARED} does not exist (set PHI3_SHARED_DATA)")
    return SHARED


@pytest.fixture(autouse=True)
def no_mixed_precision_from_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Older transformers leave `bf16=True` of one Trainer in the environment, where the next one finds it."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
