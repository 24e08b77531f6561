"""openvino-genai loads what is exported and says the same, merged and with an adapter."""

from __future__ import annotations

from pathlib import Path

import pytest
from exports import EMBEDDED, LONGROPE, adapter, ask, same_words, shaped_base, ship

from phi3_lora_plugin.export.exporter import ExportError

pytest.importorskip("openvino_genai", reason='not installed: pip install "phi3-lora-plugin[openvino]"')


@pytest.mark.slow
def test_an_adapter_on_its_base_says_the_same(tmp_path):
    made = adapter(EMBEDDED, tmp_path / "a", alpha_pattern={"qkv_proj": 32})
    report = ship(made, "openvino", tmp_path / "out", 30, merged=False)
    same_words(report, 30)
    assert report.comparisons[0].stopped == 30 and "adapter.safetensors" in report.files
    assert report.commands == (f"python {tmp_path / 'out'}/ask.py 'Hello'",)
    ask(tmp_path / "out")


def test_signals_are_handled_after_it_as_before(tmp_path, warm):
    """Whatever OpenVINO's compiled models leave behind: a Ctrl-C ended the process with a segmentation fault."""
    program = """
import gc, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from exports import EMBEDDED, adapter, ship
folder = Path(sys.argv[2])
ship(adapter(EMBEDDED, folder / "a"), "openvino", folder / "out", 2)
gc.collect()
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""
    done = warm.run(program, str(Path(__file__).parent), str(tmp_path), cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.endswith("interrupted\n"), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("changes", [LONGROPE, {"sliding_window": 9}], ids=["longrope", "window"])
def test_merged_models_of_other_shapes_say_the_same(tmp_path, changes):
    base = shaped_base(tmp_path / "Phi-3-tiny", **changes)
    report = ship(adapter(base, tmp_path / "a"), "openvino", tmp_path / "out", 4)
    same_words(report, 4)
    assert report.comparisons[0].measure == "logits"
    assert any("would need the long ones" in note for note in report.notes) == (changes is LONGROPE)


def test_what_an_adapter_cannot_hold_is_refused(tmp_path):
    made = adapter(EMBEDDED, tmp_path / "a", use_dora=True)
    with pytest.raises(ExportError, match="plain LoRA on linear layers only; pass --merged"):
        ship(made, "openvino", tmp_path / "out", 2, merged=False)
    with pytest.raises(ExportError, match="--quantize int4: available: none"):
        ship(made, "openvino", tmp_path / "out", 2, quantize=("int4",))
    assert not (tmp_path / "out").exists()
