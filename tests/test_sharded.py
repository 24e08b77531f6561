"""Several processes, really: what two gloo ranks save is what one process has, and none waits for another in vain."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch
from lora_runs import arguments, deepspeed_plan, fully_sharded, holder, peft_model, rows, same, trained, trainer
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback
from warm_process import Warm

from phi3_lora_plugin import LoraCheckpoint, latest_complete, verify
from phi3_lora_plugin.lora.inventory import expected_shapes
from phi3_lora_plugin.lora.snapshot import adapter_problems, take
from phi3_lora_plugin.lora.state import StateError, lora_state_dict
from phi3_lora_plugin.training.health import HealthError
from phi3_lora_plugin.training.resume import resumable
from phi3_lora_plugin.training.run_facts import DriftError

pytestmark = pytest.mark.slow

WEIGHTS = "adapter_model.safetensors"

#: The folder in which two processes have worked, and what both found in each scenario.
Ranks = tuple[Path, dict[str, list[Any]]]


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """One hash over names, types and numbers."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        found.update(tensors[name].detach().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


# --- what each of the two processes does -------------------------------------------------------------------------


class Leaves(TrainerCallback):
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt


def ddp(folder: Path) -> Any:
    """Trained by a Trainer on two ranks."""
    made = trainer(folder / "ddp", LoraCheckpoint(every_steps=2), per_device_train_batch_size=2)
    made.train()
    return {
        "wrapped": type(made.model_wrapped).__name__,
        "live": digest(trained(made.model)),
        "world": made.args.world_size,
    }


def plain(folder: Path, *callbacks: Any, checkpoint: LoraCheckpoint | None = None, **settings: Any) -> Any:
    """A Trainer without anything that is random."""
    defaults = {"model": peft_model(dropout=0.0), "optim": "sgd", "learning_rate": 0.5}
    return trainer(folder, checkpoint or LoraCheckpoint(), *callbacks, **(defaults | settings))


def ddp_plain(folder: Path) -> Any:
    """Without anything that is random."""
    plain(folder / "plain", per_device_train_batch_size=2).train()


def ddp_resumed(folder: Path) -> Any:
    """The same, killed after three steps and resumed."""

    def build(*callbacks: Any) -> Any:
        checkpoint = LoraCheckpoint(every_steps=1, background=True)
        return trainer(folder / "resumed", checkpoint, *callbacks, per_device_train_batch_size=2)

    with pytest.raises(KeyboardInterrupt):
        build(Leaves()).train()
    said: list[str] = []
    made = build()
    torch.distributed.barrier()
    with resumable(made, say=said.append) as checkpoint:
        made.train(resume_from_checkpoint=checkpoint)
    return {"live": digest(trained(made.model)), "said": said}


def ddp_left(folder: Path) -> Any:
    """Without anything that is random, killed after three steps."""
    made = plain(folder / "left", Leaves(), checkpoint=LoraCheckpoint(every_steps=1), per_device_train_batch_size=2)
    with pytest.raises(KeyboardInterrupt):
        made.train()


def ddp_evaluated(folder: Path) -> Any:
    """With the Trainer's own checkpoints, evaluations, and the best loaded back."""
    settings = dict(
        save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
        per_device_train_batch_size=2, max_steps=3,
    )  # fmt: skip
    made = trainer(folder / "evaluated", LoraCheckpoint(), **settings)
    made.train()
    return digest(trained(made.model))


def refused(folder: Path) -> Any:
    """A store that only rank zero finds taken."""
    rank = torch.distributed.get_rank()
    other = None
    store = folder / "refused" / "lora"
    if rank == 0:
        store.mkdir(parents=True)
        other = holder(store)
    made = trainer(folder / "refused", LoraCheckpoint())
    try:
        made.train()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "step": made.state.global_step}
    finally:
        if other is not None:
            other.kill()
            other.wait()
    return None


def sick(folder: Path) -> Any:
    """A gradient that is not a number, on one rank."""

    class Poison(TrainerCallback):
        def on_substep_end(self, *_: Any, **__: Any) -> None:
            raise AssertionError("there is no accumulation here")

        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step == 2 and torch.distributed.get_rank() == 1:
                parameter = next(p for p in model.parameters() if p.requires_grad)
                parameter.register_hook(lambda gradient: gradient * float("nan"))

    made = trainer(folder / "sick", Poison(), LoraCheckpoint(every_steps=1), per_device_train_batch_size=2)
    try:
        made.train()
    except HealthError:
        return {"step": made.state.global_step}
    return None


def _sharded(**settings: Any) -> Any:
    return fully_sharded(peft_model(dropout=0.0, **settings))


def _learn(model: Any, step: Callable[[], None] = lambda: None) -> None:
    """Four steps of plain gradient descent, every rank on all rows."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    ids = torch.tensor([row["input_ids"] for row in rows(4)])
    model.train()
    for _ in range(4):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        step()


def fsdp(folder: Path) -> Any:
    """Taken off a model that `fully_shard` has cut, before, between and after steps."""
    found: dict[str, Any] = {"before": _taken(_sharded())}
    model = _sharded()
    parameters = [p for name, p in model.named_parameters() if "lora_" in name]
    found["cut"] = all(p.to_local().numel() < p.numel() for p in parameters)
    between: list[str | None] = []
    _learn(model, lambda: between.append(_taken(model)))
    found["between"], found["after"] = between, _taken(model)
    found["gathered"] = digest(lora_state_dict(model))
    ids = torch.tensor([rows()[0]["input_ids"]])
    with torch.no_grad():
        model.eval()(input_ids=ids)  # leaves the last unit unsharded
    found["after a forward pass"] = _taken(model)
    snapshot = take(model, keep=torch.distributed.get_rank() == 0)
    if snapshot is not None:
        torch.save(dict(snapshot.tensors), folder / "fsdp.pt")
    from torch.distributed.fsdp import MixedPrecisionPolicy

    halves = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    model = fully_sharded(peft_model(dropout=0.0), reshard_after_forward=False, mp_policy=halves)
    with torch.no_grad():
        model.eval()(input_ids=ids)  # leaves every layer with whole copies, in 16 bits
    found["whole copies"] = _taken(model)
    found["dora"] = _taken(_sharded(use_dora=True))
    found["head"] = _taken(_sharded(target_modules=["qkv_proj"], modules_to_save=["lm_head"]))
    return found


def _taken(model: Any) -> str | None:
    snapshot = take(model, keep=torch.distributed.get_rank() == 0)
    return None if snapshot is None else digest(dict(snapshot.tensors))


def fsdp_callback(folder: Path) -> Any:
    """The callback on a sharded model; a Trainer on the CPU ignores `fsdp`, so its events are sent by hand."""
    from transformers import TrainerControl, TrainerState

    found = {}
    for name, poisoned in (("healthy", None), ("sick", 1)):
        model = _sharded()
        callback = LoraCheckpoint(folder / f"fsdp-{name}", every_steps=1)
        args, control = arguments(folder / "unused"), TrainerControl()
        rank = torch.distributed.get_rank()
        state = TrainerState(is_world_process_zero=rank == 0, max_steps=4)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
        kwargs = {"model": model, "optimizer": optimizer, "lr_scheduler": schedule}
        callback.on_train_begin(args, state, control, **kwargs)
        try:
            for _ in range(4):
                callback.on_step_begin(args, state, control, **kwargs)
                ids = torch.tensor([row["input_ids"] for row in rows(4)])
                model(input_ids=ids, labels=ids).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                state.global_step += 1
                if state.global_step == 3 and poisoned == rank:
                    with torch.no_grad():
                        next(p for p in model.parameters() if p.requires_grad).to_local()[0, 0] = float("nan")
                callback.on_step_end(args, state, control, **kwargs)
                if control.should_training_stop:
                    break
            callback.on_train_end(args, state, control, **kwargs)
        except HealthError as error:
            found["reason"] = str(error)
        found[name] = state.global_step
    return found


def fsdp1(folder: Path) -> Any:
    """The older FSDP, which makes one flat vector of a unit's parameters; as one unit, and a unit in each layer."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    options = {"use_orig_params": True, "device_id": torch.device("cpu")}
    found = [_taken(FullyShardedDataParallel(peft_model(dropout=0.0), **options))]
    model = peft_model(dropout=0.0)
    layers = model.base_model.model.model.layers
    for number in range(len(layers)):
        layers[number] = FullyShardedDataParallel(layers[number], **options)
    model = FullyShardedDataParallel(model, **options)
    found.append(_taken(model))
    _learn(model)
    found.append(_taken(model))
    return [*found, digest(lora_state_dict(model))]


SCENARIOS: tuple[Callable[[Path], Any], ...] = (
    ddp, ddp_plain, ddp_resumed, ddp_left, ddp_evaluated, refused, sick, fsdp, fsdp_callback, fsdp1,
)  # fmt: skip


def work(place: str) -> None:
    """One rank: every scenario, its results into a file."""
    folder, results = Path(place), {}
    for scenario in SCENARIOS:
        results[scenario.__name__] = scenario(folder)
        torch.distributed.barrier()
    _leave(folder, results)


def _leave(folder: Path, found: dict[str, Any]) -> None:
    """Write what was found and end at once: the threads of gloo now and then abort a process that ends properly."""
    (folder / f"rank-{torch.distributed.get_rank()}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    os._exit(0)


def launch(warm: Warm, folder: Path, function: FunctionType, *arguments: str, **variables: str) -> Ranks:
    """Call a function of this module in two processes that know of each other."""
    folder.mkdir(exist_ok=True)
    warm.ranks(folder, function, str(folder), *arguments, **variables)
    found = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]
    return folder, {name: [each[name] for each in found] for name in found[0]}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory, warm: Warm) -> Ranks:
    return launch(warm, tmp_path_factory.mktemp("ranks"), work)


def test_two_ranks_save_what_both_have(ranks: Ranks, tmp_path: Path) -> None:
    folder, found = ranks
    assert [each["world"] for each in found["ddp"]] == [2, 2]
    assert found["ddp"][0]["wrapped"] == "DistributedDataParallel"
    assert found["ddp"][0]["live"] == found["ddp"][1]["live"]
    path = latest_complete(folder / "ddp")
    assert path.name == "step-00000006" and verify(folder / "ddp")
    saved = load_file(path / WEIGHTS)
    live = {
        key.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default."): t
        for key, t in saved.items()
    }
    assert digest(live) == found["ddp"][0]["live"]
    assert json.loads((path / "manifest.json").read_text())["world_size"] == 2
    assert sorted(p.name for p in (path / "resume").glob("rng*")) == ["rng_state_0.pth", "rng_state_1.pth"]


def test_two_ranks_learn_what_one_process_learns_from_the_same_rows(ranks: Ranks, tmp_path: Path) -> None:
    folder, _ = ranks
    plain(tmp_path).train()
    one, two = (load_file(latest_complete(out) / WEIGHTS) for out in (tmp_path, folder / "plain"))
    assert one.keys() == two.keys()
    assert any(tensor.abs().max() > 1e-3 for name, tensor in one.items() if "lora_B" in name)
    # Equal but for the order in which gradients are added up.
    assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)


def test_two_ranks_that_are_killed_and_resumed_end_where_they_would_have(ranks: Ranks) -> None:
    folder, found = ranks
    whole, resumed = found["ddp"], found["ddp_resumed"]
    assert [each["live"] for each in resumed] == [each["live"] for each in whole]
    assert resumed[0]["said"] == [f"resuming from {folder / 'resumed' / 'lora' / 'step-00000003'}, step 3"]
    assert resumed[1]["said"] == [], "one of them says it"
    ends = [latest_complete(folder / name) for name in ("ddp", "resumed")]
    for name in (WEIGHTS, "resume/optimizer.pt", "resume/rng_state_1.pth"):
        assert ends[0].joinpath(name).read_bytes() == ends[1].joinpath(name).read_bytes(), name


def test_what_two_ranks_left_is_resumed_by_one_with_the_same_rows_a_step(ranks: Ranks, tmp_path: Path) -> None:
    folder, _ = ranks
    shutil.copytree(folder / "left", tmp_path / "left")
    halved = plain(tmp_path / "left", per_device_train_batch_size=2)
    with pytest.raises(DriftError, match="data.batch: 4 in the checkpoint, 2 now"), resumable(halved):
        pass
    said: list[str] = []
    made = plain(tmp_path / "left")
    with resumable(made, say=said.append) as checkpoint:
        made.train(resume_from_checkpoint=checkpoint)
    assert said[0].endswith("step 3") and said[1].startswith("processes: 2 in the checkpoint, 1 now")
    one, two = (load_file(latest_complete(out) / WEIGHTS) for out in (tmp_path / "left", folder / "plain"))
    assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)


def test_two_ranks_evaluate_save_and_load_the_best_back(ranks: Ranks) -> None:
    folder, found = ranks
    assert found["ddp_evaluated"][0] == found["ddp_evaluated"][1]
    assert verify(folder / "evaluated") and latest_complete(folder / "evaluated").name == "step-00000003"
    assert sorted(path.name for path in (folder / "evaluated").glob("checkpoint-*")) == [
        "checkpoint-1", "checkpoint-2", "checkpoint-3"
    ]  # fmt: skip


def test_what_one_rank_refuses_stops_both_before_the_first_step(ranks: Ranks) -> None:
    first, second = ranks[1]["refused"]
    assert first["error"].startswith("StoreBusy: ") and first["step"] == second["step"] == 0
    assert second["error"] == f"CheckpointError: the first process stopped: {first['error']}"


def test_what_is_sick_on_one_rank_stops_both(ranks: Ranks) -> None:
    folder, found = ranks
    assert found["sick"] == [{"step": 3}, {"step": 3}]
    assert latest_complete(folder / "sick").name == "step-00000002"


def test_shards_are_gathered_tensor_for_tensor_and_one_rank_keeps_them(ranks: Ranks) -> None:
    first, second = ranks[1]["fsdp"]
    single = peft_model(dropout=0.0)
    assert first["before"] == digest(dict(take(single).tensors))
    assert first["whole copies"] == first["before"]
    assert first["dora"] == digest(dict(take(peft_model(dropout=0.0, use_dora=True)).tensors))
    head = peft_model(dropout=0.0, target_modules=["qkv_proj"], modules_to_save=["lm_head"])
    assert first["head"] == digest(dict(take(head).tensors))
    assert first["cut"] and second["cut"], "a model that is not cut proves nothing"
    assert len(set(first["between"])) == 4 and first["between"][-1] == first["after"]
    assert first["after a forward pass"] == first["after"]
    assert first["gathered"] == second["gathered"], "lora_state_dict gives every rank all of it"
    assert [second[name] for name in ("before", "after", "dora", "head")] == [None] * 4
    _learn(single)
    gathered = torch.load(ranks[0] / "fsdp.pt", weights_only=True)
    for name, tensor in take(single).tensors.items():
        assert torch.allclose(gathered[name], tensor, atol=1e-6), name


def test_a_sharded_run_saves_each_step_and_says_by_absence_that_it_cannot_be_resumed_from(ranks: Ranks) -> None:
    folder, found = ranks
    assert [each["healthy"] for each in found["fsdp_callback"]] == [4, 4]
    path = latest_complete(folder / "fsdp-healthy")
    assert path.name == "step-00000004" and verify(path) and not (path / "resume").exists()
    gathered = torch.load(folder / "fsdp.pt", weights_only=True)
    assert same(load_file(path / WEIGHTS), gathered)


def test_a_number_that_one_rank_alone_has_stops_both(ranks: Ranks) -> None:
    folder, found = ranks
    first, second = found["fsdp_callback"]
    assert first["sick"] == second["sick"] == 3
    assert first["reason"] == "trained tensors are not finite in another process"
    assert second["reason"].startswith("1 of 16 trained tensors are not finite")
    assert latest_complete(folder / "fsdp-sick").name == "step-00000002"


def test_the_flat_vectors_of_the_older_fsdp_are_taken_apart(ranks: Ranks) -> None:
    first, second = ranks[1]["fsdp1"]
    before = digest(dict(take(peft_model(dropout=0.0)).tensors))
    assert first[:2] == [before, before] and second[:3] == [None] * 3
    assert first[2] not in (None, before) and first[3] == second[3]


# --- DeepSpeed, where it is installed ------------------------------------------------------------------------------


def zero(place: str, stage: str) -> None:
    """Trained by a Trainer that leaves it to DeepSpeed; then once more, with a number that is none on one rank."""
    folder = Path(place)
    found: dict[str, Any] = {}

    class Poison(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step == 2 and torch.distributed.get_rank() == 1:
                parameter = next(p for p in model.parameters() if p.requires_grad)
                getattr(parameter, "ds_tensor", parameter).data.view(-1)[0] = float("nan")

    settings = dict(deepspeed=deepspeed_plan(stage), per_device_train_batch_size=2, max_grad_norm=0.0)
    made = plain(folder / "healthy", checkpoint=LoraCheckpoint(every_steps=1), **settings)
    made.train()
    found["engine"] = type(made.model_wrapped).__name__
    found["cut"] = all(p.numel() == 0 for p in made.model.parameters() if p.requires_grad)
    made = plain(folder / "sick", Poison(), checkpoint=LoraCheckpoint(every_steps=1), **settings)
    try:
        made.train()
    except HealthError:
        found["stopped at"] = made.state.global_step
    _leave(folder, found)


@pytest.mark.parametrize("stage", ["2", "3"])
def test_zero_is_gathered_and_learns_what_one_process_learns(stage: str, tmp_path: Path, warm: Warm) -> None:
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    folder, found = launch(warm, tmp_path / "ranks", zero, stage, DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="")
    assert found["engine"] == ["DeepSpeedEngine"] * 2 and found["cut"] == [stage == "3"] * 2
    plain(tmp_path, max_grad_norm=0.0).train()
    path = latest_complete(folder / "healthy")
    assert path.name == "step-00000006" and verify(folder / "healthy")
    assert not (path / "resume").exists(), "each rank has a part of the optimizer only"
    one, two = load_file(latest_complete(tmp_path) / WEIGHTS), load_file(path / WEIGHTS)
    assert one.keys() == two.keys() and all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)
    assert found["stopped at"] == [3, 3]
    assert latest_complete(folder / "sick").name == "step-00000002"


# --- what must never be saved ------------------------------------------------------------------------------------


def _first(model: Any) -> nn.Parameter:
    return next(p for name, p in model.named_parameters() if "lora_A" in name)


def _set(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any], None]:
    def mutate(model: Any) -> None:
        _first(model).data = change(_first(model).data)

    return mutate


def _on_meta(model: Any) -> None:
    layer = next(module for module in model.modules() if hasattr(module, "lora_A") and len(module.lora_A))
    layer.lora_A["default"].to("meta")


MUTANTS: dict[str, tuple[Callable[[Any], None], str]] = {
    "size 0": (_set(lambda tensor: tensor.new_empty(0)), "empty: shards that were not gathered"),
    "size 0 in one direction": (_set(lambda tensor: tensor[:0]), "empty: shards that were not gathered"),
    "partial shard": (
        _set(lambda tensor: tensor[:2]),
        r"another shape than their layers .*\(2, 16\), expected \(4, 16\)",
    ),
    "flattened shard": (_set(lambda tensor: tensor.flatten()[:32]), r"another shape .*\(32,\), expected \(4, 16\)"),
    "NaN": (_set(lambda tensor: tensor.index_fill(0, torch.tensor([1]), float("nan"))), "not finite"),
    "Inf": (_set(lambda tensor: tensor.index_fill(0, torch.tensor([1]), float("-inf"))), "not finite"),
    "meta": (_on_meta, "no values .meta device"),
}


@pytest.mark.parametrize("what", MUTANTS)
def test_mutants_are_refused_by_name(what: str) -> None:
    model = peft_model()
    mutate, said = MUTANTS[what]
    mutate(model)
    with pytest.raises(StateError, match=f"1 of 16 tensors .*{said}") as caught:
        take(model)
    assert "layers.0.self_attn.o_proj.lora_A" in str(caught.value)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "_fsdp_wrapped_module."])
def test_names_that_wrappers_leave_are_refused(prefix: str) -> None:
    model = peft_model()
    state = lora_state_dict(model)
    expected = expected_shapes(model, "default", list(state))
    assert adapter_problems(state, expected) == [] and len(expected) == 16
    wrong = {f"{prefix}{name}": tensor for name, tensor in state.items()}
    problems = " ".join(adapter_problems(wrong, expected))
    assert "16 of 16 tensors are not of this adapter" in problems and "16 of 16 tensors are missing" in problems
    one = dict(list(wrong.items())[:1] + list(state.items())[1:])
    assert "1 of 16 tensors are missing" in " ".join(adapter_problems(one, expected))
    assert adapter_problems({}, expected)[0].startswith("found no LoRA tensor")


@pytest.mark.parametrize("layers", ["whole", "each"])
def test_wrapped_models_are_saved_by_their_own_names(layers: str) -> None:
    model = peft_model()
    want = take(model)
    wrapped = copy.deepcopy(model)
    if layers == "whole":
        wrapped = torch.compile(wrapped)  # compiles nothing before it is called
    else:
        inner = wrapped.base_model.model.model
        inner.layers = nn.ModuleList([torch.compile(layer) for layer in inner.layers])
    assert any("_orig_mod" in name for name, _ in wrapped.named_parameters())
    found = take(wrapped)
    assert same(dict(found.tensors), dict(want.tensors)) and found.config == want.config
