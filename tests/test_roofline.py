"""`python -m benchmarks.roofline` against counts by hand."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import roofline  # noqa: E402
from benchmarks.cards import CARDS, card_of, flops_per_token  # noqa: E402
from benchmarks.costs import GEMM, STREAM, Meter  # noqa: E402
from benchmarks.fake_card import on_a_card  # noqa: E402
from benchmarks.sizes import config  # noqa: E402

pytestmark = pytest.mark.slow

MINI = "microsoft/Phi-3-mini-4k-instruct"
#: (in, out) of the four maps of a layer of Phi-3-mini.
MAPS = ((3072, 9216), (3072, 3072), (3072, 16384), (8192, 3072))
LENGTHS = (512, 256, 256)
TOKENS = sum(LENGTHS)


@pytest.fixture(scope="module")
def priced() -> dict[str, roofline.Priced]:
    step = roofline.Step(MINI, CARDS["h100"], LENGTHS, rank=8)
    return {variant: roofline.price(step, variant) for variant in roofline.VARIANTS}


def test_the_products_of_a_layer_are_those_of_its_maps(priced: dict[str, roofline.Priced]) -> None:
    forward = sum(2 * TOKENS * rows * columns for rows, columns in MAPS)
    # LoRA: two products forwards, and of each two backwards; the frozen weight gets no gradient.
    lora = 3 * sum(2 * TOKENS * 8 * (rows + columns) for rows, columns in MAPS)
    ours = priced["ours"].layer
    # Of gate and up, B's is inside the kernel of the gate, and once more where that is made again.
    inside = 2 * TOKENS * 8 * 16384
    assert ours.flops["gemm"] == 2 * forward
    assert (ours.flops["lora"], ours.flops["elementwise"]) == (lora - inside, 2 * inside)
    # each document sees its own half square, four products of two forwards, and two and a half times that backwards
    assert ours.flops["attention"] == 3.5 * 4 * 3072 * sum(length**2 / 2 for length in LENGTHS)
    # padded to the longest, stock code multiplies padding too
    padded = priced["stock"].layer
    assert padded.flops["gemm"] == 2 * forward * 3 * 512 / TOKENS
    assert padded.flops["attention"] == 3.5 * 4 * 3072 * 3 * 512**2 / 2
    weights = sum(rows * columns for rows, columns in MAPS)
    moved = 2 * 2 * (weights + TOKENS * sum(rows + columns for rows, columns in MAPS))
    assert ours.bytes["gemm"] == moved
    assert ours.seconds["gemm"] == pytest.approx(2 * forward / (GEMM * 989e12), rel=0.1)


def test_a_norm_moves_what_its_passes_move() -> None:
    from transformers.models.phi3.modeling_phi3 import Phi3RMSNorm

    meter = Meter(CARDS["h100"])
    norm = Phi3RMSNorm(3072).to(torch.bfloat16)
    with on_a_card(meter), torch.no_grad():
        x = torch.empty(1, 4096, 3072, dtype=torch.bfloat16)
        norm(x)
    # to float32 6 bytes a value, square 8, mean 4, times the root 8, back to 16 bits 6, times the weight 4
    assert meter.costs.bytes["elementwise"] == pytest.approx(36 * 4096 * 3072, rel=0.01)
    assert meter.costs.seconds["elementwise"] == pytest.approx(36 * 4096 * 3072 / (STREAM * 3.35e12), rel=0.01)
    assert not any(meter.costs.flops.values()) and 6 <= meter.costs.kernels <= 10


def test_our_passes_over_a_layer_are_those_of_its_kernels(priced: dict[str, roofline.Priced]) -> None:
    hidden, inter = 3072, 8192
    # A norm reads and writes once, with a sum before it twice each; the last sum is an addition. Backwards each reads
    # two gradients and what it normed. Queries and keys turn in place; their gradients and that of the values are put
    # together. The gate reads two halves, and backwards writes two, and once more what it gave.
    norms = 2 + 4 + 3 + 2 * 4
    passes = 2 * TOKENS * ((norms + 4 + 6) * hidden + (3 + 6) * inter)
    # A x of gate and up, and their B, for LoRA inside the gate; B is cast for each of two directions as elsewhere
    passes += 2 * 2 * 8 * (TOKENS + 16384) + 6 * 8 * 16384
    # A is cast from 32 to 16 bits for each of two products and its gradient back, B as well, and that is scaled
    passes += 8 * sum(18 * into + 22 * out for into, out in MAPS)
    assert priced["ours"].layer.bytes["elementwise"] == pytest.approx(passes, rel=0.005)
    kept = priced["ours"].layer.kept / TOKENS
    # two sums, what attention gives, q, k and v, gate and up; A x of each projection
    streams = 2 * hidden + hidden + 3 * hidden + 2 * inter
    assert kept == pytest.approx(2 * (streams + 4 * 8), rel=0.02)


def test_liger_s_kernels_take_copies_of_parts(priced: dict[str, roofline.Priced]) -> None:
    hidden, inter = 3072, 8192
    # two norms, 16-bit copies for A of three projections, rotated queries and keys beside the projection that they
    # come from, what attention gives; copies of gate and up, and what they give, for the last projection's A
    streams = (2 + 3 + 2 + 3 + 1) * hidden + (2 + 1) * inter
    assert priced["stock+liger"].layer.kept / (3 * max(LENGTHS)) == pytest.approx(2 * (streams + 4 * 8), rel=0.02)
    assert priced["stock+liger"].whole.reads == priced["stock"].whole.reads + 3  # its loss asks how many, and for a one


def test_the_gradient_of_a_part_is_a_fill_and_a_copy() -> None:
    meter = Meter(CARDS["h100"])
    with on_a_card(meter):
        x = torch.empty(64, 96, requires_grad=True)
        x[:, :32].backward(torch.empty(64, 32))
        assert (meter.costs.kernels, meter.costs.bytes["elementwise"]) == (2, 4 * 64 * (96 + 2 * 32))


def test_products_of_narrow_models_are_not_lora_s() -> None:
    step = roofline.Step("embedded:tiny-phi3", CARDS["h100"], LENGTHS, rank=8)
    maps = (64, 192), (64, 64), (64, 256), (128, 64)
    for variant, tokens in (("ours", TOKENS), ("stock", 3 * max(LENGTHS))):
        assert roofline.price(step, variant).layer.flops["gemm"] == 4 * tokens * sum(a * b for a, b in maps)


def test_a_card_without_flash_attention_has_one_call_a_document() -> None:
    names = {}
    for card in ("t4", "a100"):
        operators = roofline.price(roofline.Step("embedded:tiny-phi3", CARDS[card], LENGTHS), "ours").layer.operators
        names[card] = {name.split()[1] for name, seconds in operators.items() if seconds > 0}
    assert "_varlen_attn" in names["a100"] and not any("varlen" in name for name in names["t4"])
    assert "_scaled_dot_product_flash_attention_for_cpu" in names["t4"]


def test_what_views_and_rows_cost() -> None:
    meter = Meter(CARDS["h100"])
    with on_a_card(meter), torch.no_grad():
        table = torch.empty(1000, 64, dtype=torch.bfloat16)
        table.t()[:, 3:].unsqueeze(0).expand(4, 64, 997)
        assert meter.costs.kernels == 0
        ids = meter.put(torch.tensor([1, 2, 3]))
        table.index_select(0, ids)
        assert meter.costs.bytes["elementwise"] == 2 * 3 * 64 * 2 + 3 * 8  # not the whole table
        other = torch.empty(1000, 64, dtype=torch.bfloat16)
        before = meter.costs.bytes["elementwise"]
        other.add_(table)
        assert meter.costs.bytes["elementwise"] - before == 3 * 1000 * 64 * 2
        assert meter.alive == 2 * 1000 * 64 * 2


def test_ours_moves_and_keeps_less_and_waits_once(priced: dict[str, roofline.Priced]) -> None:
    ours, stock, liger = (priced[variant] for variant in roofline.VARIANTS)
    assert ours.layer.bytes["elementwise"] < stock.layer.bytes["elementwise"]
    assert liger.layer.bytes["elementwise"] < stock.layer.bytes["elementwise"]
    assert ours.layer.reads == stock.layer.reads == 0 and ours.whole.reads <= 1
    assert ours.whole.kept < stock.whole.kept  # logits among others
    assert ours.tokens_per_second > stock.tokens_per_second


def test_what_longrope_makes_in_the_first_step_of_a_run_is_not_counted() -> None:
    step = roofline.Step("microsoft/Phi-4-mini-instruct", CARDS["h100"], LENGTHS)
    assert [roofline.price(step, variant).whole.reads for variant in ("ours", "stock")] == [1, 2]


def test_experts_are_counted_by_the_rows_that_they_get(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    native = config("microsoft/Phi-tiny-MoE-instruct")
    layer = roofline.price(roofline.Step("microsoft/Phi-tiny-MoE-instruct", CARDS["h100"], LENGTHS), "ours").layer
    heads = 2 * native.head_dim * (native.num_attention_heads + native.num_key_value_heads)
    experts = native.num_experts_per_tok * 3 * native.intermediate_size
    assert layer.flops["gemm"] == 2 * 2 * len(LENGTHS) * max(LENGTHS) * native.hidden_size * (heads + experts)
    assert roofline.variants("microsoft/Phi-tiny-MoE-instruct") == ("ours", "stock")
    monkeypatch.setattr(sys, "argv", ["roofline", "--card", "t4", "--model", "microsoft/Phi-tiny-MoE-instruct"])
    with pytest.raises(SystemExit):
        roofline.main()
    assert "in bfloat16 alone, which a NVIDIA T4 lacks" in capsys.readouterr().err


def test_four_bits_take_the_products_and_one_buffer() -> None:
    pytest.importorskip("bitsandbytes")
    step = roofline.Step(MINI, CARDS["h100"], (1024, 1024), quantize="nf4")
    whole = roofline.Step(MINI, CARDS["h100"], (1024, 1024))
    for variant in ("ours", "stock"):
        four, sixteen = roofline.price(step, variant).layer, roofline.price(whole, variant).layer
        assert four.flops == sixteen.flops, variant
        assert abs(four.kept - sixteen.kept) < 0.1 * sixteen.kept, variant  # unpacked weights are kept by nobody


@pytest.mark.parametrize("tokens", [4096, pytest.param(512, marks=pytest.mark.long)])
def test_the_next_four_bits_are_unpacked_beside_a_product_and_take_its_bandwidth(tokens: int) -> None:
    """bitsandbytes multiplies 512 rows by packed weights; backwards they are unpacked."""
    pytest.importorskip("bitsandbytes")
    made = {}
    for ahead in (True, False):
        step = roofline.Step(MINI, CARDS["h100"], (tokens,), quantize="nf4", ahead=ahead)
        made[ahead] = roofline.price(step, "ours")
    sixteen = roofline.price(roofline.Step(MINI, CARDS["h100"], (tokens,)), "ours")
    ahead, in_turn = (made[which].layer for which in (True, False))
    assert ahead.bytes == in_turn.bytes and ahead.kernels == in_turn.kernels, "nothing is left out"
    unpacked = in_turn.bytes["elementwise"] - sixteen.layer.bytes["elementwise"]
    weights, passes = sum(rows * columns for rows, columns in MAPS), 2 if tokens == 4096 else 1
    # Half a byte read and two written, and for each 64 a scale in 8 bits made one of 32, shifted, and read.
    assert unpacked == pytest.approx(passes * weights * (0.5 + 2 + (1 + 4 + 8 + 4) / 64), rel=0.01)
    saved = in_turn.seconds["elementwise"] - ahead.seconds["elementwise"]
    assert saved == pytest.approx(unpacked / (STREAM * 3.35e12), rel=0.01)
    if tokens == 4096:  # arithmetic takes longer than the bytes of both
        assert ahead.seconds["gemm"] == in_turn.seconds["gemm"]
        assert made[True].tokens_per_second >= 0.94 * sixteen.tokens_per_second
    else:  # some products wait for memory, and that is shared
        assert in_turn.seconds["gemm"] * 1.05 < ahead.seconds["gemm"] < in_turn.seconds["gemm"] + saved


@pytest.mark.long
def test_without_memory_for_a_second_buffer_four_bits_are_unpacked_in_turn() -> None:
    pytest.importorskip("bitsandbytes")
    tight = replace(CARDS["t4"], memory=4e9)  # a second buffer takes 101 MB
    step = roofline.Step(MINI, tight, (2048,), quantize="nf4")
    assert roofline.price(step, "ours").layer == roofline.price(replace(step, ahead=False), "ours").layer


def test_what_no_product_hides_is_counted_at_the_end() -> None:
    meter = Meter(CARDS["h100"])
    meter.aside = True
    meter.note("elementwise", 0.0, 3.35e9)
    meter.aside = False
    assert not meter.costs.seconds["elementwise"] and meter.costs.bytes["elementwise"] == 3.35e9
    meter.ended()
    assert meter.costs.seconds["elementwise"] == pytest.approx(1e-3 / STREAM)
    assert meter.costs.bytes["elementwise"] == 3.35e9 and meter.costs.kernels == 1


def test_the_command_ends_with_one_line_of_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (
        "--card 4090 --tokens 257 --documents 2 --model embedded:tiny-phi3 --rank 4 --no-graphs --json --operators 2"
    )
    monkeypatch.setattr(sys, "argv", ["roofline", *words.split()])
    assert roofline.main() == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("computed, not measured: embedded:tiny-phi3 on one NVIDIA GeForce RTX 4090, 257 tokens")
    times = [float(each.split()[0]) for each in said if " us  " in each]
    assert len(times) == 3 * 2 and times[0] >= times[1] > 0, "the two longest of each variant, the longest first"
    line = json.loads(said[-1])
    assert set(line) == {"ours", "stock", "stock+liger"}
    for row in line.values():
        assert row["tokens_per_second"] > 0 and row["bytes_per_token"] > 0
    assert [row["syncs"] for row in line.values()] == [1, 2, 5]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--card h1000", "invalid choice: 'h1000' (choose from"),
        ("--tokens 0", "expected a whole number of at least 1, got '0'"),
        ("--documents -1", "expected a whole number of at least 1, got '-1'"),
        ("--rank 1.5", "expected a whole number of at least 1, got '1.5'"),
        ("--operators -1", "expected a whole number of at least 0, got '-1'"),
        ("--supervised nan", "expected a share above 0 and up to 1, got 'nan'"),
        ("--supervised most", "expected a share above 0 and up to 1, got 'most'"),
        ("--tokens 3", "3 tokens cannot be divided into 4 documents"),
    ],
)
def test_what_cannot_be_priced_is_an_error_of_one_line(
    words: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["roofline", *words.split()])
    with pytest.raises(SystemExit, match="2"):
        roofline.main()
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_compiled_stock_code_is_one_graph() -> None:
    assert roofline.graph_count("stock") == 1


def test_arithmetic_of_a_token_and_names_of_cards() -> None:
    """The counts of docs/performance.md: 2N forwards, 2N backwards, half of the attention."""
    native = config(MINI)
    kept, recomputed = (flops_per_token(native, 16, (2048,) * 4, again) for again in (False, True))
    assert kept == pytest.approx(16.45e9, rel=0.02) and recomputed == pytest.approx(24.15e9, rel=0.03)
    assert card_of("NVIDIA H100 80GB HBM3") == CARDS["h100"] and card_of("Tesla T4") == CARDS["t4"]
    assert card_of("NVIDIA GeForce RTX 4090") == CARDS["4090"] and card_of("NVIDIA L40S") is None
