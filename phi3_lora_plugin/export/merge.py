"""Fold an adapter into its base, shard by shard, and prove the result before it takes its place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi3_lora_plugin.export.merge_check import check_written, compare_logits, fits, quantization_loss
from phi3_lora_plugin.export.merge_module import MergeError as MergeError
from phi3_lora_plugin.export.merge_plan import VerificationError as VerificationError
from phi3_lora_plugin.export.merge_plan import merged_tensors, plan_merge
from phi3_lora_plugin.lora.finite import is_finite
from phi3_lora_plugin.lora.text_side import refuse_merging
from phi3_lora_plugin.lora_files.peft_files import read_peft
from phi3_lora_plugin.model.families import repair_rope
from phi3_lora_plugin.model.folder import model_folder, published_stops, read_json
from phi3_lora_plugin.model.new_files import staged
from phi3_lora_plugin.model.quantize import quantized_by
from phi3_lora_plugin.model.shards import ShardWriter, Weights, copy_tokenizer, write_json
from phi3_lora_plugin.model.tokenizer import load_tokenizer, stop_token_ids
from phi3_lora_plugin.wording import human

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes:
        out: the folder of the merged model.
        merged: how many weights the adapter changed, and `copied` how many it left.
        dtype: of the written weights.
        files, total_bytes: of the written weights.
        module_difference: largest difference of a merged module's output from PEFT's forward pass, on random inputs.
        logit_difference: largest difference of the whole model's logits from PEFT's, or None if not compared.
        adapter_effect: by how much the adapter moves the logits at most, or None if not compared.
        notes: what else a person should know.
    """

    out: Path
    merged: int
    copied: int
    dtype: str
    files: int
    total_bytes: int
    module_difference: float
    logit_difference: float | None
    adapter_effect: float | None
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """The report for people, one sentence a line."""
        text = [
            f"merged {self.merged} weights, copied {self.copied}: {human(self.total_bytes)} of {self.dtype}, "
            f"{self.files} file(s)",
            f"each merged module against PEFT's forward pass: largest difference {self.module_difference:.2e}",
        ]
        if self.logit_difference is None:
            text.append("logits of the whole model were not compared")
        else:
            text.append(
                f"logits against PEFT's model: largest difference {self.logit_difference:.2e} "
                f"(the adapter moves them by up to {self.adapter_effect:.2e})"
            )
        return text + [f"note: {note}" for note in self.notes]


def merge(
    adapter: str | Path,
    base: str | Path | None,
    out: str | Path,
    dtype: str = "auto",
    max_shard: str | int = "2GB",
    *,
    overwrite: bool = False,
    check: str = "auto",
    untie: bool = False,
    quantized: str = "auto",
    dequantize: bool = False,
) -> MergeReport:
    """Write base + adapter as one model: `W + scaling * B @ A` in float32, then rounded to `dtype`.

    The arithmetic is PEFT's own, module by module, so every kind of LoRA that PEFT can merge is merged as there. The
    folder appears under its name only when everything in it was checked.

    Args:
        adapter: an adapter folder, a checkpoint, or a run.
        base: the unquantised base; None for the one that the adapter names.
        dtype: of the written weights; `auto` is the base's.
        max_shard: size of one file, and about the memory that is needed.
        check: `logits` compares the whole model with PEFT's (needs it in memory in float32), `modules` compares each
            merged module, `auto` does the first where it fits.
        untie: write head and embeddings separately where the adapter trained only one of two tied ones.
        quantized: how the base was quantised in training (`none`, `nf4`, `int8`), to measure what merging onto the
            unquantised one changes; `auto` asks the adapter's manifest.
        dequantize: merge onto the values that the quantised base had in training instead of the published ones.

    Raises:
        MergeError, ModelError, PeftFilesError: what is wrong; nothing was written.
        VerificationError: the result was not what it should be; nothing was written.
    """
    import torch

    from phi3_lora_plugin.store.adapter_folder import read_adapter

    if dtype not in DTYPES or check not in ("auto", "logits", "modules"):
        raise MergeError(f"dtype {dtype!r}, check {check!r}: expected one of {DTYPES} and of auto, logits, modules")
    found = read_adapter(adapter)
    how = found.quantize if quantized == "auto" else quantized
    folder = found.folder
    peft = read_peft(folder)
    source = model_folder(*((base, None) if base else found.base))
    config = read_json(source / "config.json")
    if method := quantized_by(config):
        raise MergeError(
            f"{source} is quantised ({method}): adding to rounded weights and rounding them again loses much of the "
            "adapter; merge onto the unquantised base, with --base"
        )
    if why := refuse_merging(config):
        raise MergeError(f"{folder}: {why}")
    weights = Weights(source)
    plan = plan_merge(peft, weights, config, untie)
    if how not in ("none", "nf4", "int8") or (dequantize and how == "none"):
        raise MergeError(
            f"quantized {how!r}: expected nf4 or int8" if dequantize else f"quantized {how!r}: expected none, nf4, int8"
        )
    target = weights.floating_type() if dtype == "auto" else dtype
    notes = list(peft.notes)

    with staged(Path(out), overwrite) as stage:
        writer = ShardWriter(stage, max_shard)
        merged, worst = 0, 0.0
        for name, tensor, changed, difference in merged_tensors(
            peft.config, plan, weights, config, how if dequantize else "none"
        ):
            final = tensor.to(getattr(torch, target)) if tensor.is_floating_point() else tensor
            if not is_finite(final):
                raise MergeError(
                    f"{name}: merged values are not finite in {target}; the adapter is broken, or use bfloat16"
                )
            writer.add(name, final)
            merged, worst = merged + changed, max(worst, difference)
        files = writer.close()
        _write_settings(stage, source, folder, config, target, plan.untied)
        check_written(stage, weights, plan.untied)
        difference, effect = None, None
        if check == "logits" or (check == "auto" and fits(writer.total, target)):
            difference, effect = compare_logits(stage, source, folder, target, how if dequantize else "none")
        elif check == "auto":
            notes.append("the model does not fit into memory in float32, so only its modules were compared")
        if how != "none":
            notes.append(quantization_loss(stage, source, folder, how, dequantize))
        if plan.untied:
            notes.append("untied head and embeddings (tie_word_embeddings: false)")
    return MergeReport(
        Path(out),
        merged,
        len(weights) - merged + plan.untied,
        target,
        files,
        writer.total,
        worst,
        difference,
        effect,
        tuple(notes),
    )


def _write_settings(
    stage: Path, source: Path, adapter: Path, config: Mapping[str, Any], dtype: str, untied: bool
) -> None:
    """config.json, generation_config.json with the stop tokens, and the tokenizer; none asks for remote code."""
    settings = {name: value for name, value in portable_config(config).items() if name != "_name_or_path"}
    settings["dtype" if "dtype" in settings else "torch_dtype"] = dtype
    if untied:
        settings["tie_word_embeddings"] = False
    write_json(stage / "config.json", settings)
    copy_tokenizer([adapter, source], stage)
    write_generation_config(stage, source, settings)


def portable_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A model's config.json for a folder that any host reads: no remote code, and longrope by the name it has now.

    Raises:
        RopeError: rotary settings that no host would compute right.
    """
    repair_rope(config)
    settings = {name: value for name, value in config.items() if name != "auto_map"}
    for name in ("rope_scaling", "rope_parameters"):
        rope = settings.get(name)
        if rope:  # kept in the layout it has, since older hosts read only that
            old = {"su": "longrope", "yarn": "longrope"}
            settings[name] = {
                key: old.get(value, value) if key in ("type", "rope_type") else value for key, value in rope.items()
            }
    return settings


def write_generation_config(stage: Path, source: Path, config: Mapping[str, Any]) -> None:
    """The base's generation settings, whose eos ids include every token that ends a turn of this tokenizer."""
    path = source / "generation_config.json"
    settings = read_json(path) if path.is_file() else {
        name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if config.get(name) is not None
    }  # fmt: skip
    known = published_stops(settings, config)
    if (stage / "tokenizer.json").is_file():
        tokenizer = load_tokenizer(stage)
        known = stop_token_ids(tokenizer, [token for token in known if token != tokenizer.pad_token_id])
        settings["pad_token_id"] = tokenizer.pad_token_id  # one that does not stop, unlike the published
    if known:
        settings["eos_token_id"] = known if len(known) > 1 else known[0]
    write_json(stage / "generation_config.json", settings)
