"""Phi-4-multimodal: LoRA on its text side, next to the LoRA of its own for images and for speech."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from lora_runs import trainer
from pages import blocks, page
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Phi4MultimodalConfig, Phi4MultimodalForCausalLM

from phi3_lora_plugin.export.convert import convert
from phi3_lora_plugin.export.export import export
from phi3_lora_plugin.export.exporter import ExportError
from phi3_lora_plugin.export.merge import MergeError, merge
from phi3_lora_plugin.lora.inject import add_lora, coverage
from phi3_lora_plugin.lora.targets import TargetError
from phi3_lora_plugin.model.base_size import weight_shapes
from phi3_lora_plugin.model.families import TOWERS, UnsupportedModel, recognise
from phi3_lora_plugin.model.load import load_model
from phi3_lora_plugin.pipeline import train
from phi3_lora_plugin.recipe import load_recipe

pytestmark = pytest.mark.slow

IDS = torch.arange(3, 40)[None]
TEXT = {"self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"}
PATHS = r"model\.layers\.\d+\.(self_attn\.(qkv_proj|o_proj)|mlp\.(gate_up_proj|down_proj))"


def model() -> Phi4MultimodalForCausalLM:
    torch.manual_seed(0)
    vision = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=28, crop_size=28,
        patch_size=14, image_token_id=500,
    )  # fmt: skip
    audio = dict(
        hidden_size=32, intermediate_size=48, num_blocks=1, num_attention_heads=2, ext_pw_out_channel=32,
        depthwise_separable_out_channel=32, depthwise_seperable_out_channel=32, nemo_conv_channels=32, input_size=16,
        audio_token_id=501,
    )  # fmt: skip
    config = Phi4MultimodalConfig(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, original_max_position_embeddings=256, pad_token_id=0,
        bos_token_id=1, eos_token_id=[400, 403], tie_word_embeddings=True, vision_config=vision, audio_config=audio,
    )  # fmt: skip
    return Phi4MultimodalForCausalLM(config).eval()


@torch.no_grad()
def sees(one: Any) -> torch.Tensor:
    """Logits for an image of one crop, which is five tokens here."""
    ids, noise = IDS.clone(), torch.Generator().manual_seed(1)
    ids[0, 5:10] = 500
    pixels, mask = torch.randn(1, 2, 3, 28, 28, generator=noise), torch.ones(1, 2, 2, 2)
    sizes = torch.tensor([[28, 28]])
    return one(input_ids=ids, image_pixel_values=pixels, image_sizes=sizes, image_attention_mask=mask).logits


@torch.no_grad()
def hears(one: Any) -> torch.Tensor:
    """Logits for 32 frames of sound, which are four tokens here."""
    ids, noise = IDS.clone(), torch.Generator().manual_seed(2)
    ids[0, 5:9] = 501
    frames, sizes = torch.randn(1, 32, 16, generator=noise), torch.tensor([4])
    return one(input_ids=ids, audio_input_features=frames, audio_embed_sizes=sizes).logits


@torch.no_grad()
def reads(one: Any) -> torch.Tensor:
    return one(input_ids=IDS).logits


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as revision refs/pr/70 has it: the weights, and a LoRA for images and one for speech next to them."""
    folder = tmp_path_factory.mktemp("multimodal")
    model().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    for name, rank in (("vision", 8), ("speech", 6)):
        torch.manual_seed(rank)
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=PATHS, init_lora_weights=False)
        get_peft_model(model(), config).save_pretrained(folder / f"{name}-lora")
    return folder


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `phi3-lora train` makes of a few chats on that base."""
    folder = tmp_path_factory.mktemp("run")
    row = tiny.chat("what is the capital of france?", "the capital of france is paris.")
    tiny.write(folder / "rows.jsonl", [row] * 8)
    overrides = [
        f"model.path={base}", "model.device=cpu", f"data.path={folder / 'rows.jsonl'}", f"output_dir={folder / 'out'}",
        "training.max_steps=8", "training.learning_rate=1e-2", "data.eval_fraction=0", "data.eval_path=null",
    ]  # fmt: skip
    result = train(load_recipe("tiny-cpu", overrides), check=False)
    assert result.adapter and result.status == "done"
    return Path(result.adapter)


def loaded(base: Path) -> Phi4MultimodalForCausalLM:
    return Phi4MultimodalForCausalLM.from_pretrained(base, dtype=torch.float32)


def own(base: Path) -> PeftModel:
    """The model with its LoRA for images and for speech."""
    both = PeftModel.from_pretrained(loaded(base), base, subfolder="vision-lora", adapter_name="vision")
    both.load_adapter(base, subfolder="speech-lora", adapter_name="speech")
    return both.eval()


def test_what_it_makes_of_images_and_speech_is_the_same_to_the_bit(base: Path, run: Path) -> None:
    before = own(base)
    after = own(base)
    after.load_adapter(run, adapter_name="text")
    for name, look in (("vision", sees), ("speech", hears)):
        before.set_adapter(name)
        after.set_adapter(name)
        assert torch.equal(look(before), look(after)), name
        assert not torch.equal(look(after), look(model())), f"{name}-lora does nothing"
    after.set_adapter("text")
    assert (reads(after) - reads(model())).abs().max() > 1e-3
    with after.disable_adapter():
        for look in (sees, hears, reads):
            assert torch.equal(look(after), look(model()))
    assert not [name for name, _ in after.named_parameters() if TOWERS in name and "lora_" in name]


@pytest.mark.skipif(transformers.__version__ < "5", reason="transformers 4 looks for no adapter in a local subfolder")
def test_transformers_loads_the_adapter_next_to_the_others(base: Path, run: Path) -> None:
    before, one = own(base), loaded(base)
    for name in ("vision", "speech"):
        one.load_adapter(base, adapter_name=name, adapter_kwargs={"subfolder": f"{name}-lora"})
    one.load_adapter(run, adapter_name="text")
    one.eval()
    for name, look in (("vision", sees), ("speech", hears)):
        before.set_adapter(name)
        one.set_adapter(name)
        assert torch.equal(look(before), look(one))
    before.load_adapter(run, adapter_name="text")
    for each in (before, one):
        each.set_adapter("text")
    assert torch.equal(reads(before), reads(one))


def test_lora_sits_in_the_decoder_layers_alone(base: Path) -> None:
    for targets in ("all-linear", ["o_proj", "down_proj"], ["q_proj", "up_proj"], r".*o_proj"):
        made = add_lora(load_model(base, device="cpu"), targets, 4, 8)
        assert all("model.layers." in name for name, p in made.named_parameters() if p.requires_grad), targets
        assert {row.module.partition("[")[0] for row in coverage(made)} <= TEXT
    some = add_lora(load_model(base, device="cpu"), ["o_proj", "qkv_proj"], 4, 8, layers_to_transform=[1])
    assert {row.layers for row in coverage(some)} == {(1,)}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bias": "all"}, "only the vision and audio towers have any"),
        ({"init_lora_weights": "pissa"}, "vision and speech adapters are added to"),
        ({"modules_to_save": ["img_projection_up"]}, "in the vision or audio tower"),
        ({"modules_to_save": ["embed_tokens_extend"]}, "in the vision or audio tower"),
    ],
)
def test_what_would_change_images_or_speech_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(TargetError, match=words):
        add_lora(model(), "all-linear", 4, 8, **options)


def test_merging_is_refused_with_what_is_possible_instead(run: Path, base: Path, tmp_path: Path) -> None:
    with pytest.raises(MergeError, match=r"vision and speech adapters are added to.*set_adapter"):
        merge(run, base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_converted_adapter_stays_out_of_the_towers(base: Path, run: Path, tmp_path: Path) -> None:
    convert(run, tmp_path / "lora.safetensors", "loralib")
    convert(tmp_path / "lora.safetensors", tmp_path / "peft", "peft", base=str(base))
    ours, back = (PeftModel.from_pretrained(loaded(base), folder) for folder in (run, tmp_path / "peft"))
    assert not [name for name, _ in back.named_parameters() if TOWERS in name and "lora_" in name]
    torch.testing.assert_close(reads(back.eval()), reads(ours.eval()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("target", ["llama_cpp", "ollama", "onnx", "mlx", "openvino"])
def test_targets_without_its_towers_are_refused_first(target: str, run: Path, tmp_path: Path) -> None:
    exporter = import_module(f"phi3_lora_plugin.export.targets.{target}").export
    with pytest.raises(ExportError, match="model_type 'phi4_multimodal' is not exported; expected phi3"):
        export(run, exporter, target, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_are_counted_with_the_towers() -> None:
    one = model()
    real = {name: tuple(p.shape) for name, p in one.named_parameters()}
    assert weight_shapes(one.config.to_dict()) == real
    with torch.device("meta"):  # published sizes are what transformers takes where nothing is said
        full = Phi4MultimodalForCausalLM(Phi4MultimodalConfig(num_hidden_layers=1, vision_config={}, audio_config={}))
    bare = full.config.to_dict() | {"vision_config": {}, "audio_config": None}
    assert weight_shapes(bare) == {name: tuple(p.shape) for name, p in full.named_parameters()}


def test_packs_give_each_document_what_it_has_alone(base: Path) -> None:
    one = load_model(base, device="cpu", dtype="float32")
    first, second = IDS[:, :20], IDS[:, 20:]
    where = torch.cat([torch.arange(20), torch.arange(17)])[None]
    with torch.no_grad():
        packed = one(input_ids=torch.cat([first, second], 1), position_ids=where, use_cache=False).logits
        alone = [one(input_ids=ids, use_cache=False).logits for ids in (first, second)]
    torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=1e-4, atol=1e-5)


def test_attach_says_where_plain_peft_reached_the_audio_tower(tmp_path: Path) -> None:
    from phi3_lora_plugin import attach

    leaky = get_peft_model(model(), LoraConfig(r=2, target_modules=["o_proj"]))
    said = attach(trainer(tmp_path / "a", model=leaky), speed="off")
    assert any(one.startswith("WARNING: LoRA sits in 1 modules of the vision and audio towers") for one in said)
    kept = LoraConfig(r=2, target_modules=["o_proj"], exclude_modules=r".*embed_tokens_extend\..*")
    said = attach(trainer(tmp_path / "b", model=get_peft_model(model(), kept)), speed="off")
    assert not [one for one in said if "towers" in one]


def test_the_layout_of_the_hub_is_refused_and_the_native_one_is_named() -> None:
    with pytest.raises(UnsupportedModel, match=r"remote code.*model.revision=refs/pr/70"):
        recognise({"model_type": "phi4mm", "hidden_size": 3072})


def test_the_snippet_of_the_page_runs(base: Path, run: Path) -> None:
    (code,) = [block for block in blocks(page("families"), "python") if "vision-lora" in block]
    names: dict[str, Any] = {"base": str(base), "adapter": str(run)}
    exec(code, names)
    assert names["model"].active_adapter == "text" and set(names["model"].peft_config) == {"vision", "speech", "text"}
