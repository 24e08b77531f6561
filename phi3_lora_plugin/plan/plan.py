"""What a run would take before it is started: parameters, bytes at the worst moment, steps, and whether it fits.

Tensors come from a dry run of the real code (`dry_run`), the memory available and what else is needed from `machine`.
`python -m benchmarks.memory` compares the sum with real runs.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from phi3_lora_plugin.model.base_size import BaseSize, base_size, size_of_config, weight_shapes
from phi3_lora_plugin.model.precision import choose
from phi3_lora_plugin.plan.checkpointing import choose_checkpointing, is_auto
from phi3_lora_plugin.plan.feed import Lengths, evaluation_batch, feed
from phi3_lora_plugin.plan.machine import Machine, machine, memory_of, planned_device
from phi3_lora_plugin.training.checkpointing import checkpointing_of

if TYPE_CHECKING:
    from phi3_lora_plugin.model.device import Device
    from phi3_lora_plugin.plan.extend import Footprint
    from phi3_lora_plugin.plan.live import Moment
    from phi3_lora_plugin.recipe import Recipe


@dataclass(frozen=True)
class Plan:
    """What a run would take, in bytes.

    `allocator` is what it holds in pieces, `workspaces` what kernels keep for themselves, `memory` what there is (None
    where that is not known) and `margin` the part of it to leave free. `recomputed` says in words which layers run
    forward again in the backward pass (`every_n_layers`, 0 for none, and `offload`), `chosen` why, if `auto` did it.
    """

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
    workspaces: int
    allocator: int
    peak: int
    when: str
    phases: dict[str, int]
    checkpoint: int
    resume: int
    batch: int
    accumulation: int
    packing: bool
    checkpointing: bool
    every_n_layers: int
    offload: bool
    recomputed: str
    recomputed_share: float
    chosen: str | None
    width: int
    rows: int | None
    tokens_per_step: int
    steps: int | None
    tokens: int | None
    memory: int | None
    margin: int
    fits: bool | None

    def to_json(self) -> str:
        """One line of JSON with every field."""
        return json.dumps(asdict(self))

    def fits_into(self, memory: int) -> bool:
        """Whether `memory` is enough, with as large a share of it left free as here."""
        share = self.margin / self.memory if self.memory else 0.0
        return self.peak <= memory * (1 - share)


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
        memory: bytes available; if not given, what this machine has for `device`, or else the card that the recipe is
            meant for (`about.memory`).
        device: "cpu", "cuda", "mps" or "xpu"; "auto" is where `phi3-lora train` would train here.
        config: native config of the model, if its config.json is not at `model.path`.
        lengths: of the encoded rows (`encoded_lengths`); rows of `data.max_length` if not given.
        program: bytes of the process itself; measured here if not given.

    Raises:
        ModelError, UnsupportedModel, TargetError, PlanError: wrong input.
    """
    from phi3_lora_plugin.model.families import row_limit
    from phi3_lora_plugin.model.published import read_planning_config
    from phi3_lora_plugin.plan.dry_run import dry_runs
    from phi3_lora_plugin.training.arguments import lora_options, training_arguments

    place = planned_device(recipe, device)
    if config is None:
        config = read_planning_config(recipe.model.path, recipe.model.revision)
    longest = row_limit(recipe.data.max_length, config.to_dict())
    precision = choose(recipe.model.dtype, place, _size(recipe, config), recipe.model.quantize)
    # A card's settings cannot be constructed without one; the dry run is told what it would cast.
    arguments = training_arguments(recipe, device=place, use_cpu=True, bf16=False, fp16=False)
    mixed = next((name for name in ("bf16", "fp16") if recipe.training.get(name)), precision.mixed)
    accumulation, rows = int(arguments.gradient_accumulation_steps), int(arguments.per_device_train_batch_size)
    fed = feed(lengths, rows, longest, recipe.data.packing)
    evaluates = recipe.data.eval_path is not None or recipe.data.eval_split is not None or recipe.data.eval_fraction > 0
    takes = machine(place, program)
    memory = memory if memory is not None else memory_of(recipe, place)
    runs = dry_runs(
        config,
        lora_options(recipe),
        arguments,
        fed.largest,
        dtype=precision.torch_dtype,
        mixed=mixed,
        quantize=recipe.model.quantize,
        speed=recipe.speed,
        attention="eager" if recipe.model.attention == "eager" else "sdpa",  # flash keeps what sdpa keeps
        evaluate=evaluation_batch(lengths, int(arguments.per_device_eval_batch_size), longest) if evaluates else None,
        device=place.kind,
        memory=memory if recipe.model.quantize == "nf4" else None,
    )
    workspaces = takes.workspaces
    if place.kind != "cpu":
        workspaces += _attention_copies(config, fed.largest.tokens, precision.torch_dtype.itemsize)

    def peaks(found: Footprint) -> dict[str, int]:
        loading = takes.program + _loading(recipe, found, place, config, precision.weights)
        return {moment.phase: _peak(takes, workspaces, moment) for moment in found.moments} | {"load": loading}

    layers = int(config.num_hidden_layers)
    chosen = None
    if is_auto(recipe):
        chosen = choose_checkpointing(
            recipe, layers, place.kind, lambda each: max(peaks(runs(each)).values()), memory, takes.margin
        )
    checkpointing = chosen.checkpointing if chosen else checkpointing_of(arguments)
    found = runs(checkpointing)
    moments, phases = {moment.phase: moment for moment in found.moments}, peaks(found)
    when = max(phases, key=lambda phase: phases[phase])
    at_load = dict.fromkeys(moments["load"].bytes, 0) | {"base": phases["load"] - takes.program}
    worst = moments[when].bytes if when != "load" else at_load
    margin = 0 if memory is None else round(takes.margin * memory)
    per_step = fed.tokens_per_batch * accumulation
    steps = _steps(fed.batches, arguments, accumulation)
    return Plan(
        recipe=recipe.name,
        model=recipe.model.path,
        device=place.kind,
        dtype=precision.weights,
        quantize=recipe.model.quantize,
        parameters=found.parameters,
        trainable_parameters=found.trainable,
        program=takes.program,
        **worst,
        workspaces=workspaces if when != "load" else 0,
        allocator=_held(takes, moments[when]) if when != "load" else 0,
        peak=phases[when],
        when=when,
        phases=phases,
        checkpoint=found.adapter_bytes,
        resume=found.optimizer_bytes,
        batch=rows,
        accumulation=accumulation,
        packing=recipe.data.packing,
        checkpointing=checkpointing.every > 0,
        every_n_layers=checkpointing.every,
        offload=checkpointing.offload,
        recomputed=checkpointing.wording(layers),
        recomputed_share=sum(checkpointing.layers(layers)) / max(1, layers),
        chosen=chosen.why if chosen else None,
        width=fed.largest.width,
        rows=None if lengths is None else len(lengths.train),
        tokens_per_step=per_step,
        steps=steps,
        tokens=None if steps is None else _tokens(lengths, steps, per_step, arguments),
        memory=memory,
        margin=margin,
        fits=None if memory is None else phases[when] + margin <= memory,
    )


def _peak(takes: Machine, workspaces: int, moment: Moment) -> int:
    return takes.program + workspaces + moment.total + _held(takes, moment)


def _held(takes: Machine, moment: Moment) -> int:
    """Bytes that the allocator holds in pieces; frozen weights come once and stay."""
    comes = moment.total - moment.bytes["base"]
    return round(takes.slack * comes) + min(takes.pieces, comes)


def _attention_copies(config: Any, tokens: int, itemsize: int) -> int:
    """Bytes of queries, keys and values of one layer: kernels for cards may need another layout."""
    size = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    return int(tokens * size * (config.num_attention_heads + 2 * config.num_key_value_heads) * itemsize)


def _size(recipe: Recipe, config: Any) -> BaseSize:
    """Of the files where they are here, else as the config has it."""
    return base_size(recipe.model.path, recipe.model.revision) or size_of_config(config.to_dict())


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


def _loading(recipe: Recipe, found: Footprint, device: Device, config: Any, weights: str) -> int:
    """Bytes of the base while it is loaded: files are mapped; what is converted is read tensor by tensor."""
    saved = _size(recipe, config).dtype
    if device.kind != "cpu" or saved is None or (weights == saved and recipe.model.quantize == "none"):
        return found.base_bytes
    largest = max(prod(shape) for shape in weight_shapes(config.to_dict()).values())
    return int(found.base_bytes + largest * (4 if saved == "float32" else 2))
