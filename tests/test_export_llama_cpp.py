"""llama.cpp loads what is exported and says the same: float32 exactly, quantised forms with the loss that is shown."""

from __future__ import annotations

import json

import numpy
import pytest
from commands import phi3_lora
from exports import EMBEDDED, LONGROPE, PARTIAL, adapter, same_words, shaped_base, ship

from phi3_lora_plugin.export.exporter import ExportError
from phi3_lora_plugin.export.gguf_quantize import FORMS, quantize_rows, tensor_type

pytestmark = pytest.mark.slow

gguf = pytest.importorskip("gguf", reason='gguf is not installed: pip install "phi3-lora-plugin[llama-cpp]"')
pytest.importorskip("xllamacpp", reason='llama.cpp is not installed: pip install "phi3-lora-plugin[llama-cpp]"')


def test_the_merged_model_says_the_same_and_quantised_forms_are_measured(random_adapter, tmp_path):
    report = ship(random_adapter, "llama.cpp", tmp_path / "out", quantize=("q8_0", "q4_k_m"))
    same_words(report)
    assert report.comparisons[0].stopped == 100
    rough = {one.variant: one for one in report.comparisons[1:]}
    assert list(rough) == ["q8_0", "q4_k_m"]
    assert 1e-4 < rough["q8_0"].mean_difference < rough["q4_k_m"].mean_difference
    assert set(report.files) == {"pirate-q8_0.gguf", "pirate-q4_k_m.gguf"}
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "out" / "pirate-q8_0.gguf").tensors}
    assert kinds["blk.0.attn_qkv.weight"] == "Q8_0" and kinds["blk.0.attn_norm.weight"] == "F32"
    assert f"llama-server -m {tmp_path / 'out'}/pirate-q4_k_m.gguf -c 512 --jinja" in report.commands


def test_base_and_lora_say_the_same(random_adapter, tmp_path):
    report = ship(random_adapter, "llama.cpp", tmp_path / "out", 30, merged=False, dtype="float32")
    same_words(report, 30)
    assert set(report.files) == {"base-f32.gguf", "pirate-lora.gguf"}
    assert "--lora" in report.commands[0]


@pytest.mark.parametrize(
    "changes", [LONGROPE, PARTIAL, {"tie_word_embeddings": True}], ids=["longrope", "partial", "tied"]
)
def test_other_shapes_say_the_same(tmp_path, changes):
    base = shaped_base(tmp_path / "Phi-3-tiny", **changes)
    report = ship(adapter(base, tmp_path / "a"), "llama.cpp", tmp_path / "out", 12)
    same_words(report, 12)


def test_where_llama_cpp_computes_otherwise_it_is_refused_or_told(tmp_path):
    base = shaped_base(tmp_path / "Phi-3-long", **LONGROPE)
    made = adapter(base, tmp_path / "a")
    with pytest.raises(ExportError, match="long factors for every prompt once its context is above 256"):
        ship(made, "llama.cpp", tmp_path / "out", 2, context=512)
    assert not (tmp_path / "out").exists()
    window = shaped_base(tmp_path / "Phi-3-window", sliding_window=63)
    report = ship(adapter(window, tmp_path / "w"), "llama.cpp", tmp_path / "out", 2)
    assert any("ignores Phi-3's sliding window of 63 tokens" in note for note in report.notes)


def test_an_adapter_from_mlx_is_exported_too(tmp_path):
    from phi3_lora_plugin.lora_files import mlx_files, peft_files

    plain = adapter(EMBEDDED, tmp_path / "peft", r=8, lora_alpha=16)
    (tmp_path / "mlx").mkdir()
    loras = peft_files.parts(peft_files.read_peft(plain)).loras
    mlx_files.write_mlx(tmp_path / "mlx", loras, 6, str(EMBEDDED))
    report = ship(tmp_path / "mlx", "llama.cpp", tmp_path / "out", 8, dtype="float32")
    same_words(report, 8)
    assert any("mlx to fused" in note for note in report.notes)


def test_a_split_adapter_of_a_split_base_is_exported_too(tmp_path):
    from phi3_lora_plugin.export.convert import convert

    fused = adapter(EMBEDDED, tmp_path / "fused")
    convert(EMBEDDED, tmp_path / "llama", "llama-base")
    convert(fused, tmp_path / "split", "split", base=EMBEDDED, target_base=str(tmp_path / "llama"))
    for base in (None, str(EMBEDDED)):
        report = ship(tmp_path / "split", "llama.cpp", tmp_path / f"out-{bool(base)}", 6, base=base, dtype="float32")
        same_words(report, 6)


def test_tensors_get_the_types_that_llama_cpp_gives_them():
    def kinds(form: str, width: int = 3072, layers: int = 32) -> dict[str, list[str]]:
        names = ("attn_qkv", "attn_output", "ffn_up", "ffn_down")
        made = {name: [tensor_type(form, f"blk.{n}.{name}.weight", (64, width), layers, False) for n in range(layers)]
                for name in names}  # fmt: skip
        return made | {"output": [tensor_type(form, "output.weight", (64, width), layers, False)]}

    medium = kinds("q4_k_m")
    better = [n for n in range(32) if n < 4 or n >= 28 or (n - 4) % 3 == 2]
    for name in ("attn_qkv", "ffn_down"):
        assert [n for n, kind in enumerate(medium[name]) if kind == "Q6_K"] == better
    assert set(medium["attn_output"] + medium["ffn_up"]) == {"Q4_K"} and medium["output"] == ["Q6_K"]
    assert set(kinds("q8_0")["ffn_down"] + kinds("q8_0")["output"]) == {"Q8_0"}
    narrow = kinds("q4_k_m", 128, 6)  # rows that no K type fits
    assert set(narrow["ffn_up"]) == {"Q5_0"} and narrow["output"] == ["Q8_0"]
    assert tensor_type("q4_k_m", "token_embd.weight", (64, 3072), 32, True) == "Q6_K"
    assert tensor_type("q4_0", "blk.0.attn_qkv.weight", (64, 40), 2, False) == "F16"


@pytest.mark.parametrize("kind", ["Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q5_0", "Q5_1", "Q4_0"])
def test_rows_are_rounded_by_llama_cpp_and_read_back_near(kind):
    rows = numpy.random.default_rng(0).normal(size=(3, 512)).astype(numpy.float32)
    number = gguf.GGMLQuantizationType[kind]
    back = gguf.quants.dequantize(quantize_rows(rows, kind), number)
    error = float(numpy.sqrt(((back - rows) ** 2).mean()))
    bits = gguf.GGML_QUANT_SIZES[number][1] * 8 / gguf.GGML_QUANT_SIZES[number][0]
    assert 0 < error < 4.0 / 2**bits * 2
    if kind == "Q8_0":  # the one form that both roundings have exactly alike
        assert numpy.array_equal(quantize_rows(rows, kind), gguf.quants.quantize(rows, number))


def test_every_form_has_a_file_type_that_llama_cpp_knows():
    from phi3_lora_plugin.export.gguf_quantize import file_type

    for form in FORMS:
        assert gguf.LlamaFileType(file_type(form)).name == f"MOSTLY_{form.upper()}"


def test_the_command_prints_the_report_and_exits_with_what_happened(random_adapter, tmp_path, capsys):
    words = ["export", random_adapter, "--to", "llama.cpp", "--out", tmp_path / "o", "--prompts", 2]
    assert phi3_lora(*words, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["comparisons"][0]["holds"] and told["target"] == "llama.cpp"
    assert phi3_lora(*words, "--overwrite", "--quantize", "q9") == 2
    assert "--quantize q9: available:" in capsys.readouterr().err
