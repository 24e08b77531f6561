"""Dtypes by device: cards that are not here by their facts, this machine by what torch says of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import save_file
from transformers import Phi3Config, Phi3ForCausalLM, Trainer, TrainingArguments

from phi3_lora_plugin.lora.inject import add_lora, prepare_for_loss_scaling
from phi3_lora_plugin.model import load
from phi3_lora_plugin.model.base_size import BaseSize, base_size, size_of_config, size_of_files
from phi3_lora_plugin.model.device import Device, elsewhere, read_device, with_probe
from phi3_lora_plugin.model.folder import ModelError
from phi3_lora_plugin.model.load import load_model
from phi3_lora_plugin.model.precision import Precision, choose, precision_elsewhere, precision_for
from phi3_lora_plugin.plan import dry_run
from phi3_lora_plugin.plan.plan import plan
from phi3_lora_plugin.recipe import load_recipe
from phi3_lora_plugin.training.arguments import training_arguments

T4, V100 = Device("cuda", False, (7, 5)), Device("cuda", False, (7, 0))
A100, H100 = Device("cuda", True, (8, 0)), Device("cuda", True, (9, 0))
MINI, SMALL = BaseSize(3_821_079_552, "bfloat16"), BaseSize(100_000_000, "bfloat16")
OLD_CPU, NEW_CPU = Device("cpu", False), Device("cpu", True)


@pytest.mark.parametrize(
    ("device", "base", "weights", "mixed"),
    [
        (T4, MINI, "float16", "fp16"),
        (V100, MINI, "float16", "fp16"),
        (T4, SMALL, "float16", "fp16"),
        (A100, MINI, "bfloat16", "bf16"),
        (H100, None, "bfloat16", "bf16"),
        (Device("mps", True), MINI, "bfloat16", "bf16"),
        (Device("mps", False), MINI, "float16", "fp16"),
        (Device("xpu", True), MINI, "bfloat16", "bf16"),
        (OLD_CPU, MINI, "bfloat16", "bf16"),  # its own 16 bits, slow or not: 15 GB of float32 do not fit a laptop
        (OLD_CPU, BaseSize(2 * 10**9, "float16"), "float16", "bf16"),
        (NEW_CPU, BaseSize(2 * 10**9, "float16"), "bfloat16", "bf16"),
        (NEW_CPU, BaseSize(2 * 10**9, "float32"), "bfloat16", "bf16"),
        (OLD_CPU, BaseSize(2 * 10**9, "float32"), "float32", "no"),
        (NEW_CPU, SMALL, "float32", "no"),
        (NEW_CPU, None, "float32", "no"),
    ],
)
def test_auto_is_decided_by_facts(device: Device, base: BaseSize | None, weights: str, mixed: str) -> None:
    for quantize in ("none", "nf4"):
        found = choose("auto", device, base, quantize)
        assert (found.weights, found.mixed) == (weights, mixed)


def test_what_is_asked_for_is_taken_and_what_is_slow_is_said() -> None:
    for asked in ("float32", "bfloat16", "float16"):
        for device in (T4, A100, OLD_CPU, NEW_CPU):
            assert choose(asked, device, MINI).weights == asked
    assert choose("float32", T4, MINI).mixed == "no" and choose("float16", A100, MINI).mixed == "fp16"
    assert "emulates bfloat16" in str(choose("bfloat16", T4).notes) and choose("bfloat16", T4).mixed == "no"
    assert "no fast 16-bit arithmetic" in str(choose("auto", OLD_CPU, MINI).notes)
    assert "FlashAttention" in str(choose("auto", T4).notes)
    assert "mps" in str(choose("auto", elsewhere("mps"), MINI, "nf4").notes)
    assert choose("auto", A100, MINI).notes == () == choose("auto", NEW_CPU, MINI).notes


def as_card(patch: pytest.MonkeyPatch, capability: tuple[int, int] | None, bfloat16: bool) -> None:
    def get_device_capability(*_: Any) -> tuple[int, int]:
        if capability is None:
            raise RuntimeError("no driver")
        return capability

    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "get_device_capability", get_device_capability)
    patch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bfloat16 or including_emulation)


@pytest.fixture(scope="module")
def same_steps_once() -> Iterator[None]:
    """The dry run of a step takes a second and knows no card: one for all that differ in nothing that it is given."""
    made: dict[str, Any] = {}
    real = dry_run.dry_runs

    def dry_runs(config: Any, lora: Any, arguments: Any, batch: Any, **more: Any) -> Any:
        given = repr((config.to_dict(), lora, arguments.to_dict(), batch, sorted(more.items())))
        if given not in made:
            made[given] = real(config, lora, arguments, batch, **more)
        return made[given]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dry_run, "dry_runs", dry_runs)
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("same_steps_once")
@pytest.mark.parametrize("capability", [(7, 5), (7, 0), (6, 1)])
def test_a_card_without_bfloat16_gets_float16_everywhere(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    as_card(monkeypatch, capability, False)
    assert read_device() == Device("cuda", False, capability)
    for name in ("phi3-mini-4k-lora", "phi3-mini-4k-qlora", "phi3-mini-4k-lora-16gb"):
        recipe = load_recipe(name)
        assert precision_for(recipe.model) == choose(
            "auto", Device("cuda", False, capability), None, recipe.model.quantize
        )
        arguments = training_arguments(recipe, use_cpu=True)  # there is no card to construct it on
        assert arguments.fp16 and not arguments.bf16
        made = plan(recipe, memory=16 * 10**9, program=0)
        assert made.device == "cuda" and made.dtype == "float16"
        if name != "phi3-mini-4k-lora":
            assert made.fits
    assert load._attention("flash_attention_2", read_device(), torch.float16) == "sdpa"


def test_a_current_card_gets_bfloat16_and_its_index(monkeypatch: pytest.MonkeyPatch) -> None:
    as_card(monkeypatch, (9, 0), True)
    assert read_device("cuda") == H100
    arguments = training_arguments(load_recipe("phi3-mini-4k-lora"), use_cpu=True)
    assert arguments.bf16 and not arguments.fp16
    # Trainer compares a map of one entry with its own device, which has an index.
    for device in (H100, elsewhere("xpu")):
        assert load._device_map(device, "none") == {"": 0}
    assert load._device_map(elsewhere("mps"), "none") == {"": "mps"}
    assert load._device_map(NEW_CPU, "none") is None and load._device_map(NEW_CPU, "nf4") == {"": "cpu"}
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert load._device_map(H100, "none") is None and load._device_map(H100, "nf4") == {"": 1}
    as_card(monkeypatch, None, False)  # torch cannot say the capability
    assert read_device("cuda") == Device("cuda", False, None)


def test_other_devices_are_read_as_torch_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    for newer in (True, False):
        monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda *_, newer=newer: newer)
        assert read_device() == read_device("mps") == Device("mps", newer)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    monkeypatch.setattr(torch.xpu, "is_bf16_supported", lambda *_, **__: True)
    assert read_device() == Device("xpu", True)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: False)
    for kind, title in (("mps", "MPS"), ("xpu", "XPU"), ("cuda", "CUDA")):
        if not getattr(torch, kind).is_available() if kind != "mps" else True:
            with pytest.raises(ModelError, match=f"model.device: {kind}, but torch sees no {title}"):
                read_device(kind)
    with pytest.raises(ModelError, match="'tpu' is not a device; available: auto, cpu, cuda, mps, xpu"):
        read_device("tpu")


def test_the_probe_is_only_asked_where_it_decides(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from phi3_lora_plugin.model import device, precision

    asked = []
    monkeypatch.setattr(precision, "with_probe", lambda found: asked.append(found) or with_probe(found))
    small = load_recipe("tiny-cpu", [f"model.path={tiny.base(tmp_path)}", "model.dtype=auto"])
    assert precision_for(small.model) == Precision("float32", "no") and not asked
    large = load_recipe("phi3-mini-4k-lora", ["model.device=cpu"])
    assert precision_for(large.model).weights == "bfloat16" and len(asked) == 1
    device._cpu_is_faster_in_bfloat16.cache_clear()
    assert with_probe(Device("cpu", None)).bfloat16 in (True, False)  # by timing, whatever the CPU is called


def sized(folder: Path, dtype: torch.dtype, **changes: Any) -> Path:
    """A model of zeros on disk, 105M parameters, in two files."""
    sizes = dict(vocab_size=32064, hidden_size=1024, intermediate_size=2816, num_hidden_layers=3,
                 num_attention_heads=16, num_key_value_heads=16)  # fmt: skip
    config = Phi3Config(**(sizes | changes), pad_token_id=0, bos_token_id=1, eos_token_id=2, dtype=dtype)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Phi3ForCausalLM(config).state_dict().items()}
    folder.mkdir()
    config.save_pretrained(folder)
    save_file({name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}, folder / "model.safetensors")
    return folder


def peak_of(work: Any) -> tuple[Any, int]:
    """(what `work` returns, bytes that the process grew by at the worst moment); the kernel's own high-water mark."""

    def status(name: str) -> int:
        return next(
            int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if name in line
        )

    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    made = work()
    return made, status("VmHWM") - before


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's high-water mark")
@pytest.mark.parametrize(
    ("saved", "wanted"), [("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "bfloat16")]
)
def test_loading_peaks_at_little_more_than_the_weights(tmp_path: Path, saved: str, wanted: str) -> None:
    load_model(tiny.base(tmp_path / "warm"), device="cpu", dtype="bfloat16")
    folder = sized(tmp_path / "base", getattr(torch, saved))
    assert size_of_files(folder) == base_size(str(folder)) == BaseSize(104_209_408, saved)
    model, peak = peak_of(lambda: load_model(folder, device="cpu", dtype=wanted))
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, wanted)}
    largest = 32064 * 1024 * torch.float32.itemsize
    assert peak < 1.15 * weights + (largest if wanted == "bfloat16" and saved == "float32" else 0)


def test_tensors_read_one_by_one_are_those_that_are_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny.base(tmp_path)
    one_by_one = load_model(folder, device="cpu", dtype="bfloat16")
    monkeypatch.setattr(load, "find_spec", lambda name: None)  # an older transformers
    mapped = load_model(folder, device="cpu", dtype="bfloat16")
    ours, theirs = one_by_one.state_dict(), mapped.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert one_by_one.generation_config.to_dict() == mapped.generation_config.to_dict()
    assert one_by_one.config.to_dict() == mapped.config.to_dict() and one_by_one.name_or_path == mapped.name_or_path


def test_a_large_base_keeps_its_16_bits_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from phi3_lora_plugin.model import precision

    monkeypatch.setattr(precision, "LARGE", 1000)  # 3.8B parameters do not fit a test
    model = tiny.model(eos_token_id=2).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    assert load_model(tmp_path, device="cpu").dtype == torch.bfloat16
    assert load_model(tmp_path, device="cpu", dtype="float32").dtype == torch.float32
    recipe = load_recipe("tiny-cpu", [f"model.path={tmp_path}", "model.dtype=auto", "data.path=null",
                                      "data.eval_path=null"])  # fmt: skip
    assert training_arguments(recipe).bf16 and plan(recipe, program=0).dtype == "bfloat16"


def test_recipes_for_other_machines_say_what_they_would_take() -> None:
    mini = load_recipe("phi3-mini-4k-lora", ["model.device=cpu"])
    assert precision_elsewhere(mini.model) == Precision("bfloat16", "bf16")
    assert precision_elsewhere(load_recipe("phi3-mini-4k-lora-mac").model).weights == "bfloat16"
    assert precision_elsewhere(load_recipe("tiny-cpu").model) == Precision("float32", "no")


def test_sizes_of_configs_are_those_of_models() -> None:
    for changes in ({}, {"num_key_value_heads": 2}, {"tie_word_embeddings": True}):
        model = tiny.model(**changes)
        assert size_of_config(model.config.to_dict() | {"dtype": "float16"}) == BaseSize(
            model.num_parameters(), "float16"
        )


def test_float16_trains_float32_adapters_by_a_scaler_that_is_resumed(tmp_path: Path) -> None:
    """What a T4 does, on a CPU: accelerate gives a scaler to cards only, so it is put where accelerate would."""
    from phi3_lora_plugin.training.attach import attach
    from phi3_lora_plugin.training.resume import resumable

    rows = [{"input_ids": [3 + n % 7, 4, 5, 6], "labels": [3 + n % 7, 4, 5, 6]} for n in range(16)]

    def run(folder: str, steps: int, resume: bool = False) -> tuple[Any, dict[str, Any]]:
        model = add_lora(tiny.model().to(torch.float16), "all-linear", 4, 8, modules_to_save=["lm_head"])
        prepare_for_loss_scaling(model)
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.float16}
        arguments = TrainingArguments(
            str(tmp_path / folder), max_steps=steps, per_device_train_batch_size=2, use_cpu=True, save_strategy="no",
            report_to="none", lr_scheduler_type="constant", learning_rate=1e-3, disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=rows)  # type: ignore[arg-type]
        trainer.accelerator.native_amp, trainer.accelerator.state._mixed_precision = True, "bf16"
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1)
        attach(trainer, every_steps=2)
        with resumable(trainer) if resume else nullcontext() as checkpoint:
            assert (checkpoint is not None) == resume
            trainer.train(resume_from_checkpoint=checkpoint)
        return trainer, {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    whole, trained = run("whole", 4)
    assert whole.accelerator.scaler.get_scale() == 2.0**14  # doubled after each good step
    run("parts", 2)
    parts, again = run("parts", 4, resume=True)
    assert parts.accelerator.scaler.get_scale() == 2.0**14
    assert trained.keys() == again.keys() and all(torch.equal(trained[name], again[name]) for name in trained)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
def test_on_a_card_a_model_is_placed_by_its_index_and_trains_in_its_precision(tmp_path: Path) -> None:
    given = ["model.device=cuda", "model.dtype=auto", "training.max_steps=2", f"output_dir={tmp_path}"]
    recipe = load_recipe("tiny-cpu", [f"model.path={tiny.base(tmp_path / 'base')}", *given])
    model = load_model(recipe.model.path, device="cuda")
    found = precision_for(recipe.model)
    assert model.dtype == found.torch_dtype and model.device == torch.device("cuda", 0)
    arguments = training_arguments(recipe)
    assert (arguments.bf16, arguments.fp16) == (found.mixed == "bf16", found.mixed == "fp16")
    model = add_lora(model, "all-linear", 4, 8)
    trainer = Trainer(model, arguments, train_dataset=[{"input_ids": [3, 4, 5], "labels": [3, 4, 5]}] * 16)  # type: ignore[arg-type]
    assert not trainer.is_model_parallel and (trainer.accelerator.scaler is not None) == arguments.fp16
    assert trainer.train().training_loss > 0
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
