"""Phi-4-mini-flash-reasoning runs only through remote code: the same sentence wherever somebody can name it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
from commands import phi3_lora
from lora_runs import trainer
from peft import LoraConfig, get_peft_model

from phi3_lora_plugin import attach
from phi3_lora_plugin.hosts import activate, base
from phi3_lora_plugin.model.families import UnsupportedModel
from phi3_lora_plugin.recipe import load_recipe

pytestmark = pytest.mark.slow

HUB = "microsoft/Phi-4-mini-flash-reasoning"
WORDS = ("model_type 'phi4flash'", "SambaY", "remote code", "train microsoft/Phi-4-mini-reasoning")


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`flash`: a download without weights; `adapter`: one that somebody trained on it elsewhere; and `rows.jsonl`."""
    folder = tmp_path_factory.mktemp("flash")
    tiny.tokenizer().save_pretrained(folder / "flash")
    code = {"AutoModelForCausalLM": "modeling_phi4flash.Phi4FlashForCausalLM"}
    config = {"model_type": "phi4flash", "auto_map": code, "hidden_size": 2560}
    (folder / "flash" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    get_peft_model(tiny.model(), LoraConfig(r=2, target_modules=["qkv_proj"])).save_pretrained(folder / "adapter")
    tiny.edit(folder / "adapter" / "adapter_config.json", base_model_name_or_path=HUB)
    tiny.write(folder / "rows.jsonl", [tiny.chat("Hi", "Hello.")])
    return folder


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (f"train tiny-cpu model.path={HUB} data.path=rows.jsonl output_dir=out", 2),
        ("train tiny-cpu model.path=flash data.path=rows.jsonl output_dir=out", 2),
        (f"plan tiny-cpu model.path={HUB}", 2),
        ("plan tiny-cpu model.path=flash", 2),
        (f"data check tiny-cpu model.path={HUB} data.path=rows.jsonl", 2),
        ("validate tiny-cpu model.path=flash", 2),
        (f"render tiny-cpu model.path={HUB} data.path=rows.jsonl --host trl", 2),
        ("render tiny-cpu model.path=flash data.path=rows.jsonl --host axolotl", 2),
        (f"inspect {HUB}", 2),
        ("inspect flash", 0),
        ("inspect adapter", 0),
        ("chat flash --prompt hi", 2),
        ("merge adapter merged", 2),
        ("merge adapter merged --base flash", 2),
        ("export adapter --to hub --out shipped", 2),
        ("export adapter --to hub --out shipped --base flash", 2),
        ("eval adapter --data rows.jsonl", 2),
    ],
)
def test_every_command_says_the_sentence(
    words: str, code: int, places: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(places)
    assert phi3_lora(*words.split()) == code
    told = " ".join("".join(capsys.readouterr()).split())
    assert all(word in told for word in WORDS), told[-600:]
    assert "Traceback" not in told
    assert not [name for name in ("merged", "shipped") if (places / name).exists()]


def test_show_prints_the_recipe_and_says_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert phi3_lora("show", "tiny-cpu", f"model.path={HUB}") == 0
    out, error = capsys.readouterr()
    assert f"path: {HUB}" in out and all(word in error for word in WORDS) and "SambaY" not in out


def test_hosts_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture, places: Path) -> None:
    told = activate.activate(load_recipe("tiny-cpu", [f"model.path={HUB}"]), parts=[])
    assert len(told) == 1 and all(word in told[0] for word in WORDS)
    assert base.phi_config(str(places / "flash")) is None
    assert all(word in caplog.text for word in WORDS)


def test_attach_says_that_it_does_not_know_the_model(tmp_path: Path) -> None:
    model = get_peft_model(tiny.model(), LoraConfig(r=2, target_modules=["qkv_proj"]))
    model.config.model_type = "phi4flash"  # as remote code that somebody else runs names itself
    told = attach(trainer(tmp_path, model=model))
    assert [one for one in told if one.startswith("WARNING: model_type 'phi4flash'") and WORDS[1] in one]


def test_a_hub_id_that_is_in_the_cache_is_told_apart_by_its_files(
    monkeypatch: pytest.MonkeyPatch, places: Path
) -> None:
    import huggingface_hub

    from phi3_lora_plugin.model.folder import model_folder
    from phi3_lora_plugin.model.tokenizer import load_tokenizer

    asked: list[bool] = []

    def snapshot(name: str, local_files_only: bool = False, **options: object) -> str:
        asked.append(local_files_only)
        return str(places / "flash")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert load_tokenizer(HUB).vocab_size  # its rows can be looked at
    with pytest.raises(UnsupportedModel, match="SambaY"):
        model_folder(HUB, download=True)
    assert all(asked), "nothing is downloaded"
