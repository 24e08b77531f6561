"""`phi3-lora export`: an adapter in, a folder that another runtime serves out, and a proof that it says the same."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi3_lora_plugin.export.adapted import prepare
from phi3_lora_plugin.export.exporter import Exporter, ExportError, Shipped, Wanted
from phi3_lora_plugin.export.full_disk import full_disk_as_os_error
from phi3_lora_plugin.export.prompts import held_out_prompts, trained_system
from phi3_lora_plugin.export.proof import Comparison, ProofError, Reference, compare
from phi3_lora_plugin.model.base_size import size_of_config
from phi3_lora_plugin.model.families import row_limit
from phi3_lora_plugin.model.new_files import scratch_folder, staged
from phi3_lora_plugin.wording import human

if TYPE_CHECKING:
    from phi3_lora_plugin.export.adapted import Adapted

_NEW_TOKENS = 64
#: Prompts of a comparison unless told: all there are up to a hundred where the model is tiny, a few where it is not.
_PROMPTS = ((50e6, 100), (1e9, 8), (float("inf"), 4))


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote, and what came of comparing it.

    Attributes:
        out: the folder.
        target: the name of the target.
        files: names of what was written, and `total_bytes` of all of them.
        comparisons: one for each variant.
        prompts_from: where the held-out prompts are from.
        commands: lines that run it.
        notes: what else a person should know.
        unproven: why nothing was compared, if so.
    """

    out: Path
    target: str
    files: tuple[str, ...]
    total_bytes: int
    comparisons: tuple[Comparison, ...]
    prompts_from: str
    commands: tuple[str, ...]
    notes: tuple[str, ...]
    unproven: str

    def lines(self) -> list[str]:
        """The report for people."""
        text = [f"saved {len(self.files)} files, {human(self.total_bytes)}, to {self.out}"]
        if self.comparisons:
            text.append(f"compared with base and adapter in transformers; held-out prompts from {self.prompts_from}:")
            text += [f"  {comparison.line()}" for comparison in self.comparisons]
        else:
            text.append(f"not compared: {self.unproven}")
        text += [f"note: {note}" for note in self.notes]
        return [*text, "run it:", *(f"  {command}" for command in self.commands)]

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON has it."""
        rows = [asdict(one) | {"holds": one.holds} for one in self.comparisons]
        return asdict(self) | {"out": str(self.out), "comparisons": rows}


def export(
    adapter: str | Path,
    exporter: Exporter,
    target: str,
    out: str | Path,
    wanted: Wanted | None = None,
    *,
    base: str | None = None,
    prompts: str | int | None = None,
    max_new_tokens: int = _NEW_TOKENS,
    overwrite: bool = False,
    progress: Callable[[str, int | None], Any] | None = None,
) -> ExportReport:
    """Write `adapter` for a runtime, prove it there, and only then give the folder its name.

    Args:
        adapter: an adapter folder, a checkpoint, a run, or an MLX adapter.
        exporter: as a plugin registered it; `target` is its name.
        out: the folder to write; it must be new or empty unless `overwrite`.
        wanted: what to ship.
        base: the base model, where the adapter's is not at its old place.
        prompts: how many held-out prompts to compare on, or a file of chats; 0 compares nothing.
        max_new_tokens: length at which an answer is cut off.
        progress: called with (what is being done, how many steps it has or None), and with ("", None) for each step.

    Raises:
        ExportError: the target cannot do what was asked; nothing was written.
        ProofError: the exported model does not give the adapter's words; nothing was written.
    """
    say = progress or (lambda text, steps: None)
    wanted = replace(wanted or Wanted(), progress=lambda text: say(text, None))
    wanted = replace(wanted, prove=wanted.prove and prompts != 0)
    out = Path(out)
    with staged(out, overwrite) as stage, scratch_folder(out, ".work") as scratch, full_disk_as_os_error(stage):
        say("reading the adapter and its base", None)
        adapted = prepare(adapter, base, scratch)
        if wanted.system is None:
            wanted = replace(wanted, system=trained_system(adapted.recipe))
        shipped = exporter(adapted, wanted, stage)
        comparisons, where, notes = _prove(
            adapted, shipped, prompts if wanted.prove else 0, max_new_tokens, wanted.context, say
        )
        files = sorted(str(path.relative_to(stage)) for path in stage.rglob("*") if path.is_file())
        size = sum((stage / name).stat().st_size for name in files)
    commands = tuple(command.replace("{out}", shlex.quote(str(out))) for command in shipped.commands)
    unproven = "" if comparisons else shipped.unproven or " ".join(notes) or "--prompts 0"
    if shipped.after is not None:
        say(f"pushing {out}", None)
        notes = (*notes, f"pushed: {shipped.after(out)}")
    every = (*adapted.notes, *shipped.notes, *notes)
    return ExportReport(out, target, tuple(files), size, comparisons, where, commands, every, unproven)


@contextmanager
def unsaved(
    adapter: str | Path, exporter: Exporter, wanted: Wanted, base: str | None = None
) -> Iterator[tuple[Shipped, Adapted]]:
    """What an exporter makes of an adapter, in a folder that lasts as long as the context: to look at before shipping.

    Raises:
        ExportError: the target cannot do what was asked.
    """
    with tempfile.TemporaryDirectory(prefix="phi3-lora-") as place:
        (Path(place) / "scratch").mkdir()
        (Path(place) / "out").mkdir()
        adapted = prepare(adapter, base, Path(place) / "scratch")
        yield exporter(adapted, wanted, Path(place) / "out"), adapted


def _prove(
    adapted: Adapted,
    shipped: Shipped,
    prompts: str | int | None,
    max_new_tokens: int,
    context: int | None,
    say: Callable[[str, int | None], Any],
) -> tuple[tuple[Comparison, ...], str, tuple[str, ...]]:
    """(comparisons, where the prompts are from, notes) of every variant.

    Raises:
        ProofError: one that has to be exact is not.
    """
    from phi3_lora_plugin.export.merge_check import fits

    if not shipped.variants or prompts == 0:
        return (), "", ()
    size = size_of_config(adapted.config).parameters
    if prompts is None and not fits(4 * size, "float32"):
        return (), "", (f"{human(4 * size)} in float32 do not fit into memory; pass --prompts 2 to compare anyway",)
    most = prompts if isinstance(prompts, int) else next(count for limit, count in _PROMPTS if size < limit)
    chats, where = held_out_prompts(adapted.recipe, most, prompts if isinstance(prompts, str) else None)
    reference = Reference(adapted, chats, (context or row_limit(None, adapted.config)) - max_new_tokens)
    notes = [f"{len(reference.refused)} prompts left out: {reference.refused[0]}"] if reference.refused else []
    if not reference.ids:
        raise ExportError(f"no prompt of {where} can be rendered: {reference.refused[0]}")
    found = []
    for variant in shipped.variants:
        say(f"comparing {variant.name}", len(reference.ids))
        found.append(compare(reference, variant, max_new_tokens, lambda: say("", None)))
        if not found[-1].holds:
            where_it_parts = found[-1].odd or "in the scores"
            raise ProofError(f"{found[-1].line()}\nfirst difference, {where_it_parts}\nnothing was saved")
    return tuple(found), where, tuple(notes)
