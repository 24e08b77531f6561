"""`python -m benchmarks.roofline`: the ceiling of a training step on a card, computed, not measured: no card is needed.

    python -m benchmarks.roofline --card h100
    python -m benchmarks.roofline --card 4090 --model microsoft/Phi-4-mini-instruct --tokens 2048 --checkpointing
    python -m benchmarks.roofline --card h200 --quantize nf4 --operators 12 --json

The real code of ours and of stock (Trainer + PEFT) runs forwards and backwards on tensors without values, and each
operator is priced: FLOPs over what matrix products reach, or bytes over what memory gives, whichever takes longer, and
no gaps between kernels. A layer is what a model of three layers costs beyond one of two: the last one of ours works on
fewer positions, and the first passes no gradient on. `stock+liger` is stock code with Liger's kernels by what they read
and write; they are computed whether liger-kernel is installed or not.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from benchmarks.cards import CARDS, CardFacts
from benchmarks.costs import KINDS, Costs, Meter
from benchmarks.fake_card import on_a_card
from benchmarks.fake_step import batch, build, fast, items, loss, settle
from benchmarks.liger_costs import liger
from benchmarks.sizes import SIZES, config
from phi3_lora_plugin.speed.prefetch import fits_twice
from phi3_lora_plugin.speed.proved_prefetch import start

_LEARNING = 4  # steps after which the order of the weights is known
VARIANTS = ("ours", "stock", "stock+liger")


@dataclass(frozen=True)
class Step:
    """What is priced: a model on a card, the documents of a step, LoRA on all projections."""

    model: str
    card: CardFacts
    lengths: tuple[int, ...]
    rank: int = 16
    supervised: float = 0.45
    quantize: str = "none"
    checkpointing: bool = False
    ahead: bool = True
    """Whether ours unpacks the next NF4 weight while a product runs; a card decides that by a trial."""


@dataclass(frozen=True)
class Priced:
    """A step of one variant: all of it, and one layer of it. Bytes kept are those of activations before backward."""

    layers: int
    tokens: int
    layer: Costs
    whole: Costs

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / sum(self.whole.seconds.values())


def arguments() -> argparse.ArgumentParser:
    """What may be asked for on the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--card", choices=CARDS, default="h100")
    parser.add_argument("--model", choices=SIZES, metavar="MODEL",
                        default="microsoft/Phi-3-mini-4k-instruct", help="of a preset, by hub id")  # fmt: skip
    parser.add_argument("--tokens", type=_count_of(1), default=4096, help="in a step, without padding")
    parser.add_argument("--documents", type=_count_of(1), default=4, help="that they are divided into")
    parser.add_argument("--rank", type=_count_of(1), default=16)
    parser.add_argument("--supervised", type=_share, default=0.45, help="share of tokens with a label")
    parser.add_argument("--quantize", choices=["none", "nf4"], default="none")
    parser.add_argument("--in-turn", action="store_true", help="ours unpacks NF4 weights when they are wanted")
    parser.add_argument("--checkpointing", action="store_true", help="each layer's forward runs twice")
    parser.add_argument("--operators", type=_count_of(0), default=0, metavar="N", help="list the N longest of a layer")
    parser.add_argument("--no-graphs", action="store_true", help="ask torch.compile for no graphs, which takes 10 s")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    return parser


def _count_of(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {text!r}")
        return int(text)

    return read


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"expected a share above 0 and up to 1, got {text!r}")
    return share


def main() -> int:
    """Print the table."""
    parser = arguments()
    chosen = parser.parse_args()
    if _experts(chosen.model) and not CARDS[chosen.card].bfloat16:
        parser.error(
            f"{chosen.model} multiplies its experts in bfloat16 alone, which a {CARDS[chosen.card].title} lacks"
        )
    if chosen.documents > chosen.tokens:
        parser.error(f"{chosen.tokens} tokens cannot be divided into {chosen.documents} documents")
    if chosen.quantize == "nf4" and find_spec("bitsandbytes") is None:
        parser.error("--quantize nf4 runs the layers of bitsandbytes: pip install bitsandbytes")
    short, more = divmod(chosen.tokens, chosen.documents)
    lengths = (short + 1,) * more + (short,) * (chosen.documents - more)
    step = Step(chosen.model, CARDS[chosen.card], lengths, chosen.rank, chosen.supervised, chosen.quantize,
                chosen.checkpointing, not chosen.in_turn)  # fmt: skip
    print(f"computed, not measured: {chosen.model} on one {step.card.title}, {sum(lengths):,} tokens in "
          f"{len(lengths)} documents, LoRA r{step.rank}, {'NF4' if step.quantize == 'nf4' else _dtype(step.card)}"
          f"{', checkpointing' if step.checkpointing else ''}")  # fmt: skip
    print("a layer: ms of matrix products, LoRA's, attention, elementwise; GB moved; TFLOP; kernels")
    lines: dict[str, Any] = {}
    for variant in variants(step.model):
        priced = price(step, variant)
        graphs = None if chosen.no_graphs or variant == "stock+liger" else graph_count(variant)
        lines[variant] = summary(priced, graphs)
        layer = priced.layer
        times = " ".join(f"{1000 * layer.seconds[kind]:6.2f}" for kind in KINDS)
        print(
            f"{variant:<12}{times}  {sum(layer.bytes.values()) / 1e9:6.2f} GB {sum(layer.flops.values()) / 1e12:6.2f} "
            f"TFLOP {layer.kernels:5.0f} kernels | ceiling {priced.tokens_per_second:>8,.0f} tokens/s, "
            f"{priced.whole.kept / priced.tokens / 1e6:5.2f} MB a token, {priced.whole.reads:.0f} waits"
            f"{'' if graphs is None else f', {graphs} graphs'}"
        )
        for name, seconds in layer.operators.most_common(chosen.operators):
            print(f"    {1e6 * seconds:8.1f} us  {name}")
    print("stock+liger is computed from what Liger's kernels read and write; it has none for phimoe")
    if chosen.json:
        print(json.dumps(lines))
    return 0


def variants(model: str) -> tuple[str, ...]:
    """Those that there are of a model: Liger knows no phimoe."""
    return VARIANTS[:2] if _experts(model) else VARIANTS


def _experts(model: str) -> bool:
    return "num_local_experts" in SIZES[model]


def summary(priced: Priced, graphs: int | None = None) -> dict[str, Any]:
    """The figures of a variant, plain: of the whole step unless named `layer`; bytes a token are those kept."""
    return {
        "tokens_per_second": priced.tokens_per_second,
        "bytes_per_token": priced.whole.kept / priced.tokens,
        "syncs": round(priced.whole.reads),
        "graphs": graphs,
        "kernels": round(priced.whole.kernels),
        "layer": {
            "seconds": dict(priced.layer.seconds),
            "bytes": dict(priced.layer.bytes),
            "flops": dict(priced.layer.flops),
            "kernels": round(priced.layer.kernels),
        },
    }


def price(step: Step, variant: str) -> Priced:
    """Run two and three layers of the real code without values, and extend to all layers."""
    two, three = (_count(step, variant, layers) for layers in (2, 3))
    layers = int(SIZES[step.model]["num_hidden_layers"])
    layer = three - two
    return Priced(layers, sum(step.lengths), layer, two.plus(layer, layers - 2))


def _dtype(card: CardFacts) -> str:
    return "bfloat16" if card.bfloat16 else "float16"


def _count(step: Step, variant: str, layers: int) -> Costs:
    dtype = getattr(torch, _dtype(step.card))
    lora = dict(targets="all-linear", r=step.rank, alpha=2 * step.rank)
    native = config(step.model, layers)
    model = build(native, lora, dtype=dtype, quantize=step.quantize, checkpointing=step.checkpointing)
    meter = Meter(step.card, step.rank)
    if variant == "ours":
        fast(model, "auto", meter.device, flash=step.card.bfloat16)
    rows = batch(step.lengths, step.supervised, packed=variant == "ours" and not _experts(step.model))
    ahead = variant == "ours" and step.quantize == "nf4" and step.ahead and _fits_twice(model, step.card, dtype)
    with on_a_card(meter), liger(model, meter) if variant == "stock+liger" else nullcontext():
        settle(model)
        inputs = meter.put(rows)
        if ahead:
            start(model)
        for _ in range(_LEARNING if ahead else 1):  # what is done once a run is not counted
            loss(model, inputs, items(rows), dtype).backward()
        model.zero_grad()
        meter.again()
        reads, before = len(meter.reads) + len(meter.copies), meter.alive
        total = loss(model, inputs, items(rows), dtype)
        meter.costs.kept = meter.alive - before
        total.backward()
        meter.ended()
    meter.costs.reads = len(meter.reads) + len(meter.copies) - reads
    return meter.costs


def _fits_twice(model: Any, card: CardFacts, dtype: torch.dtype) -> bool:
    packed = [module for module in model.modules() if type(module).__name__ == "Linear4bit" and hasattr(module, "bias")]
    largest = max(module.in_features * module.out_features for module in packed if hasattr(module, "compute_dtype"))
    return fits_twice(largest * dtype.itemsize, int(card.memory))


def graph_count(variant: str) -> int:
    """Graphs that `torch.compile` makes of a small model on the CPU: one, and one more for each break."""
    import torch._dynamo

    from phi3_lora_plugin.lora.inject import add_lora
    from phi3_lora_plugin.speed.apply import speed_up

    sizes = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=4, vocab_size=300)
    small = config("microsoft/Phi-3-mini-4k-instruct", 2, **sizes)
    from transformers import Phi3ForCausalLM

    model = add_lora(Phi3ForCausalLM(small), "all-linear", 4, 8).train()
    if variant == "ours":
        speed_up(model)
    rows = batch((24, 17), packed=variant == "ours")
    torch._dynamo.reset()
    try:
        return int(torch._dynamo.explain(model)(**rows, num_items_in_batch=items(rows)).graph_count)
    finally:
        torch._dynamo.reset()


if __name__ == "__main__":
    sys.exit(main())
