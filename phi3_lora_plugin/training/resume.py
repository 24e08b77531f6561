"""Resume from the newest complete checkpoint, checked and compared with the run at hand before the first step."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from phi3_lora_plugin.error import Phi3LoraError
from phi3_lora_plugin.lora.gather import unwrapped
from phi3_lora_plugin.lora.inventory import inventory_of
from phi3_lora_plugin.lora_files.peft_files import WEIGHTS
from phi3_lora_plugin.store.layout import Entry, entries, stores_in, torn
from phi3_lora_plugin.store.manifest import MANIFEST, RESUME, check_folder, read_manifest
from phi3_lora_plugin.store.run import end_left_over
from phi3_lora_plugin.training.refused_settings import planned_steps
from phi3_lora_plugin.training.run_facts import refuse_drift, run_facts
from phi3_lora_plugin.training.settings_facts import LENGTH
from phi3_lora_plugin.wording import listed

if TYPE_CHECKING:
    from transformers import Trainer

log = logging.getLogger(__name__)
#: What `_over` changes.
_OF_ENDED = (*LENGTH, "training.warmup_steps")


class ResumeError(Phi3LoraError):
    """A folder that training cannot be resumed from as it was given."""


def refuse_own_folder(given: Any) -> None:
    """Raise `ResumeError` for `resume_from_checkpoint=` a checkpoint of our store, which lacks what a Trainer reads.

    transformers would load its adapter, and then fail because trainer_state.json is missing.
    """
    folder = Path(given) if isinstance(given, str | os.PathLike) else None
    if folder is None or (folder / "trainer_state.json").is_file():
        return
    if (folder / MANIFEST).is_file() or any(entries(store) for store in stores_in(folder)):
        raise ResumeError(
            f"resume_from_checkpoint={str(given)!r} is a LoRA-only checkpoint, or a folder of such; write `with "
            f"phi3_lora_plugin.resumable(trainer, {str(given)!r}) as checkpoint: "
            "trainer.train(resume_from_checkpoint=checkpoint)`"
        )


@contextmanager
def resumable(
    trainer: Trainer,
    folder: str | Path | None = None,
    allow_drift: Sequence[str] = (),
    say: Callable[[str], Any] = log.warning,
) -> Iterator[str | None]:
    """A folder that `trainer.train(resume_from_checkpoint=...)` resumes from exactly, or None to start at step 0.

    The newest checkpoint whose every byte is as it was written is taken; newer ones that are damaged are named.

        with resumable(trainer) as checkpoint:
            trainer.train(resume_from_checkpoint=checkpoint)

    Args:
        folder: the store or the run; the Trainer's output folder if not given.
        allow_drift: settings that may differ from the checkpoint's; see `run_facts.refuse_drift`.
        say: called with a sentence for each checkpoint that is skipped, the one that is used, and each changed setting.

    Raises:
        DriftError: the checkpoint was made with other settings; every field is named. Nothing has been trained.
        ResumeError: a change that is allowed makes an adapter of other tensors than the checkpoint's.
        ManifestError: of several processes, one that does not see the folder of the first.
    """
    from phi3_lora_plugin.training.callbacks import LoraCheckpoint

    ours = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, LoraCheckpoint)]
    for callback in ours:
        callback.bind(trainer)
    if not trainer.is_world_process_zero():
        say = log.debug  # once is enough
    place = Path(folder or next((c.folder for c in ours if c.folder is not None), None) or trainer.args.output_dir)
    for store in stores_in(place):
        end_left_over(store)
    entry = newest_resumable(place, say) if trainer.is_world_process_zero() else None
    if trainer.args.world_size > 1:
        entry = _as_the_first_process(entry)
    if entry is None:
        say(f"{place}: no checkpoint to resume from; starting at step 0")
        yield None
        return
    loader = trainer.get_train_dataloader()  # its rows: without the columns that the Trainer drops
    adapter = next((callback.adapter for callback in ours), None)
    tokenizer = getattr(trainer, "processing_class", None)
    rows = getattr(loader, "dataset", None)
    now = run_facts(trainer.args, trainer.model, tokenizer, rows, adapter, trainer.optimizer)
    changed = refuse_drift(entry.path, entry.manifest, now, allow_drift)
    if trainer.args.world_size == 1 and any(name.startswith("lora.") for name in changed):
        _require_same_tensors(entry, trainer.model, adapter)
    ended = _is_over(trainer.args, loader, entry.step)
    for callback in ours:  # which compare too, and see a length of nothing where the run has ended
        callback.allow_drift = (*callback.allow_drift, *allow_drift, *(_OF_ENDED if ended else ()))
    say(f"resuming from {entry.path}, step {entry.step}")
    if (was := entry.manifest.get("world_size")) not in (None, trainer.args.world_size):
        say(f"processes: {was} in the checkpoint, {trainer.args.world_size} now: random numbers (dropout's) are others")
    for name, (was, value) in changed.items():
        say(f"{name}: {was!r} in the checkpoint; {value!r} from step {entry.step + 1} on")
    with TemporaryDirectory(prefix="phi3-lora-resume-") as together:
        for source in (entry.path, entry.path / RESUME):  # whose files come last and win
            for file in source.iterdir():
                if file.is_file() and file.name != MANIFEST:
                    link = Path(together, file.name)
                    link.unlink(missing_ok=True)
                    link.symlink_to(file.resolve())
        over = _over(trainer) if ended else nullcontext()
        new = any(name.startswith(("training.", "optimizer.")) for name in changed)
        with _counting_epochs_on(), over, _with_new_settings(trainer) if new else nullcontext():
            yield together


def newest_resumable(folder: Path, say: Callable[[str], Any]) -> Entry | None:
    """The newest checkpoint that is whole and can be resumed from; reports why newer ones cannot."""
    for store in stores_in(folder):
        for path in torn(store):
            say(f"skipped {path}: {'; '.join(check_folder(path).problems)}")
        for entry in entries(store):
            report = check_folder(entry.path)
            if not report:
                say(f"skipped {entry.path}: {'; '.join(report.problems)}")
            elif not entry.has_resume:
                say(f"skipped {entry.path}: has the adapter only, not the optimizer and random state")
            else:
                return entry
    return None


def _require_same_tensors(entry: Entry, model: Any, adapter: str | None) -> None:
    """Refuse a checkpoint whose tensors are others than the model's: neither adapter nor optimizer could be loaded."""
    from safetensors import safe_open

    file = next((one for one in (entry.path / WEIGHTS, entry.path / RESUME / WEIGHTS) if one.is_file()), None)
    if file is None:
        return
    with safe_open(file, framework="pt") as opened:
        saved = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    found = inventory_of(unwrapped(model), adapter)
    wrong = [
        f"{name}: {saved.get(name, 'missing')} in the checkpoint, {found.shapes.get(name, 'missing')} now"
        for name in sorted({*saved, *found.shapes} - {*found.second_names})
        if saved.get(name) != found.shapes.get(name)
    ]
    if wrong:
        raise ResumeError(
            f"{entry.path} cannot be resumed, although these settings may differ: its adapter has other tensors "
            f"({listed(wrong, 2)}). Restore the old settings, or start again in another folder"
        )


def _as_the_first_process(entry: Entry | None) -> Entry | None:
    """What the first process has found, for all: resuming from different steps would go unnoticed."""
    import torch.distributed as dist

    found = [None if entry is None else str(entry.path.resolve())]
    dist.broadcast_object_list(found)
    if entry is not None or found[0] is None:
        return entry
    manifest = read_manifest(Path(found[0]))
    return Entry(Path(found[0]), int(manifest["step"]), manifest)


def _is_over(args: Any, loader: Any, step: int) -> bool:
    """Whether a run that has made this many steps has made them all."""
    return step >= planned_steps(args, 0 if args.max_steps > 0 else len(loader))


@contextmanager
def _over(trainer: Trainer) -> Iterator[None]:
    """No epoch is left: where a run ends within one, the Trainer would continue it for one more step.

    One step of warm-up, because some schedules divide by the number of steps behind it, which would be 0.
    """
    args = trainer.args
    length = args.max_steps, args.num_train_epochs, args.warmup_steps
    args.max_steps, args.num_train_epochs, args.warmup_steps = -1, 0, 1
    try:
        yield
    finally:
        args.max_steps, args.num_train_epochs, args.warmup_steps = length


@contextmanager
def _with_new_settings(trainer: Trainer) -> Iterator[None]:
    """Settings that were changed take effect: first of all callbacks, so that ours records what is trained with."""
    from phi3_lora_plugin.training.new_settings import NewSettings

    callback = NewSettings(trainer)
    trainer.callback_handler.callbacks.insert(0, callback)
    try:
        yield
    finally:
        trainer.remove_callback(callback)


@contextmanager
def _counting_epochs_on() -> Iterator[None]:
    """Keep the number of the epoch where batches are skipped: older accelerate shuffles the rest as the first one's."""
    from accelerate.data_loader import DataLoaderShard
    from transformers import trainer as module

    if "iteration" in inspect.signature(DataLoaderShard.__init__).parameters:
        yield
        return
    skip = module.skip_first_batches

    def skip_and_count(loader: Any, count: int = 0) -> Any:
        left = skip(loader, count)
        left.iteration = getattr(loader, "iteration", 0)
        return left

    module.skip_first_batches = skip_and_count
    try:
        yield
    finally:
        module.skip_first_batches = skip
