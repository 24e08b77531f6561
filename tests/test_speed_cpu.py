"""What a CPU runs in place of PyTorch's own: attention by blocks of queries, and the loss a few rows at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_speed_documents import lora, padded, rows, step

from phi3_lora_plugin.speed import cpu_attention
from phi3_lora_plugin.speed.apply import speed_up
from phi3_lora_plugin.speed.cpu_attention import attend
from phi3_lora_plugin.speed.loss import _chunks, supervised_cross_entropy, supervised_rows
from phi3_lora_plugin.speed.passes import cross_entropy_
from phi3_lora_plugin.speed.sdpa import one_by_one

pytestmark = pytest.mark.slow


def with_gradient(
    call: Callable[..., Any], dtype: torch.dtype, heads: tuple[int, int], bounds: tuple[int, ...], window: int | None
) -> list[torch.Tensor]:
    """[output, gradient of the fused projection], both in float64, for the same numbers in any dtype."""
    draw, size, (own, shared) = torch.Generator().manual_seed(5), 12, heads
    qkv = torch.randn(1, bounds[-1], own + 2 * shared, size, generator=draw, dtype=torch.float64).bfloat16().to(dtype)
    ahead = torch.randn(1, bounds[-1], own, size, generator=draw, dtype=torch.float64).bfloat16().to(dtype)
    qkv.requires_grad_()
    parts = [part.transpose(1, 2) for part in qkv.split([own, shared, shared], dim=2)]
    out = call(*parts, bounds, 0.3, window)
    return [each.double() for each in (out, *torch.autograd.grad(out, qkv, ahead))]


def sdpa(q: Any, k: Any, v: Any, bounds: Any, scale: float, window: int | None) -> Any:
    return one_by_one(q, k, v, bounds, scale, 0.0, window)


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)], ids=str)
@pytest.mark.parametrize("window", [None, 1, 7, 100, 400])
def test_blocks_of_queries_give_what_one_sdpa_call_a_document_gives(heads: tuple[int, int], window: int | None) -> None:
    for bounds in ((0, 1), (0, 5, 6, 140), (0, 129, 257), (0, 300, 301, 700)):
        want = with_gradient(sdpa, torch.float64, heads, bounds, window)
        for mine, exact in zip(with_gradient(attend, torch.float64, heads, bounds, window), want, strict=True):
            torch.testing.assert_close(mine, exact)
        for dtype in (torch.float32, torch.bfloat16):
            mine, stock = (with_gradient(call, dtype, heads, bounds, window) for call in (attend, sdpa))
            for got, others, exact in zip(mine, stock, want, strict=True):
                least = torch.finfo(dtype).eps * exact.norm()
                assert (got - exact).norm() <= max(1.5 * (others - exact).norm(), least), (bounds, dtype)


def test_blocks_run_in_training_and_sdpa_without_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def spy(query: Any, *rest: Any) -> Any:
        calls.append(query.shape[2])
        return attend(query, *rest)

    model, batch = lora(), padded(rows())
    want, expected = step(model, batch)
    speed_up(model)
    monkeypatch.setattr(cpu_attention, "attend", spy)
    loss, gradients = step(model, batch)
    assert loss == pytest.approx(want, rel=1e-6) and len(calls) == 2
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-5, atol=1e-7, msg=name)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again, others = step(model, batch)
    assert again == loss and len(calls) == 6, "each layer runs again in backward"
    assert all(torch.equal(others[name], gradients[name]) for name in gradients)
    calls.clear()
    with torch.no_grad():
        step_loss = model.eval()(**batch).loss.item()
    assert step_loss == pytest.approx(want, rel=1e-6) and not calls
    model.train().half()
    speed_up(model, {"masters": False})
    step(model, batch)
    assert not calls, "CPUs multiply float16 slowly"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("count", "words"), [(1, 1), (37, 40_000), (5, 600_000)])
def test_the_loss_of_a_few_rows_at_a_time_is_that_of_all(dtype: torch.dtype, count: int, words: int) -> None:
    draw = torch.Generator().manual_seed(2)
    logits = (torch.randn(count, words, generator=draw) * 3).to(dtype)
    labels = torch.randint(0, words, (count,), generator=draw)
    logits[0, labels[0]] = -60_000.0 if words > 1 else 7.0  # a word that the model rules out: its share is zero
    exact = logits.double().clone().requires_grad_()
    want = torch.nn.functional.cross_entropy(exact, labels, reduction="none")
    (gradient,) = torch.autograd.grad(want.sum(), exact)
    losses = cross_entropy_(logits.clone(), labels, 1.0, False)
    assert losses.dtype == torch.promote_types(torch.float32, dtype)
    torch.testing.assert_close(losses.double(), want, rtol=2e-7, atol=2e-6)
    for scale in (1.0, 256.0):
        torch.testing.assert_close(cross_entropy_(logits_again := logits.clone(), labels, scale, True), losses)
        torch.testing.assert_close(logits_again.double() / scale, gradient, rtol=0, atol=torch.finfo(dtype).eps + 1e-7)


@pytest.mark.parametrize("rows_", [1, 15, 16, 17, 128, 130, 722, 1023])
def test_the_loss_takes_rows_in_parts_that_products_are_fast_with(rows_: int) -> None:
    parts = list(_chunks(rows_, 384))
    assert sorted({row for part in parts for row in range(rows_)[part]}) == list(range(rows_))
    assert all((part.stop - part.start) % 16 == 0 for part in parts if part.start)
    assert max(part.stop - part.start for part in parts) <= 384


def test_logits_that_are_not_finite_are_seen() -> None:
    labels = torch.tensor([0, 1])
    for value in (torch.nan, torch.inf):
        logits = torch.zeros(2, 5)
        logits[1, 3] = value
        losses = cross_entropy_(logits, labels, 1.0, True)
        assert losses[0].isfinite() and not losses[1].isfinite()


def test_memory_for_logits_is_kept_from_an_evaluation_to_training_and_between_dtypes() -> None:
    draw = torch.Generator().manual_seed(4)
    for dtype, inferring in (
        (torch.float32, True),
        (torch.float32, False),
        (torch.float64, False),
        (torch.bfloat16, True),
    ):
        weight = torch.randn(50, 8, generator=draw).to(dtype)
        targets = torch.randint(0, 50, (9,), generator=draw)
        hidden = torch.randn(9, 8, generator=draw).to(dtype).requires_grad_(not inferring)
        with torch.inference_mode(inferring):
            loss = supervised_cross_entropy(hidden, weight, targets)
        want = torch.nn.functional.cross_entropy((hidden @ weight.t()).float(), targets)
        torch.testing.assert_close(loss.float(), want)
        if not inferring:
            (mine,) = torch.autograd.grad(loss, hidden)
            torch.testing.assert_close(mine, torch.autograd.grad(want, hidden)[0], rtol=1e-5, atol=1e-6)
    bias = torch.randn(50, generator=draw)
    losses, _, _ = supervised_rows(hidden.float(), weight.float(), targets, bias)
    want = torch.nn.functional.cross_entropy(hidden.float() @ weight.float().t() + bias, targets, reduction="none")
    torch.testing.assert_close(losses, want)
