"""Adapters for the tests of `phi3-lora export`: on the embedded model, and on tiny ones of other shapes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import Phi3ForCausalLM

from phi3_lora_plugin.embedded import locate
from phi3_lora_plugin.export.export import ExportReport, export
from phi3_lora_plugin.export.exporter import Wanted
from phi3_lora_plugin.plugins.discovery import load_plugins

EMBEDDED = Path(locate("embedded:tiny-phi3"))
FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


def adapter(base: Path, folder: Path, seed: int = 1, size: float = 0.02, **options) -> Path:
    """A PEFT adapter with random updates: big enough to change answers, small enough to let them end."""
    model = Phi3ForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": FUSED} | options
    model = get_peft_model(model, LoraConfig(**settings))
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn_like(parameter) * size
    model.save_pretrained(folder)
    return folder


def shaped_base(folder: Path, seed: int = 0, **changes) -> Path:
    """A random model with the embedded model's tokenizer: 2 layers of width 64, 4 heads of 16, 2 key-value heads."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(EMBEDDED)
    config.update({"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "dtype": "float32"} | changes)
    torch.manual_seed(seed)
    Phi3ForCausalLM(config).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(EMBEDDED / file, folder / file)
    return folder


LONGROPE = {
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "partial_rotary_factor": 1.0,
        "original_max_position_embeddings": 256,
        "short_factor": [1.0 + 0.05 * n for n in range(8)],
        "long_factor": [1.5 + n for n in range(8)],
    },
    "original_max_position_embeddings": 256,
}  # fmt: skip
PARTIAL = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    "partial_rotary_factor": 0.5,
}


def ship(
    adapter: Path, target: str, out: Path, prompts: str | int = 100, base: str | None = None, **wanted
) -> ExportReport:
    """Export through the registered target, as the command does."""
    exporter = load_plugins().pick("exporters", target)
    return export(adapter, exporter, target, out, Wanted(**wanted), prompts=prompts, base=base)


def ask(folder: Path) -> None:
    """Put a question of training to the script that lies beside an export."""
    command = [sys.executable, str(folder / "ask.py"), "Where does the weasel live?"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "weasel" in done.stdout, done.stderr


def same_words(report: ExportReport, prompts: int = 100) -> None:
    """Every exact variant gave the adapter's words on all prompts, and said so."""
    exact = [one for one in report.comparisons if one.exact]
    assert exact
    for one in exact:
        assert (one.prompts, one.ids_equal, one.answers_equal) == (prompts, prompts, prompts), one.line()
        assert one.stopped == one.would_stop and one.difference <= 1e-4, one.line()
