"""MLX: an adapter for mlx-lm, or the merged model, whole or quantised by mlx-lm."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from phi3_lora_plugin.export.adapted import Adapted
from phi3_lora_plugin.export.exporter import ExportError, Runtime, Shipped, Variant, Wanted, refuse, require
from phi3_lora_plugin.export.merge import portable_config
from phi3_lora_plugin.export.recast import recast
from phi3_lora_plugin.export.scores import ShowsLogits
from phi3_lora_plugin.lora_files import mlx_files, peft_files
from phi3_lora_plugin.model.families import rope_of, row_limit
from phi3_lora_plugin.model.shards import write_json

FORMS = ("8bit", "6bit", "4bit")


def export(adapted: Adapted, wanted: Wanted, folder: Path) -> Shipped:
    """Write an MLX adapter or model; see `exporter`."""
    refuse("mlx", wanted, adapted.config.get("model_type"), kinds=("phi3",), quantize=FORMS,
           dtypes=("float32", "bfloat16", "float16"), one="a folder holds one model")  # fmt: skip
    longrope = mlx_config(adapted.config).get("rope_scaling") is not None
    merged = bool(wanted.quantize) or longrope if wanted.merged is None else wanted.merged
    if not merged and wanted.quantize:
        raise ExportError("mlx: --quantize makes forms of the merged model; leave out --adapter")
    if not merged and longrope:
        raise ExportError(
            "mlx: mlx-lm takes longrope's long factors for every prompt, so an adapter on the published base gets "
            "other answers than in training; pass --merged, which ships the short factors"
        )
    if wanted.prove or wanted.quantize:
        require("mlx", "mlx.core", "mlx_lm", what="an export to MLX")
    notes = []
    if longrope:
        notes.append(
            f"mlx-lm has one set of longrope factors; the short ones are shipped, right up to "
            f"{row_limit(None, adapted.config)} tokens"
        )
    window = adapted.config.get("sliding_window")
    if window and window < int(adapted.config.get("max_position_embeddings") or window):
        notes.append(f"mlx-lm ignores Phi-3's sliding window of {window} tokens, so answers differ beyond it")
    write = _merged if merged else _adapter
    shipped = write(adapted, wanted, folder)
    return Shipped(shipped.commands, shipped.variants, (*shipped.notes, *notes))


def _adapter(adapted: Adapted, wanted: Wanted, folder: Path) -> Shipped:
    found = peft_files.parts(peft_files.read_peft(adapted.adapter))
    if found.full or found.tokens:
        raise ExportError("mlx: weights trained in full or by token are not in an MLX adapter; pass --merged")
    read, told = mlx_config(adapted.config), adapted.config
    odd = [name for name, usual in (("rope_theta", 1e4), ("partial_rotary_factor", 1.0))
           if told.get(name, usual) != read[name]]  # fmt: skip
    if odd:
        raise ExportError(
            f"mlx: the base's config.json has {', '.join(odd)} where only transformers 5 reads it; pass --merged"
        )
    layers = int(adapted.config["num_hidden_layers"])
    mlx_files.write_mlx(folder, found.loras, layers, adapted.base_name)
    variants: tuple[Variant, ...] = ()
    if wanted.prove:
        base = adapted.base_float32()
        write_json(base / "config.json", mlx_config(adapted.config) | {"dtype": "float32"})
        variants = (Variant("float32 base with adapter", partial(open_mlx, base, folder)),)
    line = f"--model {adapted.base_name} --adapter-path {{out}}"
    stops = adapted.tokenizer.convert_ids_to_tokens(sorted(set(adapted.stops()) - set(adapted.published_stops())))
    ends = f" --extra-eos-token {' '.join(map(shlex.quote, stops))}" if stops else ""
    commands = (f"mlx_lm.generate {line}{ends} --prompt 'Hello' --temp 0", f"mlx_lm.server {line}")
    return Shipped(commands, variants, adapted.other_template())


def _merged(adapted: Adapted, wanted: Wanted, folder: Path) -> Shipped:
    wanted.progress("merging")
    exact = adapted.scratch / "mlx"
    shutil.copytree(adapted.merged(), exact)
    write_json(exact / "config.json", mlx_config(adapted.config) | {"dtype": "float32"})
    variants = [Variant("float32", partial(open_mlx, exact, None))] if wanted.prove else []
    dtype = adapted.dtype(wanted.dtype)
    name = wanted.quantize[0] if wanted.quantize else dtype
    wanted.progress(f"writing {name}")
    if wanted.quantize:
        _quantize(exact, folder, int(name.removesuffix("bit")), dtype)
    else:
        recast(exact, folder, dtype)
    if name != "float32" and wanted.prove:
        variants.append(Variant(name, partial(open_mlx, folder, None), exact=False))
    commands = ("mlx_lm.generate --model {out} --prompt 'Hello' --temp 0", "mlx_lm.server --model {out}")
    return Shipped(commands, tuple(variants))


def mlx_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A Phi-3's config.json as mlx-lm reads it: rotary settings by their older names, and the short factors alone.

    Raises:
        RopeError: rotary settings that no host would compute right.
    """
    settings, rope = portable_config(config), rope_of(config)
    settings.pop("rope_parameters", None)
    settings |= {"rope_theta": rope["rope_theta"], "partial_rotary_factor": rope["partial_rotary_factor"]}
    settings["rope_scaling"] = None
    if rope["rope_type"] == "longrope":
        short = list(rope["short_factor"])
        settings["rope_scaling"] = {"type": "longrope", "short_factor": short, "long_factor": short}
        settings["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    return settings


def _quantize(source: Path, folder: Path, bits: int, dtype: str) -> None:
    """mlx-lm's own quantiser, in groups that divide every row."""
    import mlx.core as mx
    from mlx.utils import tree_map
    from mlx_lm.utils import load, quantize_model, save

    model, tokenizer, config = load(str(source), return_config=True)
    model.update(tree_map(lambda array: array.astype(getattr(mx, dtype)), model.parameters()))
    rows = [layer.mlp.down_proj.weight.shape[1] for layer in model.layers[:1]] + [config["hidden_size"]]
    group = 64 if all(length % 64 == 0 for length in rows) else 32
    model, config = quantize_model(model, config, group, bits)
    save(folder, source, model, tokenizer, config)


@contextmanager
def open_mlx(model: Path, adapter: Path | None = None) -> Iterator[Runtime]:
    """A model folder, with or without an MLX adapter, in mlx-lm."""
    from mlx_lm import load

    loaded, tokenizer = load(str(model), adapter_path=None if adapter is None else str(adapter))[:2]
    yield _Mlx(loaded, tokenizer)


class _Mlx(ShowsLogits):
    """mlx-lm with its own tokenizer wrapper and its own loop of generation."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self._model, self._tokenizer = model, tokenizer

    def prompt_ids(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        return list(self._tokenizer.apply_chat_template(list(messages), add_generation_prompt=True))

    def answer(self, ids: Sequence[int], max_new_tokens: int) -> list[int]:
        import mlx.core as mx
        from mlx_lm.generate import generate_step

        said: list[int] = []
        for token, _ in generate_step(mx.array(list(ids)), self._model, max_tokens=max_new_tokens):
            said.append(int(token))
            if said[-1] in self._tokenizer.eos_token_ids:
                break
        return said

    def _logits(self, ids: Sequence[int]) -> Any:
        import mlx.core as mx
        import numpy

        return numpy.array(self._model(mx.array([list(ids)]))[0].astype(mx.float32))
