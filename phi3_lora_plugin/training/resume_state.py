"""What training needs to resume exactly where it was: optimizer, schedule, counters and random state.

The files are named and filled as `transformers.Trainer` does, which reads them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from io import BytesIO
from typing import Any

from phi3_lora_plugin.store.disk_writes import Content


def capture(
    args: Any, state: Any, optimizer: Any, scheduler: Any, scaler: Any = None, callbacks: Sequence[Any] = ()
) -> dict[str, Content] | None:
    """File name -> content of a run between two steps. Collective where there are several processes.

    Everything is copied, so that training can continue while the content is written.

    Args:
        args, state: the Trainer's arguments and `TrainerState`.
        optimizer, scheduler, scaler: as the callbacks of a Trainer get them; no scaler outside float16.
        callbacks: the Trainer's; the state of those that have one is saved. `state` has what they began with.

    Returns:
        None where the optimizer is sharded (FSDP, DeepSpeed): such a run is resumed from the Trainer's own checkpoint.
    """
    randoms = _gathered(_random_state(args), args)
    if optimizer is None or scheduler is None or _is_sharded(optimizer):
        return None
    files: dict[str, Content] = {
        "trainer_state.json": _trainer_state(state, callbacks),
        "optimizer.pt": partial(_save, _copied(optimizer.state_dict())),
        "scheduler.pt": _bytes(scheduler.state_dict()),
    }
    for rank, content in enumerate(randoms):
        files["rng_state.pth" if len(randoms) == 1 else f"rng_state_{rank}.pth"] = content
    if scaler is not None:
        files["scaler.pt"] = _bytes(scaler.state_dict())
    return files


def _trainer_state(state: Any, callbacks: Sequence[Any]) -> bytes:
    from transformers.trainer_callback import ExportableState

    content = asdict(state)
    if stateful := [callback for callback in callbacks if isinstance(callback, ExportableState)]:
        content["stateful_callbacks"] = type(state)(stateful_callbacks=stateful).stateful_callbacks
    return (json.dumps(content, indent=2, sort_keys=True, default=_plain) + "\n").encode()


def _plain(value: Any) -> Any:
    """A number of numpy's or torch's as a Python number, since metrics of other packages have these; else its text."""
    return value.item() if getattr(value, "ndim", None) == 0 else str(value)


def _random_state(args: Any) -> bytes:
    import numpy as np
    import torch

    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "cpu": torch.random.get_rng_state(),
    }
    if torch.cuda.is_available():
        several = args.world_size > 1
        states["cuda"] = torch.cuda.random.get_rng_state_all() if several else torch.cuda.random.get_rng_state()
    return _bytes(states)


def _gathered(content: bytes, args: Any) -> list[bytes]:
    """The content of every process, by rank."""
    if args.world_size == 1:
        return [content]
    import torch.distributed as dist

    found: list[Any] = [None] * args.world_size
    dist.all_gather_object(found, content)
    return found


def _is_sharded(optimizer: Any) -> bool:
    if type(optimizer).__name__.startswith("DeepSpeed"):  # accelerate's wrapper: also ZeRO-1 and 2 have parts only
        return True
    values = (value for group in optimizer.param_groups for value in group["params"])
    return any(hasattr(value, "full_tensor") or hasattr(value, "ds_id") or value.numel() == 0 for value in values)


def _copied(value: Any) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _copied(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(each) for each in value)
    return value


def _save(value: Any, stream: Any) -> None:
    import torch

    torch.save(value, stream)


def _bytes(value: Any) -> bytes:
    stream = BytesIO()
    _save(value, stream)
    return stream.getvalue()
