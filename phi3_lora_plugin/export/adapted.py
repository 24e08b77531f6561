"""An adapter ready to be shipped: on its base's own modules, with the chat template of its training."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi3_lora_plugin.chat.templates import Template, TemplateError, serving_text, template_for
from phi3_lora_plugin.chat.tool_formats import AUTO, tool_format
from phi3_lora_plugin.export.convert import convert
from phi3_lora_plugin.export.exporter import ExportError
from phi3_lora_plugin.export.merge import merge, portable_config, write_generation_config
from phi3_lora_plugin.export.recast import recast
from phi3_lora_plugin.lora_files import layouts, peft_files
from phi3_lora_plugin.lora_files.mlx_files import looks_like_mlx, mlx_base
from phi3_lora_plugin.model.families import projections
from phi3_lora_plugin.model.folder import model_folder, published_stops, read_json
from phi3_lora_plugin.model.shards import Weights, write_json
from phi3_lora_plugin.model.tokenizer import TokenizerError, load_tokenizer, stop_token_ids, tokenizer_files

if TYPE_CHECKING:
    from phi3_lora_plugin.lora_files.layouts import Lora


@dataclass(frozen=True)
class Adapted:
    """What every exporter starts from.

    Attributes:
        name: for people and file names.
        adapter: a PEFT folder whose modules are the base's own.
        base: the base's folder, and `base_name` the path or hub id by which people know it.
        config: the base's config.json.
        tokenizer: of the adapter, or of the base where the adapter has none.
        template: of the chats that were trained on; None: the tokenizer has none that is known.
        encoding: how prompts are rendered, as `prompt_ids` takes it.
        recipe: of the run that saved it, or None; `recipe_file` is its file.
        manifest: of the checkpoint; {} of an adapter that something else saved.
        scratch: a folder for work in between; gone when the export ends.
        notes: what a person should know.
    """

    name: str
    adapter: Path
    base: Path
    base_name: str
    config: Mapping[str, Any]
    tokenizer: Any
    template: Template | None
    encoding: Mapping[str, Any]
    recipe: Any
    recipe_file: Path | None
    manifest: Mapping[str, Any]
    scratch: Path
    notes: tuple[str, ...] = ()

    def merged(self) -> Path:
        """The merged model in float32 with the trained chat template, made once and checked against PEFT."""
        folder = self.scratch / "merged"
        if not folder.exists():
            merge(self.adapter, self.base, folder, "float32", check="modules", quantized="none")
            self.write_tokenizer(folder)
        return folder

    def base_float32(self) -> Path:
        """The base in float32 with the trained chat template, for runtimes that put the adapter on themselves."""
        folder = self.scratch / "base"
        if not folder.exists():
            folder.mkdir()
            recast(self.base, folder, "float32")
            settings = portable_config(self.config)
            settings["dtype" if "dtype" in settings else "torch_dtype"] = "float32"
            write_json(folder / "config.json", settings)
            self.write_tokenizer(folder)
            write_generation_config(folder, self.base, settings)
        return folder

    def write_tokenizer(self, folder: Path) -> None:
        """Tokenizer files into `folder`, with the chat template that was trained, also where a recipe named it."""
        for name, content in tokenizer_files(self.tokenizer).items():
            (folder / name).write_bytes(content)
        if self.template is None:
            return
        # The published template of a model for tools renders no calls; the one for servers does, as training did.
        if self.encoding.get("template") or not self.tokenizer.chat_template or self.template.name in AUTO:
            how = tool_format(str(self.encoding.get("tool_format") or "auto"), self.template.name)
            (folder / "chat_template.jinja").write_text(serving_text(self.template, how), encoding="utf-8")

    def stops(self) -> list[int]:
        """The ids that end an answer: the family's, and those that the base was published with."""
        ids = [each for each in self.published_stops() if each != self.tokenizer.pad_token_id]
        return stop_token_ids(self.tokenizer, ids)

    def published_stops(self) -> list[int]:
        """The ids at which a server stops that goes by the base's own files alone."""
        file = self.base / "generation_config.json"
        return published_stops(read_json(file) if file.is_file() else {}, self.config)

    def dtype(self, asked: str) -> str:
        """The floating-point type to ship weights in: `asked`, or the base's own for `auto`."""
        return Weights(self.base).floating_type() if asked == "auto" else asked

    def plain_loras(self, target: str, holder: str) -> tuple[Lora, ...]:
        """The updates of an adapter that has plain LoRA on linear layers and nothing else.

        Raises:
            ExportError: it has more, which `holder` of this target has no place for.
        """
        found = peft_files.parts(peft_files.read_peft(self.adapter))
        odd = [each.module for each in found.loras if each.magnitude is not None or each.bias is not None]
        odd = [*found.full, *found.tokens, *odd, *(each.module for each in found.loras if each.embedding)]
        if odd:
            raise ExportError(
                f"{target}: {', '.join(odd[:3])}: {holder} has plain LoRA on linear layers only; pass --merged"
            )
        return found.loras

    def other_template(self) -> tuple[str, ...]:
        """A note where a server that takes the base's tokenizer would render chats in another way than training did."""
        try:
            of_base = template_for(load_tokenizer(self.base))
        except (TemplateError, TokenizerError):
            of_base = None
        if self.template is None or of_base == self.template:
            return ()
        theirs = "none that is known" if of_base is None else of_base.name
        return (f"the base's own chat template is {theirs}, training used {self.template.name}: ship it with --merged",)


def prepare(source: str | Path, base: str | None, scratch: Path) -> Adapted:
    """Find an adapter and its base, and bring the adapter onto the base's modules where it was made for another layout.

    Args:
        source: an adapter folder, a checkpoint, a run, or an MLX adapter; split layouts are fused.
        base: the base model, where the adapter's own is not there or is a split copy.
        scratch: an empty folder that lasts as long as the export.

    Raises:
        ExportError, AdapterError, ModelError, ConvertError: what is wrong.
    """
    from phi3_lora_plugin.store.adapter_folder import read_adapter

    mlx = looks_like_mlx(source)
    found = None if mlx else read_adapter(source)
    folder = Path(source) if found is None else found.folder
    name, revision = (base, None) if base else (mlx_base(folder) or "", None) if found is None else found.base
    if not name:
        raise ExportError(f"{folder} names no base model; pass --base")
    where = model_folder(name, revision)
    config = read_json(where / "config.json")
    if config.get("quantization_config"):
        raise ExportError(f"{where} is quantised; pass the unquantised base with --base")
    if config.get("model_type") in ("llama", "mistral"):
        convert(where, scratch / "fused-base", "phi3-base")
        where = scratch / "fused-base"
        config = read_json(where / "config.json")
    adapter = folder
    notes: tuple[str, ...] = ()
    if mlx or layouts.is_split(peft_files.parts(peft_files.read_peft(folder)).loras, projections(config)):
        report = convert(folder, scratch / "adapter", "fused", base=str(where))
        adapter, notes = scratch / "adapter", (f"the adapter's layout was converted: {report.kind} to fused",)
    encoding = {"system": "error", "template": None, **(found.chat if found else {})}
    encoding = {key: value for key, value in encoding.items() if key in ("system", "template", "tool_format")}
    tokenizer = load_tokenizer(folder if (folder / "tokenizer.json").is_file() else where)
    try:
        template = template_for(tokenizer, encoding.get("template"))
    except TemplateError as error:
        template, notes = None, (*notes, f"chat template: {error}")
    return Adapted(
        _name(folder), adapter, where, name, config, tokenizer, template, encoding, _recipe(found),
        found.recipe_file if found else None, found.manifest if found else {}, scratch, notes,
    )  # fmt: skip


def _recipe(adapter: Any) -> Any:
    """The recipe of an adapter's run; None where there is none that can be read without a plugin's presets."""
    from phi3_lora_plugin.recipe import RecipeError

    try:
        return adapter.recipe() if adapter is not None else None
    except RecipeError:
        return None


def _name(adapter: Path) -> str:
    """A run's name for its checkpoints, else the folder's, fit for files and commands."""
    resolved = adapter.resolve()
    found = resolved.name
    for folder in (resolved, *resolved.parents[:2]):
        if (folder / "recipe.yaml").is_file():
            found = folder.name
            break
    return re.sub(r"[^\w.+-]+", "-", found).strip("-.") or "adapter"
