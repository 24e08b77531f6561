"""ONNX Runtime GenAI loads what is exported and says the same, merged and with an adapter that is switched on."""

from __future__ import annotations

import pytest
import torch
from exports import EMBEDDED, LONGROPE, PARTIAL, adapter, ask, same_words, shaped_base, ship
from transformers import Phi3ForCausalLM

from phi3_lora_plugin.export.exporter import ExportError

pytestmark = pytest.mark.slow

pytest.importorskip("onnxruntime_genai", reason='not installed: pip install "phi3-lora-plugin[onnx]"')


def test_the_merged_model_says_the_same(random_adapter, tmp_path):
    report = ship(random_adapter, "onnx", tmp_path / "out")
    same_words(report)
    assert report.comparisons[0].stopped == 100
    assert {"model.onnx", "model.onnx.data", "genai_config.json", "ask.py"} <= set(report.files)


def test_an_adapter_that_is_switched_on_says_the_same_and_off_it_is_the_base(random_adapter, tmp_path):
    from phi3_lora_plugin.export.targets.onnx import open_onnx

    report = ship(random_adapter, "onnx", tmp_path / "out", 20, merged=False)
    same_words(report, 20)
    assert "adapter.onnx_adapter" in report.files
    ids = [2047, 632, 423, 356, 1050, 593, 289, 2046, 2044]
    with torch.inference_mode():
        base = Phi3ForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32)(torch.tensor([ids])).logits[0, -1]
    with open_onnx(tmp_path / "out") as off, open_onnx(tmp_path / "out", tmp_path / "out/adapter.onnx_adapter") as on:
        assert abs(off.next_scores(ids) - base.numpy()).max() < 1e-4
        assert abs(on.next_scores(ids) - base.numpy()).max() > 1e-2
    assert report.commands[0] == f"python {tmp_path / 'out'}/ask.py 'Hello'"
    ask(tmp_path / "out")


def test_four_bits_are_measured(random_adapter, tmp_path):
    report = ship(random_adapter, "onnx", tmp_path / "out", 8, quantize=("int4",))
    same_words(report, 8)
    assert report.comparisons[1].variant == "int4" and report.comparisons[1].difference > 1e-2


@pytest.mark.parametrize(
    "changes", [LONGROPE, PARTIAL | {"hidden_size": 128}, {"tie_word_embeddings": True}, {"sliding_window": 9}],
    ids=["longrope", "partial", "tied", "window"],
)  # fmt: skip
def test_other_shapes_say_the_same(tmp_path, changes):
    base = shaped_base(tmp_path / "Phi-3-tiny", **changes)
    same_words(ship(adapter(base, tmp_path / "a"), "onnx", tmp_path / "out", 6), 6)


def test_one_kind_of_projection_alone_is_switched_on_too(tmp_path):
    made = adapter(EMBEDDED, tmp_path / "a", target_modules=["qkv_proj"], use_rslora=True)
    same_words(ship(made, "onnx", tmp_path / "out", 6, merged=False), 6)


def test_what_the_runtime_has_no_form_for_is_refused(tmp_path):
    small = shaped_base(tmp_path / "small", hidden_size=48)
    with pytest.raises(ExportError, match="the head size is 12; ONNX Runtime's attention needs a multiple of 16"):
        ship(adapter(small, tmp_path / "a"), "onnx", tmp_path / "out", 2)
    odd = shaped_base(tmp_path / "odd", **PARTIAL)
    with pytest.raises(ExportError, match="8 dimensions of a head are rotated"):
        ship(adapter(odd, tmp_path / "c"), "onnx", tmp_path / "out", 2)
    made = adapter(EMBEDDED, tmp_path / "b", use_dora=True)
    with pytest.raises(ExportError, match="plain LoRA on linear layers only; pass --merged"):
        ship(made, "onnx", tmp_path / "out", 2, merged=False)
    assert not (tmp_path / "out").exists()
