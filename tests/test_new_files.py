"""What this package writes has the permissions that the umask gives: a server of another user reads it, or must not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from phi3_lora_plugin.lora_files.loralib_files import write_loralib
from phi3_lora_plugin.model.new_files import new_folder, save_tensors, staged
from phi3_lora_plugin.store.checkpoint import write_checkpoint


@pytest.fixture(params=[0o022, 0o027, 0o002, 0o077], ids=oct)
def mask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_whatever_is_written_follows_the_umask(mask: int, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    save_tensors({"a": torch.ones(2)}, root / "plain.safetensors")
    write_loralib(root / "lora.safetensors", {"lora_A": torch.ones(2)}, {"r": 1})
    new_folder(root, ".some-", ".tmp")
    for overwrite in (False, True):
        with staged(root / "merged", overwrite) as stage:
            save_tensors({"a": torch.ones(2)}, stage / "model.safetensors")
    write_checkpoint(root / "lora", 1, {"adapter_config.json": b"{}"}, resume={"optimizer.pt": b"x"})
    written = [path for path in root.rglob("*")]
    assert len(written) > 8
    for path in written:
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~mask, path


def test_a_merged_model_and_a_converted_adapter_follow_the_umask(tmp_path: Path) -> None:
    from lora_runs import peft_model

    from phi3_lora_plugin.export.convert import convert
    from phi3_lora_plugin.export.merge import merge

    model = peft_model()
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model.save_pretrained(adapter)
    model.unload().save_pretrained(base)
    before = os.umask(0o022)
    try:
        merge(adapter, base, tmp_path / "merged")
        convert(adapter, tmp_path / "split", to="split", base=str(base))
    finally:
        os.umask(before)
    for folder in (tmp_path / "merged", tmp_path / "split"):
        for path in [folder, *folder.rglob("*")]:
            assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644), path
