"""JSON files of a model with values of another kind: one error each, which names the file and the value."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny

from phi3_lora_plugin.error import Phi3LoraError
from phi3_lora_plugin.export.convert import convert
from phi3_lora_plugin.inspect.inspect import inspect

VALUES: list[Any] = [True, -1, 2.5, "x", [], {"x": 1}, float("inf"), 10**400, [None]]
SIZES = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "max_position_embeddings"]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.base(tmp_path_factory.mktemp("whole") / "base")


@pytest.mark.parametrize("size", SIZES)
def test_a_size_of_another_kind_is_named(size: str, whole: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(whole, tmp_path / "base"))
    good = json.loads((base / "config.json").read_text())
    for value in VALUES:
        (base / "config.json").write_text(json.dumps(good | {size: value}))
        for to in ("llama-base", "gguf"):
            with pytest.raises(Phi3LoraError, match=rf"(?s)config\.json.*{size}="):
                convert(base, tmp_path / ("out.gguf" if to == "gguf" else "out"), to)
        inspect(base)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.gguf").exists()


def test_other_files_are_held_to_their_kinds(whole: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(whole, tmp_path / "base"))
    for name, content, says in (
        ("generation_config.json", {"eos_token_id": 2.5}, "eos_token_id=2.5"),
        ("tokenizer.json", {"model": {"type": "BPE"}}, "is no tokenizer that can be read"),
        ("model.safetensors.index.json", {"weight_map": {"x": 5}}, "weight_map="),
    ):
        before = (base / name).read_bytes() if (base / name).is_file() else None
        (base / name).write_text(json.dumps(content))
        with pytest.raises(Phi3LoraError, match=says):
            convert(base, tmp_path / "out.gguf", "gguf")
        inspect(base)
        (base / name).write_bytes(before) if before is not None else (base / name).unlink()
    convert(base, tmp_path / "out.gguf", "gguf")
