"""A model to talk to: an adapter on its base, or a base or merged folder by itself, rendered as it was trained."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi3_lora_plugin.chat.templates import template_for
from phi3_lora_plugin.embedded import PREFIX
from phi3_lora_plugin.model.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from phi3_lora_plugin.store.adapter_folder import Adapter


@dataclass(frozen=True)
class Partner:
    """A loaded model and how to ask it.

    Attributes:
        base: path or hub id of the base, or of the model that is asked by itself.
        adapter: its folder; None for a model by itself.
        template: name of the chat template.
        encoding: what `prompt_ids` takes.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    base: str
    adapter: Path | None
    template: str
    encoding: Mapping[str, Any]

    def banner(self) -> str:
        """What is talked to, in one line."""
        what = f"{self.adapter} on {self.base}" if self.adapter else self.base
        dtype = str(self.model.dtype).removeprefix("torch.")
        return f"{what} (template {self.template}, {dtype}, {self.model.device.type})"

    def answer(
        self, messages: Sequence[Mapping[str, Any]], without_adapter: bool = False, **options: Any
    ) -> Generator[str]:
        """Pieces of the next assistant turn; `options` as `stream` takes them."""
        from phi3_lora_plugin.evaluate.generate import stream

        model: Any = self.model
        with model.disable_adapter() if without_adapter else nullcontext():
            yield from stream(self.model, self.tokenizer, messages, **options, **self.encoding)


def find_partner(
    what: str, *, base: str | None = None, check: bool = True, say: Callable[[str], Any] = print, **options: Any
) -> Partner:
    """Load what `what` names: an adapter, a checkpoint, a run, or a model (folder, hub id, embedded:NAME).

    Args:
        base: base model, where the one that the adapter names is not at its old place.
        check: refuse an adapter whose files are not those that its manifest lists.
        say: called with a sentence before each thing that takes time.
        options: as `load_model` takes them (dtype, attention, quantize, device).

    Raises:
        AdapterError, ModelError, TokenizerError, TemplateError: see there.
    """
    from phi3_lora_plugin.evaluate.generate import with_adapter
    from phi3_lora_plugin.model.load import load_model
    from phi3_lora_plugin.store.adapter_folder import read_adapter

    found: Adapter | None = None if _is_model(what) else read_adapter(what, check)
    # What people type never opens a turn.
    encoding = {"system": "error", **(found.chat if found else {}), "control_tokens": "escape"}
    name, revision = (base, None) if base else found.base if found else (what, None)
    words = str(found.folder) if found and (found.folder / "tokenizer.json").is_file() else str(name)
    tokenizer = load_tokenizer(words, revision if words == name else None)
    template = template_for(tokenizer, encoding.get("template")).name
    say(f"loading {name}")
    model = load_model(name, revision=revision, **options)
    if found:
        say(f"loading {found.folder}")
        model = with_adapter(model, found.folder)
    return Partner(model, tokenizer, str(name), found.folder if found else None, template, encoding)


def _is_model(what: str) -> bool:
    """Whether this names a model by itself, not an adapter."""
    folder = Path(what)
    if folder.is_dir():
        return (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file()
    return what.startswith(PREFIX) or (
        not folder.exists() and what.count("/") == 1 and not what.startswith((".", "~", "/"))
    )
