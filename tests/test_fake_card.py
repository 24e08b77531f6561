"""A training step of every preset on a card that is not there: real code, real sizes, no values, no memory.

Where the installed PyTorch is a CUDA build (`.ci/fake_cuda` makes one), tensors stand on "cuda" and
whatever is on the wrong device, in the wrong dtype or waits for the card shows.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.fake_card import Card, on_a_card  # noqa: E402
from benchmarks.fake_step import batch, build, fast, items, loss, settle  # noqa: E402
from benchmarks.sizes import config  # noqa: E402
from phi3_lora_plugin.recipe import Recipe, load_recipe  # noqa: E402
from phi3_lora_plugin.training.arguments import lora_options, training_arguments  # noqa: E402
from phi3_lora_plugin.training.checkpointing import checkpoints_activations  # noqa: E402

pytestmark = pytest.mark.slow

NAMES = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))


def on_cuda(name: str) -> Recipe:
    """A preset, on a card even if it is meant for another device: only that is another setting."""
    return load_recipe(name, ["model.device=auto"])


def on_card(
    recipe: Recipe, card: Card, layers: int = 1, backward: bool = True, dtype: torch.dtype = torch.bfloat16
) -> Any:
    """(model, loss) after one step of a recipe on three rows: full, a third of it, and two tokens."""
    if recipe.model.quantize != "none":
        pytest.importorskip("bitsandbytes")
    arguments = training_arguments(recipe, use_cpu=True, bf16=True, fp16=False)
    model = build(
        config(recipe.model.path, layers),
        lora_options(recipe),
        dtype=dtype,
        quantize=recipe.model.quantize,
        checkpointing=checkpoints_activations(arguments),
    )
    fast(model, recipe.speed, card.device)
    longest = recipe.data.max_length or 4096
    rows = batch((longest, longest // 3, 2), packed=recipe.data.packing)
    with on_a_card(card):
        settle(model, str(card.device))
        total = loss(model, card.put(rows), items(rows), dtype, card.device.type)
        if backward:
            total.backward()
    return model, total


@pytest.mark.parametrize("name", NAMES)
def test_a_step_of_a_preset_in_its_real_size(name: str) -> None:
    recipe = on_cuda(name)
    card = Counting()
    model, total = on_card(recipe, card)
    assert total.shape == () and total.dtype == torch.float32
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    for name, parameter in trained.items():
        assert parameter.grad is not None and parameter.grad.shape == parameter.shape, name
        assert parameter.dtype == parameter.grad.dtype == torch.float32, name
    # what runs there is what a card runs: the kernel for all documents at once, and 4-bit weights into one buffer
    kinds = {str(func).split(".")[1] for func in card.counts}
    assert ("_varlen_attn" in kinds) == (
        "MoE" not in recipe.model.path and (recipe.data.packing or not recipe.lora.dropout)
    )
    # and one kernel a pass, in the sizes that they were tried in
    layers = {"norm", "add_norm", "norm_backward", "turn_", "turn_backward"}
    assert (layers <= kinds) == (model.config.model_type == "phi3"), layers - kinds
    if recipe.model.quantize == "nf4" and not recipe.lora.dora:
        assert card.counts[torch.ops.bitsandbytes.dequantize_4bit.out] > 0


def test_four_bits_are_unpacked_forwards_for_many_rows_only() -> None:
    few, many = Counting(), Counting()
    for card, length in ((few, 300), (many, 2048)):
        recipe = load_recipe("phi3-mini-4k-qlora", ["model.device=auto", f"data.max_length={length}"])
        on_card(recipe, card)
        assert card.counts[torch.ops.bitsandbytes.dequantize_4bit.out] >= 4, "backwards it takes the whole weight"
    product = torch.ops.bitsandbytes.gemm_4bit.default
    assert few.counts[product] >= 4
    # of many, few have a label: behind the last attention, and there again as it is checkpointed
    assert many.counts[product] == 2 * 3


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_the_next_four_bits_are_unpacked_on_a_stream_of_their_own(device: str) -> None:
    if device != "cpu" and torch.version.cuda is None:
        pytest.skip("this PyTorch is a CPU build; .ci/fake_cuda runs it with CUDA's")
    pytest.importorskip("bitsandbytes")
    from phi3_lora_plugin.speed.lora_linear4bit import buffers_of
    from phi3_lora_plugin.speed.proved_prefetch import start

    card = Counting(device)
    model = build(
        config("microsoft/Phi-3-mini-4k-instruct", 2), dict(targets="all-linear", r=4, alpha=8),
        dtype=torch.bfloat16, quantize="nf4",
    )  # fmt: skip
    fast(model, "auto", card.device)
    rows = batch((2048, 512))
    with on_a_card(card):
        settle(model, device)
        start(model)
        buffers = buffers_of(card.device, torch.bfloat16)
        for _ in range(4):
            card.counts.clear()
            found = buffers.found
            total = loss(model, card.put(rows), items(rows), torch.bfloat16, card.device.type)
            if device == "cpu":
                total.backward()
        # Behind the last attention are so few rows that three weights are multiplied as they are.
        assert buffers.found - found == (12 if device == "cpu" else 5), "all of them were there when they were wanted"
        assert 0 < card.counts[torch.ops.bitsandbytes.dequantize_4bit.out] <= buffers.found - found
    assert len(card.reads) == 4, "the host has read each batch once, and waited for nothing else"


def test_a_step_in_float16_for_cards_without_bfloat16() -> None:
    card = Counting()
    model, total = on_card(on_cuda("phi3-mini-4k-lora-16gb"), card, dtype=torch.float16)
    assert total.dtype == torch.float32
    dtypes = {parameter.dtype for parameter in model.parameters() if not parameter.requires_grad}
    assert dtypes == {torch.float16} and card.counts[torch.ops.torch_attn._varlen_attn.default] == 2  # and recomputed
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


class Counting(Card):
    """How often each operator ran."""

    def __init__(self, device: str = "cpu") -> None:
        super().__init__(device)
        self.counts: Counter[Any] = Counter()

    def seen(self, func: Any, args: Any, kwargs: Any, made: Any) -> None:
        self.counts[func] += 1


def test_the_host_never_waits_inside_a_layer() -> None:
    for name in ("phi3-mini-4k-lora", "phi3-mini-4k-modelcard", "phi4-mini-lora"):
        one, three = Card(), Card()
        recipe = on_cuda(name)
        on_card(recipe, one, layers=1)
        on_card(recipe, three, layers=3)
        assert Counter(one.reads) == Counter(three.reads), name
        assert Counter(one.copies) == Counter(three.copies), name


@pytest.mark.parametrize("lengths", [(300, 40, 120), (200, 200)])
@pytest.mark.parametrize("packed", [False, True])
def test_the_host_waits_once_in_a_step_and_stock_code_twice(lengths: tuple[int, ...], packed: bool) -> None:
    waits = {}
    for name in ("ours", "stock"):
        card = Card()
        model = build(
            config("microsoft/Phi-3-mini-4k-instruct", 1), dict(targets="all-linear", r=4, alpha=8),
            dtype=torch.bfloat16,
        )  # fmt: skip
        if name == "ours":
            fast(model, "auto", card.device)
        rows = batch(lengths, packed=packed and name == "ours")
        with on_a_card(card):
            settle(model)
            loss(model, card.put(rows), items(rows), torch.bfloat16).backward()
        waits[name] = [*card.reads, *card.copies]
    assert len(waits["ours"]) == 1, waits["ours"]
    # it looks whether masks are full, which these padded rows' are not, and those without padding are
    assert [each.split(":")[0] for each in waits["stock"]] == [
        "_local_scalar_dense at transformers/masking_utils.py"
    ] * (2 if len(set(lengths)) > 1 else 1)


def test_padding_on_the_left_costs_no_more_waits() -> None:
    card = Card()
    model = build(config("embedded:tiny-phi3", 1), dict(targets="all-linear", r=4, alpha=8), dtype=torch.bfloat16)
    fast(model, "auto", card.device)
    rows = {name: column.flip(1) for name, column in batch((50, 40), packed=False).items()}
    with on_a_card(card):
        settle(model)
        loss(model, card.put(rows), items(rows), torch.bfloat16).backward()
    assert len(card.reads) == 1, card.reads


@pytest.mark.parametrize("packed", [False, True])
def test_a_step_of_a_trainer_waits_once_for_each_micro_batch(
    packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate import Accelerator
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from benchmarks.batches import padded
    from phi3_lora_plugin.chat.pack import PackedCollator
    from phi3_lora_plugin.speed.token_count import count_on_host

    waits: list[list[str]] = []

    class Waits(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            waits.append([*card.reads, *card.copies])

    monkeypatch.setattr(Trainer, "_move_model_to_device", lambda *_: None)
    monkeypatch.setattr(Accelerator, "prepare_model", lambda self, model, **_: model)
    card = Card()
    small = config("embedded:tiny-phi3", 1)
    model = build(small, dict(targets="all-linear", r=4, alpha=8), dtype=torch.bfloat16, checkpointing=True)
    fast(model, "auto", card.device)
    rows = [{"input_ids": [3] * length, "labels": [-100, *[3] * (length - 1)]} for length in (9, 30, 17, 24) * 6]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2, use_cpu=True,
        logging_steps=10, logging_nan_inf_filter=False, include_num_input_tokens_seen="non_padding", report_to="none",
        save_strategy="no", disable_tqdm=True, remove_unused_columns=False, max_grad_norm=0.5,
    )  # fmt: skip
    with on_a_card(card):
        settle(model)
        trainer = Trainer(model, arguments, PackedCollator() if packed else padded, rows, callbacks=[Waits()])
        count_on_host(trainer, model.get_base_model())
        stock = trainer.get_batch_samples
        monkeypatch.setattr(trainer, "get_batch_samples", lambda *given: card.put(stock(*given)))
        trainer.train()
    assert len(waits[1]) - len(waits[0]) == 2, waits[1][len(waits[0]) :]


def test_every_read_is_found_and_values_of_whole_numbers_are_kept() -> None:
    card = Card()
    with on_a_card(card):
        ids = card.put({"ids": torch.tensor([[3, 0, 5], [0, 7, 0]])})["ids"]
        weights = torch.empty(2, 3, dtype=torch.bfloat16)
        assert ids.is_cuda and weights.is_cuda
        real = ids != 0
        assert card.reads == []  # nothing was asked for yet
        assert real.sum(1).tolist() == [2, 1] and len(card.reads) == 1
        assert bool(real.any()) and len(card.reads) == 2
        assert real.nonzero().shape == (3, 2) and len(card.reads) == 3
        assert weights[real].shape == (3,) and len(card.reads) == 4
        assert ids[real].tolist() == [3, 5, 7] and len(card.reads) == 6
        assert weights.masked_fill(real, 0.0).shape == (2, 3) and len(card.reads) == 6
        assert weights.sum().item() == 1.0 and len(card.reads) == 7  # nobody knows, but somebody asked
        assert torch.equal(real.sum(1).cpu(), torch.tensor([2, 1])) and len(card.reads) == 8
        ids += 1
        assert ids.max().item() == 8
        with pytest.raises(RuntimeError, match="values that are unknown"):
            weights.nonzero()


@pytest.mark.skipif(torch.version.cuda is None, reason="this PyTorch is a CPU build; .ci/fake_cuda runs it with CUDA's")
@pytest.mark.parametrize("name", NAMES)
def test_the_forward_of_a_preset_on_fake_cuda_tensors(name: str) -> None:
    card, here = Counting("cuda:0"), Counting()
    recipe = on_cuda(name)
    model, total = on_card(recipe, card, backward=False)
    assert total.device == torch.device("cuda:0")
    assert {parameter.device for parameter in model.parameters()} == {torch.device("cuda:0")}
    on_card(recipe, here, backward=False)
    assert Counter(card.reads) == Counter(here.reads)
