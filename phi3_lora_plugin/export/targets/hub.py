"""The Hugging Face hub: a folder ready to push, with a model card; and the push, after the proof."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from phi3_lora_plugin.export.adapted import Adapted
from phi3_lora_plugin.export.exporter import ExportError, Runtime, Shipped, Variant, Wanted, refuse
from phi3_lora_plugin.export.recast import recast
from phi3_lora_plugin.export.transformers_runtime import Transformers, open_transformers
from phi3_lora_plugin.wording import first_line

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_CARD = """---
{{ card_data }}
---

# {{ name }}

{{ what }} of {{ base }}, trained with [phi3-lora-plugin](https://pypi.org/project/phi3-lora-plugin/).

## Use

```python
{{ code }}
```

Chats are rendered by the template `{{ template }}` in this folder; answers end at {{ stops }}.

## Training

{{ training }}
"""


def export(adapted: Adapted, wanted: Wanted, folder: Path) -> Shipped:
    """Write an adapter (or with --merged a model) with its card; see `exporter`."""
    refuse("hub", wanted, dtypes=("float32", "bfloat16", "float16"), push=True)
    if wanted.push and not _HUB_ID.fullmatch(wanted.push):
        raise ExportError(f"--push {wanted.push}: expected OWNER/NAME")
    variants: list[Variant] = []
    if wanted.merged:
        dtype = adapted.dtype(wanted.dtype)
        recast(adapted.merged(), folder, dtype)
        variants.append(Variant("merged, float32", partial(open_transformers, adapted.merged())))
        if dtype != "float32":
            variants.append(Variant(f"merged, {dtype}", partial(open_transformers, folder), exact=False))
    else:
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            shutil.copyfile(adapted.adapter / name, folder / name)
        adapted.write_tokenizer(folder)
        variants.append(Variant("loaded by PEFT from the folder", partial(_open_adapter, adapted, folder)))
    if adapted.recipe_file is not None:
        shutil.copyfile(adapted.recipe_file, folder / "recipe.yaml")
    notes = _write_card(adapted, wanted, folder)
    target = wanted.push or "OWNER/NAME"
    commands = (f"hf upload {target} {{out}}",)
    after = partial(_push, wanted.push) if wanted.push else None
    return Shipped(commands, tuple(variants), notes, after=after)


def _write_card(adapted: Adapted, wanted: Wanted, folder: Path) -> tuple[str, ...]:
    """README.md by huggingface_hub's own card classes; returns notes on what it could not tell."""
    from huggingface_hub import ModelCard, ModelCardData

    notes = []
    on_hub = bool(_HUB_ID.fullmatch(adapted.base_name)) and not Path(adapted.base_name).exists()
    if not on_hub:
        notes.append("the base is a folder here, so the model card names no base; pass --base OWNER/NAME to name one")
    license_name = _license(adapted)
    if license_name is None:
        notes.append("the base's licence is not known here; add `license:` to README.md")
    data = ModelCardData(
        base_model=adapted.base_name if on_hub else None,
        library_name="transformers" if wanted.merged else "peft",
        license=license_name,
        pipeline_tag="text-generation",
        tags=["phi-3", "lora", "phi3-lora-plugin"],
        datasets=_datasets(adapted.recipe),
        model_name=adapted.name,
        eval_results=_results(adapted),
    )
    base = f"[{adapted.base_name}](https://huggingface.co/{adapted.base_name})" if on_hub else "a base model"
    card = ModelCard.from_template(
        data, template_str=_CARD, name=adapted.name, base=base,
        what="The merged weights" if wanted.merged else "A LoRA adapter",
        code=_code(adapted, bool(wanted.merged), wanted.push or "OWNER/NAME", adapted.base_name if on_hub else "BASE"),
        template=adapted.template.name if adapted.template else "none that is known",
        stops=", ".join(f"`{stop}`" for stop in adapted.tokenizer.convert_ids_to_tokens(adapted.stops())),
        training=_training(adapted),
    )  # fmt: skip
    card.save(folder / "README.md")
    return tuple(notes)


def _code(adapted: Adapted, merged: bool, where: str, base: str) -> str:
    load = [f'model = AutoModelForCausalLM.from_pretrained("{where}")'] if merged else [
        f'model = AutoModelForCausalLM.from_pretrained("{base}")',
        f'model = PeftModel.from_pretrained(model, "{where}")',
    ]  # fmt: skip
    stops = adapted.stops()
    return "\n".join(
        [
            *([] if merged else ["from peft import PeftModel"]),
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            *load,
            f'tokenizer = AutoTokenizer.from_pretrained("{where}")',
            'chat = [{"role": "user", "content": "Hello"}]',
            'ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")',
            f"answer = model.generate(**ids, max_new_tokens=256, eos_token_id={stops})",
            'print(tokenizer.decode(answer[0, ids["input_ids"].shape[1]:], skip_special_tokens=True))',
        ]
    )


def _training(adapted: Adapted) -> str:
    """What the run says of itself: settings of the recipe, and figures of the checkpoint."""
    rows = []
    recipe, manifest = adapted.recipe, adapted.manifest
    if recipe is not None:
        arguments = recipe.training
        rows += [
            ("recipe", f"`{(manifest.get('recipe') or {}).get('name', recipe.name)}`, in `recipe.yaml`"),
            ("data", f"`{recipe.data.path}`"),
            ("LoRA", f"r {recipe.lora.r}, alpha {recipe.lora.alpha}, dropout {recipe.lora.dropout}"),
            *((name, f"{arguments[name]}") for name in ("learning_rate", "num_train_epochs") if name in arguments),
        ]
    lora: Mapping[str, Any] = manifest.get("lora") or {}
    if recipe is None and lora:
        rows.append(("LoRA", f"r {lora.get('r')}, alpha {lora.get('alpha')}"))
    if manifest.get("step") is not None:
        rows.append(("step", f"{manifest['step']}"))
    metric = manifest.get("metric") or {}
    if metric.get("value") is not None:
        rows.append((f"{metric.get('name', 'metric')}", f"{metric['value']:.4f}"))
    if not rows:
        return "Nothing is known about how this adapter was trained."
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _results(adapted: Adapted) -> Any:
    from huggingface_hub import EvalResult

    metric = adapted.manifest.get("metric") or {}
    if not isinstance(metric.get("value"), int | float):
        return None
    data = str(adapted.recipe.data.eval_path or adapted.recipe.data.path) if adapted.recipe is not None else "held-out"
    return [
        EvalResult(
            task_type="text-generation", dataset_type="held-out", dataset_name=data,
            metric_type=str(metric.get("name", "metric")), metric_value=round(float(metric["value"]), 6),
        )
    ]  # fmt: skip


def _datasets(recipe: Any) -> list[str] | None:
    paths = (
        [] if recipe is None else [recipe.data.path] if isinstance(recipe.data.path, str) else list(recipe.data.path)
    )
    found = [path for path in paths if isinstance(path, str) and _HUB_ID.fullmatch(path) and not Path(path).exists()]
    return found or None


def _license(adapted: Adapted) -> str | None:
    """The base's licence: by the card next to its weights, or MIT for Microsoft's own Phi models."""
    from huggingface_hub import ModelCard

    file = adapted.base / "README.md"
    if file.is_file():
        try:
            told = ModelCard.load(file).data.get("license")
        except Exception:  # a damaged card must not stop the export
            told = None
        if told:
            return str(told)
    return "mit" if re.match(r"microsoft/phi-", adapted.base_name, re.IGNORECASE) else None


@contextmanager
def _open_adapter(adapted: Adapted, folder: Path) -> Iterator[Runtime]:
    """The written folder as its card says to load it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(adapted.base_float32(), dtype="float32")
    yield Transformers(PeftModel.from_pretrained(base, str(folder)).eval(), AutoTokenizer.from_pretrained(folder))


def _push(repository: str, folder: Path) -> str:
    """Upload a folder, after everything in it was proved; returns the address.

    Raises:
        ExportError: the hub refused, or is not there.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    try:
        api.create_repo(repository, exist_ok=True)
        return str(api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload by phi3-lora"))
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
        raise ExportError(f"saved to {folder}, but not pushed to {repository}: {first_line(error)}") from error
