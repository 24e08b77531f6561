"""What a run would take before it is started: parameters, bytes at the worst moment, steps, and whether it fits.

Tensors come from a dry run of the real code (`dry_run`), the size of the program from this process once it has trained
something tiny, what malloc holds from its rules (`heap`, which has the one number that was chosen by measuring).
`python -m benchmarks.memory` holds the sum against real runs.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi3_lora_plugin.error import Phi3LoraError

if TYPE_CHECKING:
    from phi3_lora_plugin.plan.dry_run import Batch, Footprint
    from phi3_lora_plugin.recipe import Recipe

#: What CUDA, cuBLAS and the kernels take on a card before the first tensor. Read from published figures, not measured.
CUDA_CONTEXT = 500_000_000
_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30}


class PlanError(Phi3LoraError):
    """A plan that cannot be made as asked; says what would make it possible."""


@dataclass(frozen=True)
class Plan:
    """What a run would take. Sizes are in bytes; `memory` is what there is, None where that is not known."""

    recipe: str
    model: str
    device: str
    dtype: str
    quantize: str
    parameters: int
    trainable_parameters: int
    program: int
    base: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    held: int
    peak: int
    when: str
    phases: dict[str, int]
    checkpoint: int
    resume: int
    batch: int
    accumulation: int
    packing: bool
    checkpointing: bool
    width: int
    rows: int | None
    tokens_per_step: int
    steps: int | None
    tokens: int | None
    memory: int | None
    fits: bool | None

    def to_json(self) -> str:
        """One line of JSON with every field."""
        return json.dumps(asdict(self))


def size(text: str) -> int:
    """Bytes of `24GB`, `24 GiB`, `500MB`; a bare number is bytes.

    Raises:
        PlanError: not a size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?b?)\s*", text.lower())
    unit = "" if not found else found[2] if found[2].endswith("b") else f"{found[2]}b"
    if not found or unit not in _UNITS or float(found[1]) == 0:
        raise PlanError(f"memory: {text!r} is no size; write 24GB, 16GiB or 500MB")
    return int(float(found[1]) * _UNITS[unit])


def plan(
    recipe: Recipe,
    memory: int | None = None,
    device: str = "auto",
    config: Any = None,
    lengths: Lengths | None = None,
    program: int | None = None,
) -> Plan:
    """Work out what a recipe takes; nothing is downloaded and no weights are read.

    Args:
        memory: bytes that there are; what this machine has for `device` if not given, or else the card that the recipe
            is meant for (`about.memory`).
        device: "cpu" or "cuda"; "auto" is where `phi3-lora train` would train here.
        config: native config of the model, if its config.json is not where `model.path` says.
        lengths: of the encoded rows (`encoded_lengths`); rows of `data.max_length` if not given.
        program: bytes of the process itself; measured here if not given.

    Raises:
        ModelError, UnsupportedModel, TargetError, PlanError: wrong input.
    """
    from phi3_lora_plugin.model.config import read_config
    from phi3_lora_plugin.model.families import row_limit
    from phi3_lora_plugin.model.folder import find_config
    from phi3_lora_plugin.plan.dry_run import footprint
    from phi3_lora_plugin.training.arguments import checkpoints_activations, lora_options, training_arguments

    device = _device(recipe, device)
    if config is None:
        config = read_config(find_config(recipe.model.path, recipe.model.revision))
    longest = row_limit(recipe.data.max_length, config.to_dict())
    dtype = _dtype(recipe, device)
    arguments = training_arguments(recipe, **_precision(recipe, device, dtype))
    accumulation, rows = int(arguments.gradient_accumulation_steps), int(arguments.per_device_train_batch_size)
    feed = _feed(lengths, rows, longest, recipe.data.packing)
    evaluates = recipe.data.eval_path is not None or recipe.data.eval_split is not None or recipe.data.eval_fraction > 0
    evaluation = _evaluation(lengths, int(arguments.per_device_eval_batch_size), longest) if evaluates else None
    if program is None:
        program = CUDA_CONTEXT if device == "cuda" else program_bytes()
    found = footprint(
        config,
        lora_options(recipe),
        arguments,
        feed.largest,
        dtype=dtype,
        quantize=recipe.model.quantize,
        speed=recipe.speed,
        attention="eager" if recipe.model.attention == "eager" else "sdpa",  # flash keeps what sdpa keeps
        evaluate=evaluation,
        others=feed.others if device == "cpu" else (),
    )
    loading = _loading(recipe, found, device, config)
    held = found.held if device == "cpu" else 0
    phases = {moment.phase: program + held + moment.total for moment in found.moments}
    phases["load"] = program + loading
    when = max(phases, key=lambda phase: phases[phase])
    worst = next(moment for moment in found.moments if moment.phase == when).bytes if when != "load" else {}
    peak = phases[when]
    memory = memory if memory is not None else _memory(recipe, device)
    steps = _steps(feed.batches, arguments, accumulation)
    per_step = feed.tokens_per_batch * accumulation
    return Plan(
        recipe=recipe.name,
        model=recipe.model.path,
        device=device,
        dtype=str(dtype).removeprefix("torch."),
        quantize=recipe.model.quantize,
        parameters=found.parameters,
        trainable_parameters=found.trainable,
        program=program,
        base=worst.get("base", loading),
        adapter=worst.get("adapter", 0),
        gradients=worst.get("gradients", 0),
        optimizer=worst.get("optimizer", 0),
        activations=worst.get("activations", 0),
        logits=worst.get("logits", 0),
        held=held if when != "load" else 0,
        peak=peak,
        when=when,
        phases=phases,
        checkpoint=found.adapter_bytes,
        resume=found.optimizer_bytes,
        batch=rows,
        accumulation=accumulation,
        packing=recipe.data.packing,
        checkpointing=checkpoints_activations(arguments),
        width=feed.largest.width,
        rows=None if lengths is None else len(lengths.train),
        tokens_per_step=per_step,
        steps=steps,
        tokens=None if steps is None else _tokens(lengths, steps, per_step, arguments),
        memory=memory,
        fits=None if memory is None else peak <= memory,
    )


@dataclass(frozen=True)
class Lengths:
    """Tokens and supervised tokens of each encoded row, to train on and to evaluate on."""

    train: tuple[int, ...]
    supervised: tuple[int, ...]
    eval: tuple[int, ...] = ()


def encoded_lengths(recipe: Recipe, adapters: Any, config: Any) -> Lengths:
    """Read and encode the data of a recipe, as the run would, and say how long the rows are; raises as `load_data`."""
    from phi3_lora_plugin.chat.dataset import load_data
    from phi3_lora_plugin.chat.rows import lengths as row_lengths
    from phi3_lora_plugin.model.families import row_limit
    from phi3_lora_plugin.model.tokenizer import load_tokenizer

    longest = row_limit(recipe.data.max_length, config.to_dict())
    tokenizer = load_tokenizer(recipe.model.path, recipe.model.revision)
    data = load_data(recipe, tokenizer, adapters, max_length=longest, cache=True)
    rows = data.train
    return Lengths(
        tuple(row_lengths(rows)),
        tuple(sum(label != -100 for label in labels) for labels in rows["labels"]),
        () if data.eval is None else tuple(row_lengths(data.eval)),
    )


def program_bytes() -> int:
    """Resident bytes of this process once it has trained something tiny: libraries, threads, nothing of a model."""
    import tempfile

    import torch
    from transformers import Phi3Config, Phi3ForCausalLM, Trainer, TrainingArguments, set_seed

    from phi3_lora_plugin.lora.inject import add_lora

    state = torch.get_rng_state()
    set_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, vocab_size=256)
    model = add_lora(
        Phi3ForCausalLM(Phi3Config(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2)), "o_proj", 4, 8
    )
    rows = [{"input_ids": [5] * 64, "labels": [5] * 64} for _ in range(4)]
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {"output_dir": folder, "max_steps": 2, "per_device_train_batch_size": 2}
        settings |= {"save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True}
        trainer = Trainer(model, TrainingArguments(**settings, logging_steps=10), train_dataset=rows)
        trainer.remove_callback(_printer())
        trainer.train()
    torch.set_rng_state(state)
    return resident_bytes()


def resident_bytes() -> int:
    """Bytes of this process that are in memory now."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def _printer() -> Any:
    from transformers import PrinterCallback

    return PrinterCallback


@dataclass(frozen=True)
class _Feed:
    """The largest micro-batch, some smaller ones, how many there are in an epoch, and tokens (not padding) in one."""

    largest: Batch
    others: tuple[Batch, ...]
    batches: int | None
    tokens_per_batch: int


def _feed(lengths: Lengths | None, rows: int, longest: int, packing: bool) -> _Feed:
    from phi3_lora_plugin.chat.pack import pack
    from phi3_lora_plugin.plan.dry_run import Batch

    if lengths is None:
        return _Feed(Batch((longest,) * rows, 1.0, packing), (), None, rows * longest)
    train, total = lengths.train, sum(lengths.train)
    share = sum(lengths.supervised) / total
    if packing:
        packs = sorted(pack(train, longest), key=lambda members: -sum(train[row] for row in members))
        count = math.ceil(len(packs) / rows)
        made = [
            Batch(tuple(train[row] for members in packs[first : first + rows] for row in members), share, True)
            for first in _spread(len(packs), rows)
        ]
        return _Feed(made[0], tuple(made[1:]), count, total // count)
    order = sorted(train, reverse=True)
    rows = min(rows, len(order))
    count = math.ceil(len(order) / rows)
    # Rows are shuffled: the longest is in some batch, among others that are as rows are.
    made = [Batch(_mixed(order[first:], rows), share) for first in _spread(len(order), rows)]
    return _Feed(_heaviest(order, rows, share), tuple(made[1:]), count, total // count)


def _mixed(order: Sequence[int], rows: int) -> tuple[int, ...]:
    """The longest of some rows sorted by length, and rows from all over them."""
    return tuple(order[int(place * len(order) / rows)] for place in range(rows))


def _heaviest(order: Sequence[int], rows: int, share: float) -> Batch:
    """The batch that a few epochs may bring: as wide as the longest row, the others from the longer half."""
    from phi3_lora_plugin.plan.dry_run import Batch

    return Batch(_mixed(order[: max(rows, len(order) // 2)], rows), share)


def _spread(count: int, rows: int) -> list[int]:
    """Where batches of different sizes begin among rows sorted by length: the largest, and three smaller ones."""
    return [min(int(count * share), max(0, count - rows)) for share in (0.0, 0.35, 0.15, 0.25)]


def _evaluation(lengths: Lengths | None, rows: int, longest: int) -> Batch:
    from phi3_lora_plugin.plan.dry_run import Batch

    if lengths is None or not lengths.eval:
        return Batch((longest,) * rows)
    return Batch(tuple(sorted(lengths.eval, reverse=True)[:rows]), sum(lengths.supervised) / sum(lengths.train))


def _steps(batches: int | None, arguments: Any, accumulation: int) -> int | None:
    if arguments.max_steps > 0:
        return int(arguments.max_steps)
    if batches is None:
        return None
    return int(math.ceil(arguments.num_train_epochs * max(1, math.ceil(batches / accumulation))))


def _tokens(lengths: Lengths | None, steps: int, per_step: int, arguments: Any) -> int:
    if lengths is None or arguments.max_steps > 0:
        return steps * per_step
    return int(arguments.num_train_epochs * sum(lengths.train))


def _loading(recipe: Recipe, found: Footprint, device: str, config: Any) -> int:
    """Bytes of the base while it is loaded: the file is mapped, and beside it stands what had to be converted."""
    import torch

    if device == "cuda":
        return found.base_bytes
    saved = getattr(config, "dtype", None)
    saved = getattr(torch, saved, None) if isinstance(saved, str) else saved
    if saved is None or (found.dtype == saved and recipe.model.quantize == "none"):
        return found.base_bytes
    return found.base_bytes + found.parameters * int(saved.itemsize)


def _precision(recipe: Recipe, device: str, dtype: Any) -> dict[str, Any]:
    """Mixed precision as the run would have it on `device`, which need not be here."""
    import torch

    if device == "cpu" or {"bf16", "fp16"} & set(recipe.training):
        # A card's settings cannot be constructed without one, and cast the same on the CPU.
        return {"use_cpu": True}
    return {"use_cpu": True, "bf16": dtype == torch.bfloat16}


def _dtype(recipe: Recipe, device: str) -> Any:
    import torch

    from phi3_lora_plugin.model.load import weights_dtype

    if device == "cuda" and recipe.model.dtype == "auto" and not torch.cuda.is_available():
        return torch.bfloat16  # every card of the last years computes in it
    return weights_dtype(recipe.model.dtype, device)


def _device(recipe: Recipe, device: str) -> str:
    import torch

    if device not in ("auto", "cpu", "cuda"):
        raise PlanError(f"device: {device!r} is none of auto, cpu, cuda")
    if device != "auto":
        return device
    if recipe.model.device != "auto":
        return str(recipe.model.device)
    return "cuda" if torch.cuda.is_available() else "cpu"


def _memory(recipe: Recipe, device: str) -> int | None:
    """What there is: the card here, else the one that the recipe names; this machine's memory on the CPU."""
    if device == "cpu":
        import psutil

        limit = Path("/sys/fs/cgroup/memory.max")  # of a container
        allowed = limit.read_text().strip() if limit.is_file() else ""
        total = int(psutil.virtual_memory().total)
        return min(total, int(allowed)) if allowed.isdigit() else total
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory)
    found = re.match(r"\d+ GB(?! of RAM)", recipe.about.memory or "")
    return size(found[0]) if found else None
