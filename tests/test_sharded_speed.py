"""The fast paths under wrappers for several processes: two real gloo ranks learn what one process learns without them.

A Trainer on the CPU ignores `fsdp`, so FSDP is put around its model by hand, after `attach`, as accelerate does it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_runs import arguments, deepspeed_plan, peft_model, same
from safetensors.torch import load_file
from test_sharded import WEIGHTS, Ranks, _leave, launch
from transformers import Trainer
from warm_process import Warm

from phi3_lora_plugin import attach, latest_complete
from phi3_lora_plugin.lora.state import lora_state_dict

STEPS = 3


def padded(rank: int, step: int) -> dict[str, torch.Tensor]:
    """Three rows of unequal length, other ones on each rank and in each step."""
    draw = torch.Generator().manual_seed(10 * step + rank)
    ids = torch.randint(3, 400, (3, 12), generator=draw)
    lengths = torch.randint(2, 13, (3, 1), generator=draw)
    mask = (torch.arange(12)[None] < lengths).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def model() -> Any:
    made = peft_model(dropout=0.0, modules_to_save=None)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    return made


def alone() -> tuple[list[float], dict[str, torch.Tensor]]:
    """Stock code in one process, on the rows of both ranks: (mean losses, adapter)."""
    stock = model().train()
    optimizer = torch.optim.SGD([p for p in stock.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for step in range(STEPS):
        both = [stock(**padded(rank, step)).loss for rank in range(2)]
        (sum(both) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(sum(loss.item() for loss in both) / 2)
    return losses, lora_state_dict(stock)


def learn(folder: Path, wrap: Callable[[Any], Any], before: bool = False) -> dict[str, Any]:
    """Attach to a Trainer, wrap its model, and train through the Trainer's own loss."""
    rank = torch.distributed.get_rank()
    inner = model()
    if before:
        inner = wrap(inner)
    trainer = Trainer(inner, arguments(folder))
    lines = [line for line in attach(trainer) if line.startswith("speed")]
    wrapped = inner if before else wrap(trainer.model)
    wrapped.train()
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.5)
    warned = Warnings()
    logging.getLogger("phi3_lora_plugin").addHandler(warned)
    losses = []
    for step in range(STEPS):
        loss = trainer.compute_loss(wrapped, padded(rank, step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        torch.distributed.all_reduce(mean)
        losses.append(mean.item() / 2)
    with torch.no_grad():
        wrapped.eval()
        inputs = padded(rank, 0)
        _, logits, _ = trainer.prediction_step(wrapped, inputs, prediction_loss_only=False)
    logging.getLogger("phi3_lora_plugin").removeHandler(warned)
    want, adapter = alone()
    state = lora_state_dict(wrapped)
    return {
        "lines": lines,
        "warned": warned.said,
        "losses": losses,
        "alone": want,
        "adapter": sorted(state) == sorted(adapter)
        and all(torch.allclose(state[name], adapter[name], atol=1e-6) for name in adapter),
        "wrong": sorted(set(state) ^ set(adapter))
        or [name for name in adapter if not torch.allclose(state[name], adapter[name], atol=1e-6)],
        "same rank": same(state, {name: _first(tensor) for name, tensor in state.items()}),
        # the labels of a wrapper are unknown to a Trainer: it then hands all outputs on
        "logits": [list(each.shape) for each in (logits if isinstance(logits, tuple) else (logits,))][-1],
    }


def _first(tensor: torch.Tensor) -> torch.Tensor:
    found = tensor.detach().clone()
    torch.distributed.broadcast(found, 0)
    return found


class Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def _ddp(made: Any) -> Any:
    return torch.nn.parallel.DistributedDataParallel(made)


def _fsdp1(made: Any, use_orig_params: bool, policy: str = "peft") -> Any:
    from peft.utils.other import fsdp_auto_wrap_policy
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy

    kinds = {
        "peft": fsdp_auto_wrap_policy(made),
        "size": partial(size_based_auto_wrap_policy, min_num_params=2000),
        "none": None,
    }
    options = {"use_orig_params": use_orig_params, "device_id": torch.device("cpu")}
    return FullyShardedDataParallel(made, auto_wrap_policy=kinds[policy], **options)


def _fsdp2(made: Any, *units: str) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    base = made.get_base_model()
    for module in list(base.modules())[::-1]:
        if "leaves" in units and isinstance(module, torch.nn.Linear) and module.weight.requires_grad:
            fully_shard(module, mesh=mesh)
        if "lora" in units and hasattr(module, "lora_A"):
            fully_shard(module, mesh=mesh)
    for layer in base.model.layers if "layers" in units else ():
        fully_shard(layer, mesh=mesh)
    for module in (base.lm_head, base.model.embed_tokens) if "ends" in units else ():
        fully_shard(module, mesh=mesh)
    return fully_shard(made, mesh=mesh)


WRAPS: dict[str, Callable[[Any], Any]] = {
    "ddp": _ddp,
    "fsdp1, as peft wraps": partial(_fsdp1, use_orig_params=True),
    "fsdp1, as peft wraps, flat": partial(_fsdp1, use_orig_params=False),
    "fsdp1, by size": partial(_fsdp1, use_orig_params=True, policy="size"),
    "fsdp1, whole": partial(_fsdp1, use_orig_params=True, policy="none"),
    "fsdp2, layers": lambda made: _fsdp2(made, "layers"),
    "fsdp2, root": lambda made: _fsdp2(made),
    "fsdp2, leaves": lambda made: _fsdp2(made, "layers", "leaves"),
    "fsdp2, lora layers": lambda made: _fsdp2(made, "lora"),
    "fsdp2, ends": lambda made: _fsdp2(made, "layers", "ends"),
}
BEFORE = ("fsdp1, as peft wraps", "fsdp2, layers", "fsdp2, leaves")


def work(place: str) -> None:
    """One rank: every wrapper, put on after `attach` and, some, before it."""
    from phi3_lora_plugin.speed.shards import say_once

    torch.distributed.init_process_group("gloo")
    folder, results = Path(place), {}
    for name, wrap in WRAPS.items():
        say_once.cache_clear()
        results[name] = learn(folder, wrap)
        torch.distributed.barrier()
    for name in BEFORE:
        say_once.cache_clear()
        results[f"{name}, before"] = learn(folder, WRAPS[name], before=True)
        torch.distributed.barrier()
    _leave(folder, results)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory, warm: Warm) -> Ranks:
    return launch(warm, tmp_path_factory.mktemp("ranks"), work)


NAMES = [*WRAPS, *(f"{name}, before" for name in BEFORE)]


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_learn_with_the_fast_paths_what_one_process_learns_without(name: str, ranks: Ranks) -> None:
    for each in ranks[1][name]:
        assert each["losses"] == pytest.approx(each["alone"], rel=1e-5)
        assert each["adapter"] and each["same rank"]
        assert each["logits"] == [3, 12, 512], "who evaluates with metrics gets logits"


def test_layers_whose_parameters_are_not_whole_take_peft_s_forward_and_it_is_said(ranks: Ranks) -> None:
    _, found = ranks
    quiet = {"ddp", "fsdp2, layers", "fsdp2, root", "fsdp2, lora layers", "fsdp2, layers, before"}
    for name in NAMES:
        for each in found[name]:
            lines = {line.split(": ")[1]: line for line in each["lines"]}
            assert lines["attention"].startswith("speed: attention: on")
            told = " ".join([lines["lora"], lines["loss"], *each["warned"]])
            assert ("FSDP" in told or "shards" in told or "DTensors" in told) is (name not in quiet), told
    assert found["fsdp2, leaves, before"][0]["lines"][2] == "speed: lora: off (8 keep PEFT's forward: units of FSDP2)"


# --- ZeRO, where DeepSpeed is installed -----------------------------------------------------------------------------


def data() -> list[dict[str, list[int]]]:
    """Rows padded on the right, eight tokens wide or less."""
    made = []
    for index in range(16):
        draw = torch.Generator().manual_seed(index)
        length = 2 + index % 7
        ids = torch.randint(3, 400, (8,), generator=draw).tolist()
        mask = [1] * length + [0] * (8 - length)
        labels = [token if real else -100 for token, real in zip(ids, mask, strict=True)]
        made.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return made


def trained(folder: Path, speed: str, **settings: Any) -> dict[str, Any]:
    """A Trainer's run with a checkpoint of ours, and what `attach` said."""
    options = dict(optim="sgd", learning_rate=0.5, max_grad_norm=0.0, max_steps=4)
    made = Trainer(model(), arguments(folder, **(options | settings)), train_dataset=data())  # type: ignore[arg-type]
    lines = [line for line in attach(made, speed=speed, every_steps=4) if line.startswith("speed")]
    made.train()
    return {"lines": lines, "losses": [log["loss"] for log in made.state.log_history if "loss" in log]}


def zero(place: str, stage: str) -> None:
    """Two ranks that leave it to DeepSpeed."""
    found = trained(Path(place) / "out", "auto", deepspeed=deepspeed_plan(stage), per_device_train_batch_size=2)
    _leave(Path(place), found)


@pytest.mark.parametrize("stage", ["2", "3"])
def test_zero_with_the_fast_paths_saves_what_one_process_saves_without(stage: str, tmp_path: Path, warm: Warm) -> None:
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    variables = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    folder, found = launch(warm, tmp_path / "ranks", zero, stage, **variables)
    want = trained(tmp_path / "one", "off", per_device_train_batch_size=4)
    assert found["losses"][0] == pytest.approx(want["losses"], rel=1e-4)
    one, two = (load_file(latest_complete(each) / WEIGHTS) for each in (tmp_path / "one", folder / "out"))
    assert one.keys() == two.keys() and all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)
    lines = {line.split(": ")[1]: line for line in found["lines"][0]}
    if stage == "3":
        assert lines["lora"] == "speed: lora: off (ZeRO-3 partitions parameters: PEFT's forward runs)"
        assert lines["loss"].startswith("speed: loss: off (ZeRO-3 partitions the head: transformers computes")
    else:
        assert lines["lora"] == "speed: lora: on (8 layers)" and lines["loss"].startswith("speed: loss: on")
    assert lines["attention"].startswith("speed: attention: on")
