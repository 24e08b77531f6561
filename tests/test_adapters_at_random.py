"""Adapters drawn at random, and broken at random: the same update in every layout, or one error that says why not."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from phi3_lora_plugin.error import Phi3LoraError
from phi3_lora_plugin.export.convert import convert
from phi3_lora_plugin.inspect.inspect import inspect
from phi3_lora_plugin.lora_files.layouts import Lora
from phi3_lora_plugin.lora_files.peft_files import parts, read_peft
from phi3_lora_plugin.lora_files.servable import servable

WHAT = "model.layers.{}.self_attn."
ROWS = {"q_proj": 32, "k_proj": 16, "v_proj": 16}  # of B, in the base of this file
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config is all that a conversion reads of it."""
    folder = tmp_path_factory.mktemp("base")
    tiny.config(num_key_value_heads=2).save_pretrained(folder)
    return folder


def adapter(folder: Path, seed: int, **settings: Any) -> Path:
    """A PEFT adapter of some of the attention's slices in two layers, at ranks, scalings and in a type of its own."""
    rng, draw = random.Random(seed), torch.Generator().manual_seed(seed)
    dtype = rng.choice([torch.float32, torch.bfloat16, torch.float16])
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "r": rng.choice([1, 2, 5]),
        "lora_alpha": rng.choice([1, 16, 3.7]),
        "use_rslora": rng.random() < 0.3,
        "lora_bias": rng.random() < 0.5,
        "target_modules": list(ROWS),
        "base_model_name_or_path": "microsoft/x",
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    tensors = {}
    for layer in range(2):
        for name in rng.sample(list(ROWS), rng.choice([1, 2, 3])):
            module, rank = WHAT.format(layer) + name, config["r"]
            if rng.random() < 0.4:
                config["rank_pattern"][module] = rank = rng.choice([1, 3, 4])
            if rng.random() < 0.6:
                config["alpha_pattern"][module] = rng.choice([0, 0.1, 7.5, 20])
            path = f"base_model.model.{module}"
            tensors[f"{path}.lora_A.weight"] = torch.randn(rank, 32, generator=draw).to(dtype)
            tensors[f"{path}.lora_B.weight"] = torch.randn(ROWS[name], rank, generator=draw).to(dtype)
            if config["lora_bias"]:
                tensors[f"{path}.lora_B.bias"] = torch.randn(ROWS[name], generator=draw).to(dtype)
    folder.mkdir(parents=True)
    save_file(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config | settings))
    return folder


def effect(lora: Lora) -> torch.Tensor:
    """What an update adds to a weight, and in the last column to what comes out."""
    bias = torch.zeros(len(lora.b)) if lora.bias is None else lora.bias
    return torch.cat([lora.b.double() @ lora.a.double(), bias.double()[:, None]], dim=1) * lora.scaling


def effects(folder: Path) -> dict[str, torch.Tensor]:
    return {lora.module: effect(lora) for lora in parts(read_peft(folder)).loras}


@pytest.mark.parametrize("seed", range(12))
def test_every_layout_computes_the_same(seed: int, base: Path, tmp_path: Path) -> None:
    given = adapter(tmp_path / "given", seed)
    convert(given, tmp_path / "uniform", "peft", uniform=True)
    convert(given, tmp_path / "fused", "fused", base=base)
    convert(tmp_path / "fused", tmp_path / "back", "split", base=base, target_base="microsoft/x")
    if not any(key.endswith(".bias") for key in load_file(given / WEIGHTS)):
        convert(given, tmp_path / "adapter.gguf", "gguf", base=base)
    wanted = effects(given)
    for name in ("uniform", "back"):
        got = effects(tmp_path / name)
        for module in {*wanted, *got}:
            one = wanted.get(module, torch.zeros(1))
            other = got.get(module, torch.zeros(1))
            assert (one - other).abs().max() <= 1e-6 * max(one.abs().max(), 1e-9), (name, module)


VALUES: list[Any] = [
    True, -1, 0, 2.5, 10**400, "x", "(", "\ud800", "a\0b", float("nan"), [1], [None], [[1]], {"x": 1}, {"(": 1},
    {"q_proj": "x"}, {"q_proj": None}, {"embed_tokens": ["a"]},
]  # fmt: skip
SETTINGS = ["r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "target_modules", "modules_to_save",
            "trainable_token_indices", "init_lora_weights", "base_model_name_or_path", "use_dora"]  # fmt: skip


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_of_another_kind_is_named(setting: str, base: Path, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "given", 0)
    good = json.loads((folder / CONFIG).read_text())
    for number, value in enumerate(VALUES):
        (folder / CONFIG).write_text(json.dumps(good | {setting: value}))
        findings = inspect(folder)
        for what in (lambda: servable(folder), lambda number=number: convert(folder, tmp_path / str(number), "peft")):
            try:
                what()
            except Phi3LoraError as error:
                assert setting in str(error) or "config has rank" in str(error) or "it started from" in str(error)
                assert findings.problems
    (folder / CONFIG).write_text(json.dumps(good | {setting: {"(": [None]}}))
    with pytest.raises(Phi3LoraError, match=rf"{setting}=\{{'\(': \[None\]\}}: "):
        convert(folder, tmp_path / "out", "peft")


def test_settings_of_other_tools_are_held_to_their_kinds(base: Path, tmp_path: Path) -> None:
    mlx = tmp_path / "mlx"
    mlx.mkdir()
    save_file({"model.layers.0.self_attn.o_proj.lora_a": torch.ones(32, 2),
               "model.layers.0.self_attn.o_proj.lora_b": torch.ones(2, 32)}, mlx / "adapters.safetensors")  # fmt: skip
    for value in ("x", [1], {"scale": "x"}, {"scale": 1e400}, {"scale": 2, "dropout": "x"}):
        (mlx / CONFIG).write_text(json.dumps({"lora_parameters": value}))
        with pytest.raises(Phi3LoraError, match="lora_parameters="):
            convert(mlx, tmp_path / "out", "peft")
        assert inspect(mlx).problems
    file = tmp_path / "lora.safetensors"
    save_file({"o_proj.lora_A": torch.ones(2, 32), "o_proj.lora_B": torch.ones(32, 2)}, file)
    for wrong in ({"alpha": "x"}, {"alpha": 4, "modules": ["x"]}, {"alpha": 4, "modules": {"o_proj": {"r": "x"}}},
                  {"alpha": 4, "enable_lora": "T,F"}, {"alpha": 4, "r": [1]}, {"alpha": 4, "dropout": {}}):  # fmt: skip
        file.with_suffix(".json").write_text(json.dumps(wrong))
        with pytest.raises(Phi3LoraError, match=f"{list(wrong)[-1]}="):
            convert(file, tmp_path / "out", "peft")


TENSORS = {
    "lora_A.weight": [(), (2,), (0, 32), (3, 32)],
    "lora_B.weight": [(), (2,), (32, 0), (32, 3), (32, 2, 1)],
    "lora_B.bias": [(), (3, 32), (5,)],
    "lora_magnitude_vector": [(), (5,)],
    "lora_C.weight": [(2, 2)],
}


def test_tensors_that_do_not_belong_together_are_named(base: Path, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "given", 0, rank_pattern={}, r=2)
    path = f"base_model.model.{WHAT.format(0)}q_proj"
    good = {f"{path}.lora_A.weight": torch.ones(2, 32), f"{path}.lora_B.weight": torch.ones(32, 2)}
    odd = {f"{path}.{part}": torch.zeros(shape) for part, shapes in TENSORS.items() for shape in shapes[:1]}
    changes = [{f"{path}.{part}": torch.zeros(shape)} for part, shapes in TENSORS.items() for shape in shapes]
    changes += [{f"{path}.lora_B.weight": torch.zeros(32, 2).to(dtype)} for dtype in (torch.int32, torch.complex64)]
    changes += [{"base_model.model.x": torch.ones(2)}, {"base_model.model.weight": torch.ones(2)}, odd]
    changes += [{"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": torch.tensor(1.0)}]
    for number, change in enumerate(changes):
        save_file(good | change, folder / WEIGHTS)
        with pytest.raises(Phi3LoraError, match="q_proj|weight|x|token rows"):
            convert(folder, tmp_path / f"out{number}", "fused", base=base)
        assert inspect(folder).problems
        servable(folder)
    file = tmp_path / "lora.pt"
    for made in (5, {3: torch.ones(2)}, {"adapter": {("a",): torch.ones(1)}}, {"x.lora_A": torch.tensor(1.0)},
                 {"x.lora_A": torch.ones(2), "x.lora_B": torch.ones(2)},
                 {"layers.0.attn.q_proj.lora_a.weight": torch.ones(2, 32),
                  "layers.0.attn.q_proj.lora_b.weight": torch.ones(32, 3)}):  # fmt: skip
        torch.save(made, file)
        with pytest.raises(Phi3LoraError, match="mapping of names|is missing|do not belong|not two matrices"):
            convert(file, tmp_path / "out", "peft", alpha=4)
    (folder / WEIGHTS).write_bytes(b"\x10" + bytes(7) + b"{broken}" * 9)
    with pytest.raises(Phi3LoraError, match="cut off or damaged"):
        servable(folder)
