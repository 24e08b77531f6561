"""Which attention runs on a GPU: tried when documents are fused, never inside a step, and said.

There is no GPU here. The branch that a GPU takes is forced by proving kernels on the CPU, with functions that have the
signatures of torch 2.10 to 2.13 (read off the wheels) and of flash_attn, and compute what those compute.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from test_pack import LONGROPE
from test_speed_documents import lora as lora64
from test_speed_documents import padded, rows, step
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import profile

from phi3_lora_plugin.chat.pack import PackedCollator
from phi3_lora_plugin.speed import documents, varlen_kernels
from phi3_lora_plugin.speed.apply import slow_down, speed_up
from phi3_lora_plugin.speed.sdpa import one_by_one

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


def gpu(test: Any) -> Any:
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")(test))


def lora(dtype: torch.dtype, **changes: Any) -> Any:
    """The same weights in any dtype."""
    return lora64(torch.float32, **changes).to(dtype)


def reference(q: Any, k: Any, v: Any, limits: Any, longest: int, scale: float | None, left: int) -> torch.Tensor:
    """[tokens, heads, size], document by document, as the flash kernels do it: `left` tokens before, -1 for all."""
    assert q.dtype in (torch.float16, torch.bfloat16) and limits.dtype == torch.int32
    assert all(part.stride(-1) == 1 for part in (q, k, v))
    bounds = limits.tolist()
    assert longest == max(b - a for a, b in zip(bounds, bounds[1:], strict=False))
    parts = []
    for start, stop in zip(bounds, bounds[1:], strict=False):
        one = [part[start:stop].transpose(0, 1)[None] for part in (q, k, v)]
        mask = torch.ones(stop - start, stop - start, dtype=torch.bool, device=q.device).tril()
        mask = mask.triu(-left) if left >= 0 else mask
        parts.append(scaled_dot_product_attention(*one, attn_mask=mask, scale=scale, enable_gqa=True)[0])
    return torch.cat(parts, dim=1).transpose(0, 1)


calls: list[tuple[int, ...]] = []


def torch_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):  # type: ignore[no-untyped-def]
    assert is_causal and return_aux is None and cu_seq_k is cu_seq_q and max_k == max_q
    calls.append(tuple(query.shape))
    return reference(query, key, value, cu_seq_q, max_q, None, -1)


def torch_2_11(  # type: ignore[no-untyped-def]
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    assert window_size[1] == 0 and cu_seq_k is cu_seq_q and max_k == max_q
    calls.append(tuple(query.shape))
    return reference(query, key, value, cu_seq_q, max_q, scale, window_size[0])


def torch_2_12(  # type: ignore[no-untyped-def]
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
    enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    if query.shape[1] != key.shape[1] and not enable_gqa:
        raise ValueError("Expect query and key/value to have the same number of heads")
    return torch_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size)


def flash_attn_2(  # type: ignore[no-untyped-def]
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    block_table=None,
):  # fmt: skip
    assert causal
    calls.append(tuple(q.shape))
    return reference(q, k, v, cu_seqlens_q, max_seqlen_q, softmax_scale, window_size[0])


def heads_alike(function: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel that does not share keys among heads."""

    def kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):  # type: ignore[no-untyped-def]
        assert query.shape[1] == key.shape[1], "number of heads"
        return function(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size)

    return kernel


def installed(patch: pytest.MonkeyPatch, varlen: Any = None, flash: Any = None) -> None:
    """Have these functions installed and no others, on a machine with one GPU: the CPU plays its part."""
    module: Any = None
    if varlen is not None:
        module = ModuleType("torch.nn.attention.varlen")
        module.varlen_attn = varlen
    patch.setitem(sys.modules, "torch.nn.attention.varlen", module)
    other: Any = None
    if flash is not None:
        other = ModuleType("flash_attn")
        other.flash_attn_varlen_func = flash
    patch.setitem(sys.modules, "flash_attn", other)
    patch.setattr(documents, "cards_of", lambda decoder: {CPU})
    calls.clear()


def never(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("kernels are tried when documents are fused, not inside a step")


def said(model: Any, **options: Any) -> str:
    (attention,) = [one for one in speed_up(model, **options) if one.part == "attention"]
    assert attention.on
    return attention.why.partition("; ")[2]


VERSIONS = {"2.10": torch_2_10, "2.11": torch_2_11, "2.12 and 2.13": torch_2_12}
SHAPES: dict[str, dict[str, Any]] = {
    "mha": {},
    "gqa": {"num_key_value_heads": 2},
    "window": {"sliding_window": 7},
    "gqa window longrope": {"num_key_value_heads": 1, "sliding_window": 7} | LONGROPE,
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("version", VERSIONS)
def test_each_version_of_torch_is_asked_for_what_it_knows(
    version: str, shape: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = lora(torch.float64, **SHAPES[shape])
    want_loss, want = step(exact, padded(rows()))
    installed(monkeypatch, VERSIONS[version])
    model = lora(dtype, **SHAPES[shape])
    why = said(model)
    windowed = "sliding_window" in SHAPES[shape]
    if version == "2.10" and windowed:
        assert "over the window one SDPA call a document: no" not in why
        assert f"within the window varlen_attn in torch {torch.__version__.partition('+')[0]}" in why
        assert "over the window one SDPA call a document: flash_attn is not installed, varlen_attn" in why
        assert "takes no window" in why
    else:
        assert why == f"varlen_attn in torch {torch.__version__.partition('+')[0]}"
    monkeypatch.setattr(varlen_kernels, "prove", never)
    calls.clear()
    for batch, times in ((padded(rows()), 0 if version == "2.10" and windowed else 2), (padded(rows((5, 3))), 2)):
        calls.clear()
        loss, got = step(model, batch)
        assert len(calls) == times, "one call a layer"
    loss, got = step(model, padded(rows()))
    assert loss == pytest.approx(want_loss, rel=2e-2)
    for name in want:
        cosine = torch.nn.functional.cosine_similarity(got[name].double().flatten(), want[name].flatten(), 0)
        assert cosine > 0.99, (name, cosine)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_first_step_with_activation_checkpointing(
    reentrant: bool, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(monkeypatch, torch_2_12)
    results = []
    for fast in (False, True):
        model = lora(torch.float32 if autocast else torch.bfloat16)
        model.get_base_model().enable_input_require_grads()
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
        if fast:
            assert said(model).startswith("varlen_attn")
            monkeypatch.setattr(varlen_kernels, "prove", never)
            calls.clear()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            try:
                results.append(step(model, padded(rows())))
            except AttributeError:  # a gradient that is None
                if fast:
                    raise
                pytest.skip("stock code has no gradients here either (torch 2.6, reentrant under autocast on a CPU)")
    assert len(calls) == 2 * 2, "each layer once, and once more to recompute it"
    (stock_loss, stock), (loss, ours) = results
    assert loss == pytest.approx(stock_loss, rel=2e-2)
    for name in stock:
        assert torch.nn.functional.cosine_similarity(ours[name].flatten(), stock[name].flatten(), 0) > 0.99, name


class Hooks:
    """Tensors that are saved for backward counted, as an activation checkpoint would."""

    def __init__(self) -> None:
        self.saved = 0

    def __enter__(self) -> None:
        self.context = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self.context.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.context.__exit__(*error)

    def _pack(self, tensor: Any) -> Any:
        self.saved += 1
        return tensor


@pytest.mark.parametrize("around", ["inference_mode", "no_grad", "autocast", "hooks", "default device"])
def test_a_kernel_that_was_tried_anywhere_is_right_everywhere(around: str, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, torch_2_12)
    model, hooks = lora(torch.bfloat16), Hooks()
    before = torch.get_rng_state()
    context: Any = {
        "inference_mode": torch.inference_mode(),
        "no_grad": torch.no_grad(),
        "autocast": torch.autocast("cpu", dtype=torch.float16),
        "hooks": hooks,
        "default device": torch.device("meta"),
    }[around]
    with context:
        why = said(model)
    assert why.startswith("varlen_attn") and hooks.saved == 0
    assert torch.equal(torch.get_rng_state(), before), "the random numbers of a run are not touched"
    calls.clear()
    step(model, padded(rows()))
    assert len(calls) == 2


def no_window(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):  # type: ignore[no-untyped-def]
    return reference(query, key, value, cu_seq_q, max_q, scale, -1)


def one_too_many(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):  # type: ignore[no-untyped-def]
    return reference(query, key, value, cu_seq_q, max_q, scale, window_size[0] + 1 if window_size[0] >= 0 else -1)


def no_scale(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):  # type: ignore[no-untyped-def]
    return reference(query, key, value, cu_seq_q, max_q, 2 * scale, window_size[0])


def no_gradient(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):  # type: ignore[no-untyped-def]
    return reference(query, key, value.detach() + 0 * value, cu_seq_q, max_q, scale, window_size[0])


def not_a_number(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):  # type: ignore[no-untyped-def]
    return reference(query, key, value, cu_seq_q, max_q, scale, window_size[0]) * float("nan")


def no_such_card(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):  # type: ignore[no-untyped-def]
    raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.\nmore")


@pytest.mark.parametrize(
    ("kernel", "reason", "window"),
    [
        (no_window, "gives a wrong output here (off by ", "over"),
        (one_too_many, "gives a wrong output here (off by ", "over"),
        (no_scale, "gives a wrong output here (off by ", ""),
        (no_gradient, "gives a wrong dV here (off by 100.0%)", ""),
        (not_a_number, "gives a wrong output here (off by nan%)", ""),
        (no_such_card, "does not run here (RuntimeError: FlashAttention only supports Ampere GPUs or newer.)", ""),
    ],
)
def test_a_kernel_that_is_wrong_or_fails_is_not_used_and_the_line_says_why(
    kernel: Any, reason: str, window: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(monkeypatch, kernel)
    model = lora(torch.bfloat16, sliding_window=7)
    why = said(model)
    assert "one SDPA call a document: flash_attn is not installed, varlen_attn" in why and reason in why
    assert ("within the window varlen_attn" in why) is bool(window)
    want = step(lora(torch.bfloat16, sliding_window=7), padded(rows()))[0]
    assert step(model, padded(rows()))[0] == pytest.approx(want, rel=2e-2)


def test_without_any_kernel_documents_attend_one_by_one_and_both_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch)
    version = torch.__version__.partition("+")[0]
    model = lora(torch.bfloat16)
    want = f"one SDPA call a document: no varlen_attn in torch {version}, flash_attn is not installed"
    assert said(model) == want and said(model) == want
    slow_down(model)
    installed(monkeypatch, flash=flash_attn_2)
    assert said(model) == "flash_attn_varlen_func of flash_attn"
    calls.clear()
    step(model, padded(rows()))
    assert len(calls) == 2
    slow_down(model)
    # torch 2.10 takes no window, flash_attn does
    installed(monkeypatch, torch_2_10, flash_attn_2)
    windowed = lora(torch.bfloat16, sliding_window=7)
    assert said(windowed) == (
        f"within the window varlen_attn in torch {version}; over the window flash_attn_varlen_func of flash_attn"
    )
    # a flash_attn built for another torch
    monkeypatch.setitem(sys.modules, "flash_attn", Broken("flash_attn"))
    assert "flash_attn_varlen_func of flash_attn cannot be imported (OSError: undefined symbol" in said(
        lora(torch.bfloat16, sliding_window=7)
    )


class Broken(ModuleType):
    def __getattr__(self, name: str) -> Any:
        raise OSError("undefined symbol: _ZN3c10")


def test_a_kernel_that_does_not_share_keys_gets_them_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, heads_alike(torch_2_11))
    model = lora(torch.bfloat16, num_key_value_heads=1)
    assert said(model).endswith("on repeated keys and values")
    calls.clear()
    want = step(lora(torch.float64, num_key_value_heads=1), padded(rows()))[0]
    assert step(model, padded(rows()))[0] == pytest.approx(want, rel=2e-2) and len(calls) == 2


def test_float32_a_cache_and_dropout_stay_with_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, torch_2_12)
    for model in (lora(torch.float32), lora(torch.bfloat16, attention_dropout=0.1)):
        speed_up(model)
        calls.clear()
        step(model, PackedCollator()([{"rows": rows()}]))
        assert not calls
    model = lora(torch.bfloat16).eval()
    speed_up(model)
    calls.clear()
    model.generate(input_ids=torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False)
    assert not calls


def test_a_model_that_moves_to_another_device_is_tried_there_too(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, torch_2_12)
    monkeypatch.setattr(documents, "cards_of", lambda decoder: set())
    model = lora(torch.bfloat16)
    assert said(model) == "blocks of queries on the CPU"
    monkeypatch.setattr(documents, "cards_of", lambda decoder: {CPU})
    assert said(model).startswith("varlen_attn")


def test_no_copies_of_queries_keys_and_values_are_made_for_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []

    def kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):  # type: ignore[no-untyped-def]
        seen.append(value.stride())
        return reference(query, key, value, cu_seq_q, max_q, scale, window_size[0])

    installed(monkeypatch, kernel)
    model = lora(torch.bfloat16)
    speed_up(model)
    seen.clear()
    step(model, padded(rows()))
    assert seen == [(3 * 32, 8, 1)] * 2, "a view of the fused projection"


def test_gradients_of_documents_are_put_together_once() -> None:
    """Not each into zeros of the whole row."""
    q, k, v = (torch.randn(1, 2, 40, 8, requires_grad=True) for _ in range(3))
    out = one_by_one(q, k, v, (0, 5, 6, 30, 40), None, 0.0, None)
    with profile() as seen:
        out.sum().backward()
    names = Counter(event.name for event in seen.events())
    assert names["aten::cat"] == 3 and not names["aten::slice_backward"]


@pytest.mark.parametrize("window", [1, 7, 600, 2047])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_a_document_over_its_window_attends_in_pieces_without_a_mask_of_its_square(
    window: int, key_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = torch.Generator().manual_seed(3)
    tokens, bounds = 1500, (0, 1, 1300, 1500)
    shapes = [(1, heads, tokens, 8) for heads in (4, key_heads, key_heads)]
    q, k, v = (torch.randn(shape, generator=draw, dtype=torch.float64, requires_grad=True) for shape in shapes)
    masks: list[Any] = []
    stock = scaled_dot_product_attention

    def spy(*args: Any, attn_mask: Any = None, **kwargs: Any) -> Any:
        if attn_mask is not None:
            masks.append(attn_mask)
            assert not kwargs.get("enable_gqa"), "no fast kernel takes a mask and shares keys"
        return stock(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    out = one_by_one(q, k, v, bounds, None, 0.0, window)
    got = [out, *torch.autograd.grad(out.square().sum(), (q, k, v))]
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)[None]
    document = torch.bucketize(torch.arange(tokens), torch.tensor(bounds[1:]), right=True)
    mask = (distance >= 0) & (distance < window) & (document[:, None] == document[None])
    exact = stock(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)
    for mine, want in zip(got, [exact, *torch.autograd.grad(exact.square().sum(), (q, k, v))], strict=True):
        torch.testing.assert_close(mine, want)
    assert all(mask.dtype == torch.bool and mask.shape[0] <= max(window, 512) for mask in masks)


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_on_a_card_packs_and_padding_give_what_the_cpu_gives(shape: str, dtype: torch.dtype) -> None:
    want_loss, want = step(lora(torch.float64, **SHAPES[shape]), padded(rows()))
    model = lora(dtype, **SHAPES[shape]).cuda()
    print("attention:", said(model))
    batches = padded(rows()), PackedCollator()([{"rows": rows()}])
    for batch in batches:
        moved = {key: part.cuda() if torch.is_tensor(part) else part for key, part in batch.items()}
        loss, got = step(model, moved)
        assert loss == pytest.approx(want_loss, rel=2e-2)
        for name in want:
            cosine = torch.nn.functional.cosine_similarity(got[name].double().cpu().flatten(), want[name].flatten(), 0)
            assert cosine > 0.99, name


@gpu
def test_on_a_card_the_first_step_may_be_one_with_activation_checkpointing() -> None:
    results = []
    for fast in (False, True):
        model = lora(torch.bfloat16, hidden_size=128, num_key_value_heads=2).cuda()
        model.get_base_model().enable_input_require_grads()
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        if fast:
            speed_up(model)
        results.append(step(model, {key: part.cuda() for key, part in padded(rows()).items()}))
    assert results[1][0] == pytest.approx(results[0][0], rel=2e-2)


@gpu
@pytest.mark.parametrize("packed", [False, True])
def test_on_a_card_the_host_waits_once_a_step(packed: bool) -> None:
    model = lora(torch.bfloat16, hidden_size=128, **LONGROPE).cuda()
    speed_up(model)
    batch: Any = PackedCollator()([{"rows": rows()}]) if packed else padded(rows())
    moved = {key: part.cuda() if torch.is_tensor(part) else part for key, part in batch.items()}
    moved["num_items_in_batch"] = torch.tensor(33, device="cuda")
    model(**moved).loss.backward()  # whatever is made once
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model(**moved).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [str(each.message) for each in caught if "synchronizing" in str(each.message)]
    assert len(waits) <= 1, waits


@gpu
def test_on_a_card_float16_trains_under_a_scaler() -> None:
    model = lora(torch.float16, hidden_size=128)
    speed_up(model.cuda())
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    optimizer, scaler = torch.optim.AdamW(trained, lr=1e-2), torch.amp.GradScaler("cuda")
    moved = {key: part.cuda() for key, part in padded(rows()).items()}
    losses = []
    for _ in range(8):
        with torch.autocast("cuda", dtype=torch.float16):
            loss = model(**moved).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@gpu
def test_on_a_card_losses_and_gradients_are_stock_s() -> None:
    results = []
    for parts in ("off", "auto"):
        model = lora(torch.float32, hidden_size=128, num_key_value_heads=2, sliding_window=7).cuda()
        speed_up(model, parts)
        results.append(step(model, {key: part.cuda() for key, part in padded(rows()).items()}))
    (stock_loss, stock), (loss, ours) = results
    assert loss == pytest.approx(stock_loss, rel=1e-4)
    for name in stock:
        assert torch.nn.functional.cosine_similarity(ours[name].flatten(), stock[name].flatten(), 0) > 0.9999, name
