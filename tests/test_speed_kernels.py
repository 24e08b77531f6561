"""Triton's kernels, run by its interpreter on the CPU, and what decides whether they run: held to plain PyTorch."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from test_pack import LONGROPE
from test_speed_documents import equal, lora, padded, rows
from test_speed_layers import leaf

from benchmarks.fake_card import Card, on_a_card
from phi3_lora_plugin.speed import card_ops, card_passes, elementwise, layers, lora_mlp, loss, passes, proved_kernels
from phi3_lora_plugin.speed.apply import PARTS, speed_up

CPU = torch.device("cpu")
SIZES: dict[str, list[tuple[int, ...]]] = {
    "norm": [(1,), (33,), (96,)],
    "gate": [(1,), (33,), (80,)],
    "gate_sum": [(33, 3), (130, 20)],
    "loss": [(2,), (41,), (300,)],
    "rotate": [(4, 4, 8, 4), (4, 1, 16, 6), (6, 2, 10, 1), (3, 3, 6, 3)],
}


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of the CPU take the kernels, as those of a card do where they are proved."""
    pytest.importorskip("triton", reason="triton is not installed")
    for module in (elementwise, lora_mlp, loss):
        monkeypatch.setattr(module, "passes_for", lambda *case: card_passes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", proved_kernels.KINDS)
def test_kernels_give_what_their_twins_give(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setattr(proved_kernels, "_ROWS", 3)  # the interpreter takes a millisecond and more a row
    for sizes in SIZES[kind] if dtype in (torch.float32, torch.bfloat16) else SIZES[kind][1:2]:
        assert proved_kernels.fault(CPU, dtype, kind, sizes) is None, sizes


@pytest.mark.parametrize(("rows_", "tokens", "heads", "key_heads", "size", "rotated"), [(2, 2, 3, 1, 6, 4)])
def test_gradients_of_kernels_in_float64(
    kernels: None, rows_: int, tokens: int, heads: int, key_heads: int, size: int, rotated: int
) -> None:
    qkv = leaf(rows_, tokens, (heads + 2 * key_heads) * size, dtype=torch.float64)
    for own in (1, rows_):  # angles of all rows, or of each
        angles = torch.randn(own, tokens, rotated // 2, dtype=torch.float64).repeat(1, 1, 2)
        turn = (angles.cos(), angles.sin(), heads, key_heads, size)
        assert torch.autograd.gradcheck(lambda x, turn=turn: elementwise.rotate(x, *turn), qkv, fast_mode=True)
    assert torch.autograd.gradcheck(elementwise.swiglu, leaf(2, 3, 2 * 33, dtype=torch.float64), fast_mode=True)
    wide = leaf(2, 3, 12, dtype=torch.float64)  # each row of a wider tensor, as a slice has it
    assert torch.autograd.gradcheck(lambda x: elementwise.swiglu(x[..., :10]), wide, fast_mode=True)


def test_a_sum_and_its_norm_have_one_gradient(kernels: None) -> None:
    x, residual, weight = (leaf(2, 3, 33, dtype=torch.float32, seed=seed) for seed in range(3))
    weight = weight[0, 0].detach()
    ahead = [leaf(2, 3, 33, dtype=torch.float32, seed=seed).detach() for seed in (3, 4)]

    def stock(total: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return total, total * (total.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * weight

    cases = [(residual, [x, residual], x + residual), (None, [x], x)]
    for other, leaves, total in cases:
        *made, unnormed = elementwise.add_and_norm(x, other, weight, 1e-5)
        mine, want = tuple(made), stock(total)
        torch.testing.assert_close(mine, want)
        torch.testing.assert_close(unnormed.total * unnormed.scale * unnormed.weight, want[1])
        for used in ((0, 1), (0,), (1,)):
            outs, grads = ([each[place] for place in used] for each in (mine, ahead))
            got = torch.autograd.grad(outs, leaves, grads, retain_graph=True)
            torch.testing.assert_close(
                got, torch.autograd.grad([want[place] for place in used], leaves, grads, retain_graph=True)
            )


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_key_value_heads": 2, "partial_rotary_factor": 0.5, "sliding_window": 7}, LONGROPE],
    ids=["mha", "gqa partial window", "longrope"],
)
def test_a_step_with_kernels_is_the_stock_step(kernels: None, changes: dict[str, Any]) -> None:
    model = lora(**changes)
    if changes:
        equal(model, padded(rows((9, 3, 1))))
        return
    model.get_base_model().enable_input_require_grads()
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    equal(model, padded(rows((5, 3, 1)), more=0), {"attention": False})


def test_who_keeps_a_projection_for_backward_is_told(kernels: None) -> None:
    qkv = leaf(1, 3, 24, dtype=torch.float32) * 1
    kept = qkv.exp()  # its own result is what it keeps
    angles = torch.randn(1, 3, 4)
    made = elementwise.rotate(kept, angles, angles, 2, 2, 4, reuse=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        sum(part.sum() for part in made).backward()


def test_a_kernel_that_is_wrong_or_does_not_run_leaves_its_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    gate = card_passes.gate

    def one_number_off(both: torch.Tensor) -> torch.Tensor:
        made = gate(both)
        made[-1, -1] += 0.5
        return made

    def broken(*args: Any) -> Any:
        raise RuntimeError("no kernel image is available for execution on the device\nand more")

    monkeypatch.setattr(card_passes, "gate", one_number_off)
    monkeypatch.setattr(card_passes, "turn_", broken)
    monkeypatch.setattr(proved_kernels, "_tried", {})
    monkeypatch.setattr(proved_kernels, "_ROWS", 3)
    said = proved_kernels.prove([CPU], [torch.bfloat16], [("norm", 24), ("gate", 24), ("rotate", 2, 1, 8, 4)])
    assert "gate in plain PyTorch: its kernel gives a wrong product here (off by" in said
    assert "rotate in plain PyTorch: its kernel does not run here (RuntimeError: no kernel image" in said
    assert "norm" not in said and "and more" not in said
    with on_a_card(Card()):
        x = torch.empty(2, 24, dtype=torch.bfloat16)
        assert x.is_cuda and proved_kernels.passes_for("norm", x, 24) is card_passes
        for kind, of in (("gate", (24,)), ("rotate", (2, 1, 8, 4)), ("norm", (25,))):
            assert proved_kernels.passes_for(kind, x, *of) is passes, "wrong, or never tried"
        assert proved_kernels.passes_for("norm", x.float(), 24) is passes
    assert proved_kernels.passes_for("norm", torch.empty(2, 24, dtype=torch.bfloat16), 24) is passes
    monkeypatch.setattr(proved_kernels, "find_spec", lambda name: None)
    assert proved_kernels.fault(CPU, torch.bfloat16, "norm", (24,)) == "triton is not installed"


def test_the_line_of_the_layers_says_which_passes_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lora(torch.float32)
    (line,) = [one for one in speed_up(model) if one.part == "layers"]
    assert line.on and line.why == PARTS["layers"], "nothing of kernels where there is no GPU"
    monkeypatch.setattr(proved_kernels, "fault", lambda *case: None)
    monkeypatch.setattr(proved_kernels, "_tried", {})
    assert layers.kernels_used(model.get_base_model(), [torch.device("cuda", 0)]) == "one Triton kernel a pass"
    config = model.get_base_model().config
    found = {(kind, of) for _, _, kind, of in proved_kernels._tried}
    assert ("gate_sum", (config.intermediate_size, 4)) in found
    assert ("norm", (config.hidden_size,)) in found and ("gate", (config.intermediate_size,)) in found


def test_the_loss_of_rows_longer_than_a_piece(kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card_ops, "_MOST", 8)  # so that a row of 41 words takes three pieces
    hidden, head = leaf(5, 6, dtype=torch.float64), leaf(41, 6, dtype=torch.float64, seed=1).detach() * 3
    targets = torch.tensor([0, 40, 7, -100, 16])
    want = torch.nn.functional.cross_entropy(hidden @ head.t(), targets)
    got = loss.supervised_cross_entropy(hidden, head, targets)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(each, hidden) for each in (got, want)))
    with torch.no_grad():
        torch.testing.assert_close(loss.supervised_cross_entropy(hidden, head, targets), want)


_COMPILE = """
import sys
from phi3_lora_plugin.speed import triton_kernels as kernels
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import triton, triton.language as tl
for name, kernel in sorted(vars(kernels).items()):
    if not isinstance(kernel, triton.JITFunction) or name.startswith("_"):
        continue
    for card, dtype in ((75, "fp16"), (80, "bf16"), (89, "fp32"), (90, "bf16")):
        fixed = {"ADD": True, "AHEAD": True, "GRADIENT": True, "WIDE": tl.float32, "BLOCK": 1024, "HEADS": 8}
        fixed |= {"KEY_HEADS": 2, "HALF": 16, "REST": 8, "SIZE": 64}
        fixed |= {"NARROW": {"fp16": tl.float16, "bf16": tl.bfloat16, "fp32": tl.float32}[dtype]}
        fixed |= {"TOKENS": 32, "COLUMNS": 128, "RANK": 128}
        kinds = {each: f"*{dtype}" for each in kernel.arg_names}
        kinds |= {each: "i32" for each in kernel.arg_names if each.endswith(("_stride", "_row", "_token", "_head"))}
        counts = "width heads key_heads half size angles tokens words stride rows rank"
        kinds |= dict.fromkeys(counts.split(), "i32")
        kinds |= {"eps": "fp32", "scaling": "fp32", "labels": "*i64", "losses": "*fp32"}
        kinds |= {"scale": "fp32" if name == "cross_entropy" else "*fp32"}
        kinds = {each: kinds[each] for each in kernel.arg_names} | {each: "constexpr" for each in fixed}
        fixed = {each: value for each, value in fixed.items() if each in kernel.arg_names}
        signature = {each: kinds[each] for each in kernel.arg_names}
        source = ASTSource(fn=kernel, signature=signature, constexprs=fixed)
        made = triton.compile(source, target=GPUTarget("cuda", card, 32))
        assert made.asm["cubin"], name
    print(name)
"""


@pytest.mark.long
def test_rounding_in_real_sizes_is_not_taken_for_a_fault() -> None:
    """A kernel that is right must not be refused for the worst of a million roundings."""
    pytest.importorskip("triton", reason="triton is not installed")
    cases = [("norm", 3072), ("gate", 8192), ("gate_sum", 8192, 16), ("loss", 32064), ("rotate", 32, 32, 96, 48)]
    for kind, *sizes in cases:
        for dtype in (torch.bfloat16, torch.float16):
            assert proved_kernels.fault(CPU, dtype, kind, tuple(sizes)) is None, (kind, dtype)


@pytest.mark.long
def test_every_kernel_compiles_for_cards_of_each_generation(tmp_path: Any) -> None:
    """Down to machine code, by the compiler that comes with Triton: what an interpreter lets pass shows here."""
    pytest.importorskip("triton", reason="triton is not installed")
    environment = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", _COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    names = "cross_entropy gate gate_backward gate_sum gate_sum_backward norm norm_backward turn turn_backward"
    assert done.stdout.split() == names.split()
