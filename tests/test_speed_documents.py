"""Batches without their padding, and packs by document: the losses and gradients of stock code, row by row."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from test_pack import LONGROPE

from phi3_lora_plugin.chat.pack import PackedCollator
from phi3_lora_plugin.speed.apply import slow_down, speed_up
from phi3_lora_plugin.speed.bounds import PackingError

TARGETS = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
LENGTHS = (21, 5, 40, 1, 13)


def lora(dtype: torch.dtype = torch.float64, dropout: float = 0.0, **changes: Any) -> torch.nn.Module:
    model = tiny.model(**changes).to(dtype)
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=TARGETS)
    wrapped = get_peft_model(model, config, autocast_adapter_dtype=False)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return wrapped.train()


def rows(lengths: tuple[int, ...] = LENGTHS) -> list[dict[str, list[int]]]:
    draw = torch.Generator().manual_seed(2)
    made = []
    for length in lengths:
        ids = torch.randint(3, 500, (length,), generator=draw).tolist()
        made.append({"input_ids": ids, "labels": [-100] * (length // 3) + ids[length // 3 :]})
    return made


def padded(data: list[dict[str, list[int]]], side: str = "right", more: int = 3) -> dict[str, torch.Tensor]:
    width = max(len(row["input_ids"]) for row in data) + more

    def fill(values: list[int], filler: int) -> list[int]:
        missing = [filler] * (width - len(values))
        return values + missing if side == "right" else missing + values

    ids = [fill(row["input_ids"], 0) for row in data]
    labels = [fill(row["labels"], -100) for row in data]
    mask = [fill([1] * len(row["input_ids"]), 0) for row in data]
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "attention_mask": torch.tensor(mask)}


def step(model: torch.nn.Module, batch: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    torch.manual_seed(7)
    loss = model(**batch).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def equal(model: torch.nn.Module, batch: dict[str, Any], parts: Any = "auto") -> list[int]:
    """Hold a step to the stock one; return how many tokens each call of the first projection saw."""
    stock_loss, stock = step(model, batch)
    applied = speed_up(model, parts)
    seen: list[int] = []
    mlp = model.get_base_model().model.layers[0].mlp
    hook = mlp.register_forward_hook(lambda module, inputs, out: seen.append(inputs[0].shape[:2].numel()))
    loss, ours = step(model, batch)
    hook.remove()
    slow_down(model)
    assert loss == pytest.approx(stock_loss, rel=1e-6), applied  # stock code takes the loss in float32
    for name in stock:
        torch.testing.assert_close(ours[name], stock[name], rtol=1e-5, atol=1e-7, msg=name)
    return seen


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 2},
        {"sliding_window": 7},
        {"partial_rotary_factor": 0.5},
        {"tie_word_embeddings": True},
        {"num_hidden_layers": 1, "vocab_size": 1200},
        LONGROPE,
    ],
    ids=["mha", "gqa", "window", "partial rotary", "tied", "one layer", "longrope"],
)
def test_a_padded_batch_without_its_padding_is_the_stock_step(changes: dict[str, Any]) -> None:
    model, data = lora(**changes), rows()
    items = torch.tensor(33)
    for more in ({}, {"num_items_in_batch": items}):
        assert equal(model, padded(data) | more) == [sum(LENGTHS)]
    assert equal(model, padded(data), {"loss": False}) == [sum(LENGTHS)]
    assert equal(model, padded(data), {"lora": False, "host": False}) == [sum(LENGTHS)]
    model.get_base_model().enable_input_require_grads()
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    assert set(equal(model, padded(data))) == {sum(LENGTHS)}


def test_whatever_is_not_padding_on_the_right_stays_stock() -> None:
    model, data = lora(), rows()
    positions = len(LENGTHS) * (max(LENGTHS) + 3)
    assert equal(model, padded(data, side="left")) == [positions]
    supervised = padded(data)
    supervised["labels"] = supervised["input_ids"]  # padding that is trained on
    assert equal(model, supervised) == [positions]
    holes = padded(data)
    holes["attention_mask"][0, 4] = 0
    assert equal(model, holes) == [positions]
    four = padded(data) | {"attention_mask": torch.ones(5, 1, 43, 43, dtype=torch.bool).tril()}
    assert equal(model, four) == [positions]
    assert equal(model, padded(data) | {"output_hidden_states": True}) == [positions]


def test_dropout_draws_for_the_positions_that_stock_draws_for() -> None:
    assert equal(lora(dropout=0.3), padded(rows())) == [len(LENGTHS) * (max(LENGTHS) + 3)]


@pytest.mark.parametrize("first", [0, 9])
def test_padding_past_the_original_context_does_not_change_longrope(first: int) -> None:
    model = lora(**LONGROPE)  # 32 tokens
    for lengths, more, seen in (((30 - first, 9), 10, 80 - 2 * first), ((31 - first, 9), 0, 40 - first)):
        batch = padded(rows(lengths), more=more)
        assert equal(model, batch | {"position_ids": first + torch.arange(lengths[0] + more)[None]}) == [seen]
        if not first:
            assert equal(model, batch) == [seen]


def test_rows_without_any_label_or_text_stay_finite() -> None:
    model = lora()
    batch = padded(rows())
    batch["labels"] = torch.full_like(batch["labels"], -100)
    speed_up(model)
    loss, gradients = step(model, batch)
    assert loss == 0.0 and not any(gradient.any() for gradient in gradients.values())
    batch["attention_mask"][1] = 0  # a row of nothing
    assert step(model, batch)[0] == 0.0


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_key_value_heads": 2, "sliding_window": 7, "partial_rotary_factor": 0.5}, LONGROPE],
    ids=["mha", "gqa window partial", "longrope, documents on both sides of the switch"],
)
def test_a_pack_has_the_gradients_of_its_rows_one_by_one(changes: dict[str, Any]) -> None:
    model, data = lora(**changes), rows()
    items = sum(label != -100 for row in data for label in row["labels"][1:])
    total, summed = 0.0, {}
    for row in data:
        one = {key: torch.tensor([value]) for key, value in row.items()} | {"num_items_in_batch": items}
        loss, gradients = step(model, one)
        total += loss
        summed = {name: summed.get(name, 0) + gradient for name, gradient in gradients.items()}
    speed_up(model)
    loss, ours = step(model, PackedCollator()([{"rows": data[:3]}, {"rows": data[3:]}]))
    assert loss == pytest.approx(total, rel=1e-6)
    for name in summed:
        torch.testing.assert_close(ours[name], summed[name], rtol=1e-5, atol=1e-7, msg=name)


def test_generation_with_padding_on_the_left_is_untouched() -> None:
    model = lora(torch.float32).eval()
    batch = padded(rows((9, 4)), side="left")
    asked = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "max_new_tokens": 6}
    expected = model.generate(**asked, do_sample=False)
    speed_up(model)
    assert torch.equal(model.generate(**asked, do_sample=False), expected)


def test_another_attention_that_was_asked_for_stays() -> None:
    model = lora(attn_implementation="eager")
    (attention,) = [one for one in speed_up(model) if one.part == "attention"]
    assert not attention.on and attention.why == "attention 'eager' was asked for"
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("changes", [{"sliding_window": 7}, {}], ids=["window", "no window"])
def test_rows_without_padding_attend_by_document_only_where_they_exceed_the_window(changes: dict[str, Any]) -> None:
    """Stock builds a dense mask over a window, and flash kernels take none."""
    model = lora(**changes)
    full = padded(rows((20, 20, 20)), more=0)
    for batch in (full, {key: part for key, part in full.items() if key != "attention_mask"}):
        assert equal(model, batch) == [60]
        masks = spied(model, batch)
        assert masks == ([False] if changes else [True]), "whether transformers was asked for a mask"


def spied(model: torch.nn.Module, batch: dict[str, Any]) -> list[bool]:
    """For one call with the fast paths: whether the decoder came with rows as they are, and not as one."""
    speed_up(model)
    seen: list[bool] = []
    layer = model.get_base_model().model.layers[0]
    hook = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[0] == 3))
    step(model, batch)
    hook.remove()
    slow_down(model)
    return seen


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 7, "num_key_value_heads": 2}, LONGROPE], ids=str)
def test_an_evaluation_leaves_padding_out_too(changes: dict[str, Any]) -> None:
    model, data = lora(**changes).eval(), rows()
    layer = model.get_base_model().model.layers[0]
    seen: list[Any] = []
    layer.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape[:2])))
    batch = padded(data)
    with torch.no_grad():
        stock = model(**batch)
        speed_up(model)
        ours = model(**batch)
        assert seen == [(5, 43), (1, sum(LENGTHS))]
        assert ours.loss.item() == pytest.approx(stock.loss.item(), rel=1e-6)
        real = batch["attention_mask"].bool()
        torch.testing.assert_close(ours.logits[real], stock.logits[real])
        # who scores tokens and says that no cache is wanted
        unlabelled = {key: part for key, part in batch.items() if key != "labels"}
        scored = model(**unlabelled, use_cache=False)
        assert seen[-1] == (1, sum(LENGTHS)) and scored.past_key_values is None
        # who may want the cache gets it
        model.config.use_cache = True
        assert model(**unlabelled).past_key_values is not None and seen[-1] == (5, 43)
        assert model(**batch, use_cache=True).past_key_values is not None and seen[-1] == (5, 43)


def test_dropout_that_comes_later_is_seen() -> None:
    model, batch = lora(), padded(rows())
    speed_up(model)
    layer = model.get_base_model().model.layers[0]
    seen: list[Any] = []
    layer.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape[:2])))
    step(model, batch)
    model.add_adapter("other", LoraConfig(r=2, lora_dropout=0.5, target_modules=["down_proj"]))
    model.set_adapter("other")
    model.train()
    step(model, batch)
    assert seen == [(1, sum(LENGTHS)), (5, 43)]


def test_positions_that_jump_in_padding_are_no_pack() -> None:
    model, batch = lora(), padded(rows())
    batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).masked_fill(batch["attention_mask"] == 0, 1)
    assert equal(model, batch) == [sum(LENGTHS)]


def test_documents_without_a_token_are_none_and_bounds_that_go_back_are_refused() -> None:
    model = lora(num_key_value_heads=2, sliding_window=3)
    speed_up(model)
    ids = torch.randint(3, 500, (1, 11), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids, "num_items_in_batch": 9, "position_ids": torch.arange(11)[None]}
    want = step(model, batch | {"cu_seq_lens_q": torch.tensor([0, 4, 11])})
    got = step(model, batch | {"cu_seq_lens_q": torch.tensor([0, 0, 4, 4, 11, 11])})
    assert got[0] == want[0] and all(torch.equal(got[1][name], want[1][name]) for name in want[1])
    for starts in ([0, 8, 4, 11], [0, 4, 12], [1, 11], []):
        with pytest.raises(PackingError, match="goes back from 8 to 4" if 8 in starts else "in 1 row"):
            model(**batch, cu_seq_lens_q=torch.tensor(starts, dtype=torch.int32))


@pytest.mark.parametrize("training", [True, False])
def test_documents_of_a_pack_stay_apart_where_hidden_states_are_asked_for(training: bool) -> None:
    model = lora().train(training)
    data = rows((7, 3, 5))
    with torch.no_grad():
        alone = [
            model(input_ids=torch.tensor([row["input_ids"]]), output_hidden_states=True).hidden_states for row in data
        ]
        speed_up(model)
        pack = PackedCollator()([{"rows": data}])
        found = model(**pack, output_hidden_states=True).hidden_states
        assert torch.equal(model(**pack, output_hidden_states=[1]).hidden_states[1], found[1])
    assert len(found) == 3
    for number, layer in enumerate(found):
        want = torch.cat([each[number] for each in alone], dim=1)
        torch.testing.assert_close(layer, want, rtol=1e-6, atol=1e-9)


def test_a_mask_of_four_dimensions_says_itself_who_sees_whom() -> None:
    ids = torch.randint(3, 500, (2, 9), generator=torch.Generator().manual_seed(0))
    sees = torch.ones(9, 9, dtype=torch.bool).tril()
    sees[5:, :4] = False
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]]).expand(2, 9)
    mask = sees.expand(2, 1, 9, 9)
    equal(lora(), {"input_ids": ids, "labels": ids, "attention_mask": mask, "position_ids": positions})


def test_layers_that_peft_copied_attend_by_document_too() -> None:
    config = LoraConfig(r=2, target_modules=["down_proj"], modules_to_save=["self_attn"], layer_replication=[[0, 2]])
    model = get_peft_model(tiny.model().double(), config, autocast_adapter_dtype=False).double().train()
    for batch in (padded(rows()), padded(rows(), more=0), padded(rows((9, 9)), more=0)):
        equal(model, batch)
    attention = model.get_base_model().model.layers[0].self_attn
    assert attention.modules_to_save["default"].config._attn_implementation == "sdpa"


def test_an_export_is_the_stock_export() -> None:
    model = tiny.model().eval()
    inputs = {"input_ids": torch.arange(3, 12)[None], "attention_mask": torch.ones(1, 9).long(), "use_cache": False}
    want = model(**inputs).logits
    speed_up(model)
    torch.testing.assert_close(torch.export.export(model, (), inputs).module()(**inputs).logits, want)


def test_rows_with_adapters_of_their_own_stay_rows() -> None:
    model = lora()
    model.add_adapter("other", LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False))
    model.double().eval()
    batch = padded(rows((7, 3, 5)))
    with torch.no_grad():
        names = ["default", "other", "__base__"]
        want = model(**batch, adapter_names=names)
        speed_up(model)
        got = model(**batch, adapter_names=names)
    assert got.loss.item() == pytest.approx(want.loss.item(), rel=1e-6)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(got.logits[real], want.logits[real], rtol=1e-6, atol=1e-9)


def test_a_batch_in_the_tensors_of_one_that_failed_is_read_anew() -> None:
    model = lora()
    batch, other = padded(rows((7, 3, 5))), padded(rows((4, 7, 2)))
    want = model(**other).loss.item()
    speed_up(model)
    hook = model.get_base_model().model.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**batch)
    hook.remove()
    for name, tensor in batch.items():
        tensor.copy_(other[name])
    assert model(**batch).loss.item() == pytest.approx(want, rel=1e-6)


def test_two_threads_in_one_model_do_not_mix_up_their_batches() -> None:
    model = lora(vocab_size=4000, **LONGROPE)
    speed_up(model)
    pack = PackedCollator()([{"rows": rows((40, 9, 3))}])
    batches = [padded(rows((7, 3, 5))), pack | {"use_cache": False}]
    trained = [p for p in model.parameters() if p.requires_grad]

    def gradients(batch: dict[str, Any]) -> torch.Tensor:
        found = torch.autograd.grad(model(**batch).loss, trained)
        return torch.cat([part.flatten() for part in found])

    want = [gradients(batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(gradients, batches * 12))
    for number, mine in enumerate(got):
        torch.testing.assert_close(mine, want[number % 2], rtol=1e-9, atol=1e-12)


def test_a_decoder_that_is_called_without_its_model_knows_nothing_of_the_last_batch() -> None:
    model, batch = lora(), padded(rows())
    speed_up(model)
    batch["labels"] = batch["input_ids"]  # padding that is trained
    step(model, batch)
    decoder = model.get_base_model().model.eval()
    other = padded(rows((9, 4)))
    with torch.no_grad():
        alone = decoder(input_ids=other["input_ids"], attention_mask=other["attention_mask"], use_cache=False)
    assert alone.last_hidden_state[1, 4:].abs().max() == 0, "padding was left out"
