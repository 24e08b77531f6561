"""mlx-lm loads what is exported and says the same, and what it trained comes back exactly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from exports import EMBEDDED, LONGROPE, PARTIAL, adapter, same_words, shaped_base, ship
from safetensors.torch import load_file, save_file

from phi3_lora_plugin.export.convert import convert
from phi3_lora_plugin.export.exporter import ExportError
from phi3_lora_plugin.lora_files.mlx_files import MlxError, looks_like_mlx, read_mlx, write_mlx
from phi3_lora_plugin.lora_files.peft_files import parts, read_peft

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def mlx():
    return pytest.importorskip("mlx_lm", reason='mlx-lm is not installed: pip install "phi3-lora-plugin[mlx]"')


def updates(folder: Path) -> dict[str, torch.Tensor]:
    return {lora.module: lora.delta() for lora in parts(read_peft(folder)).loras}


def test_an_adapter_that_mlx_wrote_is_read_exactly(shared_data, tmp_path):
    source = shared_data / "reports" / "adapter_mlx"
    convert(source, tmp_path / "peft", "peft", base=shared_data / "reports" / "base_config" / "config.json")
    theirs, ours = load_file(source / "adapters.safetensors"), load_file(tmp_path / "peft/adapter_model.safetensors")
    assert len(ours) == len(theirs)
    for name, tensor in theirs.items():
        part = {"lora_a": "lora_A", "lora_b": "lora_B"}[name.rpartition(".")[2]]
        assert torch.equal(ours[f"base_model.model.{name.rpartition('.')[0]}.{part}.weight"], tensor.T)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (8, 16)  # scale 2.0 is alpha / r
    assert config["base_model_name_or_path"] == "microsoft/Phi-3-mini-4k-instruct"


def test_there_and_back_is_the_same_update(tmp_path):
    made = adapter(EMBEDDED, tmp_path / "peft", rank_pattern={"o_proj": 2}, use_rslora=True, size=0.1)
    (tmp_path / "mlx").mkdir()
    write_mlx(tmp_path / "mlx", parts(read_peft(made)).loras, 6, str(EMBEDDED))
    assert looks_like_mlx(tmp_path / "mlx") and not looks_like_mlx(made)
    convert(tmp_path / "mlx", tmp_path / "back", "peft")
    before, after = updates(made), updates(tmp_path / "back")
    assert before.keys() == after.keys()
    for module, update in before.items():
        torch.testing.assert_close(after[module], update, rtol=1e-5, atol=1e-6)


def test_last_layers_alone_are_told_by_their_number(tmp_path):
    made = adapter(EMBEDDED, tmp_path / "peft", target_modules=["qkv_proj"], layers_to_transform=[4, 5])
    (tmp_path / "mlx").mkdir()
    write_mlx(tmp_path / "mlx", parts(read_peft(made)).loras, 6, "base")
    config = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())
    assert config["num_layers"] == 2 and config["lora_parameters"]["keys"] == ["self_attn.qkv_proj"]


def test_a_folder_that_is_not_an_adapter_of_mlx_is_told_whole(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_parameters": {"rank": 2}, "num_layers": 1}))
    with pytest.raises(MlxError, match="no adapters.safetensors"):
        read_mlx(tmp_path)
    odd = {"model.x.lora_a": torch.zeros(3, 2), "model.y.weight": torch.zeros(2)}
    save_file(odd, tmp_path / "adapters.safetensors")
    with pytest.raises(MlxError) as raised:
        read_mlx(tmp_path)
    text = str(raised.value)
    assert "scale is None; expected a number" in text and "model.x: lora_b is missing" in text and "model.y" in text


def test_the_adapter_on_its_base_says_the_same(mlx, tmp_path):
    made = adapter(EMBEDDED, tmp_path / "a", rank_pattern={"o_proj": 2})
    report = ship(made, "mlx", tmp_path / "out", 20)
    same_words(report, 20)
    assert report.comparisons[0].stopped == 20
    assert set(report.files) == {"adapters.safetensors", "adapter_config.json"}
    assert f"--model {EMBEDDED} --adapter-path {tmp_path / 'out'}" in report.commands[0]


def test_dora_is_mlx_s_dora(mlx, tmp_path):
    same_words(ship(adapter(EMBEDDED, tmp_path / "a", use_dora=True), "mlx", tmp_path / "out", 3), 3)


@pytest.mark.parametrize("changes", [{}, LONGROPE, PARTIAL], ids=["gqa", "longrope", "partial"])
def test_merged_models_of_other_shapes_say_the_same(mlx, tmp_path, changes):
    base = shaped_base(tmp_path / "Phi-3-tiny", **changes)
    report = ship(adapter(base, tmp_path / "a"), "mlx", tmp_path / "out", 4, merged=True, dtype="float32")
    same_words(report, 4)
    assert any("short ones are shipped" in note for note in report.notes) == (changes is LONGROPE)


def test_four_bits_are_measured(mlx, tmp_path):
    report = ship(adapter(EMBEDDED, tmp_path / "a"), "mlx", tmp_path / "out", 4, quantize=("4bit",))
    same_words(report, 4)
    assert report.comparisons[1].variant == "4bit" and report.comparisons[1].difference > 1e-2
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]["bits"] == 4


def test_where_mlx_computes_otherwise_it_is_refused_or_told(tmp_path):
    base = shaped_base(tmp_path / "Phi-3-tiny", **LONGROPE)
    with pytest.raises(ExportError, match="long factors for every prompt.*pass --merged"):
        ship(adapter(base, tmp_path / "a"), "mlx", tmp_path / "out", 0, merged=False)
    base = shaped_base(tmp_path / "partial", **PARTIAL)
    if "partial_rotary_factor" not in json.loads((base / "config.json").read_text()):
        with pytest.raises(ExportError, match="where only transformers 5 reads it"):
            ship(adapter(base, tmp_path / "b"), "mlx", tmp_path / "out", 0)
    base = shaped_base(tmp_path / "window", sliding_window=100)
    report = ship(adapter(base, tmp_path / "c"), "mlx", tmp_path / "out", 0)
    assert any("ignores Phi-3's sliding window of 100 tokens" in note for note in report.notes)
