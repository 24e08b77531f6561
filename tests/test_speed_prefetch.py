"""The next packed weight is unpacked while a product runs: any order of events gives what unpacking in turn gives."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from streams import Late, Simulated
from torch.utils._python_dispatch import TorchDispatchMode

from phi3_lora_plugin.speed.prefetch import Buffers, Order, Packed, fits_twice

pytestmark = pytest.mark.slow

STATE = SimpleNamespace()


class Simulation:
    """Buffers on simulated streams; each take is checked when its reader begins and when it ends."""

    def __init__(self, seed: int, card: Simulated) -> None:
        self.draw, self.card = random.Random(seed), card
        self.weights: dict[int, torch.Tensor] = {}
        self.wrong: list[str] = []
        self.buffers = Buffers(card, card.room, self.unpack, self.known)

    def model(self, layers: int) -> list[torch.Tensor]:
        made = [torch.full((self.draw.choice((2, 3, 5)),), self.draw.random()) for _ in range(layers)]
        self.weights |= {id(weight): weight for weight in made}
        return made

    def packed(self, weight: torch.Tensor) -> Packed:
        return Packed(weight, STATE, weight.data_ptr(), len(weight))

    def known(self, name: int) -> Packed | None:
        return self.packed(self.weights[name]) if name in self.weights else None

    def unpack(self, packed: Packed, room: torch.Tensor) -> None:
        part, weight = room[: packed.size], packed.weight
        self.card.put(lambda: part.fill_(-2.0), lambda: part.copy_(weight))  # it takes some time

    def read(self, weight: torch.Tensor) -> None:
        got = self.buffers.take(self.packed(weight))
        want = weight.clone()

        self.card.put(lambda: self.look(got, want, "begins"), lambda: self.look(got, want, "ends"))
        if self.draw.random() < 0.3:
            self.something_else()
        self.card.run(self.draw.choice((0, 0, 1, 3, 8, 50)))

    def something_else(self) -> None:
        """The reader's own work takes memory and lets go of it."""
        other = self.card.room(self.draw.choice((2, 3, 5)))[:]
        self.card.put(lambda: other.fill_(-3.0), lambda: self.look(other, torch.full_like(other, -3.0), "lasts"))

    def look(self, got: torch.Tensor, want: torch.Tensor, when: str) -> None:
        if not torch.equal(got, want):
            self.wrong.append(f"{got} for {want} as its use {when}")

    def step(self, weights: list[torch.Tensor]) -> None:
        """One micro-batch, some of them recomputed, some ended by an exception, some with a layer left out."""
        recomputed, left_out = self.draw.random() < 0.4, self.draw.choice(weights)
        used = [each for each in weights if each is not left_out or self.draw.random() < 0.7]
        order = [*used, *(each for weight in reversed(used) for each in ([weight] * 2 if recomputed else [weight]))]
        if self.draw.random() < 0.15:
            order = order[: self.draw.randrange(1 + len(order))]
        for weight in order:
            self.read(weight)

    def go(self, steps: int) -> None:
        models = [self.model(self.draw.randrange(1, 6)) for _ in range(self.draw.choice((1, 1, 2)))]
        for _ in range(steps):
            place = self.draw.randrange(len(models))
            model, happens = models[place], self.draw.random()
            if happens < 0.1:
                for weight in model:  # an evaluation
                    self.read(weight)
            elif happens < 0.2:
                self.buffers.forget()
                for _ in range(6):
                    self.something_else()
            elif happens < 0.25:  # another adapter is merged, or a base read anew
                self.card.run(10_000)
                model[0].add_(1.0)
            elif happens < 0.3:
                models[place] = self.model(self.draw.randrange(1, 7))
                for weight in model:
                    del self.weights[id(weight)]
            else:
                self.step(model)
        self.card.run(100_000)
        assert not any(self.card.lines.values())


def test_no_reader_ever_sees_another_weight_or_half_of_one() -> None:
    found = 0
    for seed in range(60):
        simulation = Simulation(seed, Simulated(seed))
        simulation.go(30)
        assert not simulation.wrong, (seed, simulation.wrong[0])
        found += simulation.buffers.found
    assert found > 1000  # and mostly it is there already


class NoWaitBefore(Simulated):
    """Writes into a buffer before its readers are done."""

    def wait(self, beside: bool, event: Any) -> None:
        if not beside:
            super().wait(beside, event)


class NoWaitAfter(Simulated):
    """Reads before a buffer is full."""

    def wait(self, beside: bool, event: Any) -> None:
        if beside:
            super().wait(beside, event)


class NothingKept(Simulated):
    """Gives memory away that is still written to."""

    def keep(self, tensor: torch.Tensor) -> None:
        pass


@pytest.mark.parametrize("card", [NoWaitBefore, NoWaitAfter, NothingKept])
def test_each_of_the_three_precautions_is_needed(card: type[Simulated]) -> None:
    simulations = [Simulation(seed, card(seed)) for seed in range(60)]
    for simulation in simulations:
        simulation.go(30)
    assert any(simulation.wrong for simulation in simulations)


def test_a_step_like_the_last_one_finds_every_weight() -> None:
    for recomputed in (False, True):
        simulation = Simulation(0, Simulated(0))
        weights = simulation.model(12)
        layers = [weights[start : start + 4] for start in range(0, 12, 4)]
        order = [*weights]
        for layer in reversed(layers):
            order += [*(layer if recomputed else ()), *reversed(layer)]
        for micro_batch in range(6):
            before = simulation.buffers.found
            for weight in order:
                simulation.read(weight)
            if micro_batch >= 2:
                assert simulation.buffers.found - before == len(order)
        simulation.card.run(10_000)
        assert not simulation.wrong


def test_what_is_not_known_is_remembered_nowhere_and_takes_one_buffer() -> None:
    simulation = Simulation(0, Simulated(0))
    weights = simulation.model(4)
    simulation.weights.clear()
    rooms = []
    simulation.buffers._make_room = lambda size: (rooms.append(size), simulation.card.room(size))[1]
    for _ in range(5):
        for weight in [*weights, *reversed(weights)]:
            simulation.read(weight)
    assert simulation.buffers.found == 0 and not simulation.card.lines[True]
    assert rooms == sorted(set(rooms))  # only ever a larger one


def test_without_memory_for_a_second_buffer_each_is_unpacked_in_turn(caplog: pytest.LogCaptureFixture) -> None:
    simulation = Simulation(1, Simulated(1))
    weights = simulation.model(4)
    rooms = 0

    def room(size: int) -> torch.Tensor:
        nonlocal rooms
        rooms += 1
        if rooms == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return simulation.card.room(size)

    simulation.buffers.reserve(5)
    simulation.buffers._make_room = room
    for _ in range(4):
        for weight in weights:
            simulation.read(weight)
    simulation.card.run(10_000)
    assert rooms == 2 and simulation.buffers.found == 0 and not simulation.wrong
    assert "no memory is left to unpack the next weight" in caplog.text


def test_a_weight_is_itself_until_it_is_written_to_moved_or_gone() -> None:
    weight = torch.zeros(3)
    packed = Packed(weight, STATE, weight.data_ptr(), 3)
    assert packed.same(Packed(weight, STATE, weight.data_ptr(), 3)) and not packed.same(None)
    assert not packed.same(Packed(weight, SimpleNamespace(), weight.data_ptr(), 3))
    assert not packed.same(Packed(weight, STATE, weight.data_ptr() + 1, 3))
    assert not packed.same(Packed(torch.zeros(3), STATE, weight.data_ptr(), 3))
    weight.add_(1)
    assert not packed.same(Packed(weight, STATE, weight.data_ptr(), 3))
    with torch.inference_mode():
        unfollowed = torch.zeros(3)
    both = [Packed(unfollowed, STATE, 0, 3) for _ in range(2)]
    assert not both[0].same(both[1])  # nobody counts what is written to it
    del weight
    assert packed.weight is None and not packed.same(packed)


def test_the_order_is_that_of_the_last_time_and_forgets_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phi3_lora_plugin.speed.prefetch._MOST", 40)
    order = Order()
    guesses = [order.after(name) for _ in range(3) for name in range(10)]
    assert guesses[20:] == [*range(1, 10), 0]
    for name in range(1000):
        order.after(name)
    assert len(order._after) <= 41


def test_a_small_card_holds_one() -> None:
    assert fits_twice(100, None) and fits_twice(100, 5000) and not fits_twice(100, 4999)


# The real layers, with real NF4 weights.


@pytest.fixture
def lora4() -> Any:
    pytest.importorskip("bitsandbytes")
    from phi3_lora_plugin.speed import lora_linear4bit

    return lora_linear4bit


@pytest.fixture
def streams(lora4: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Late]]:
    """The code of a card on the CPU, its second stream as late as may be."""

    def made(**how: Any) -> Late:
        late = Late(**how)
        monkeypatch.setattr("phi3_lora_plugin.speed.card_streams.CardStreams", lambda device: late)
        monkeypatch.setattr(lora4, "_buffered", lambda weight: True)
        monkeypatch.setattr(lora4, "_unpack", late.unpack)
        return late

    monkeypatch.setattr(lora4, "_buffers", {})
    monkeypatch.setattr(lora4, "_ahead", {})
    return made


class Between(TorchDispatchMode):
    """Whatever waits beside may be done between any two operators."""

    def __init__(self, late: Late) -> None:
        super().__init__()
        self.late = late

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.late.some()
        return func(*args, **(kwargs or {}))


def run(models: list[Any], recompute: str | None) -> list[Any]:
    """Losses and gradients of some steps as they happen: two micro-batches, an evaluation, one that is broken off."""
    from test_speed_nf4 import step

    found: list[Any] = []
    for number in range(5):
        for model in models:
            base = model.get_base_model()
            if recompute is not None:
                base.gradient_checkpointing_enable({"use_reentrant": recompute == "reentrant"})
                base.enable_input_require_grads()
            if number == 2:
                with torch.no_grad():
                    found.append(model.eval()(input_ids=torch.tensor([[3, 4, 5]])).logits)
                model.train()
            if number == 3:
                stop = base.model.layers[1].mlp.down_proj.register_forward_hook(_broken)
                with pytest.raises(KeyboardInterrupt):
                    step(model)
                stop.remove()
            loss, gradients = step(model)
            found += [torch.tensor(loss), *gradients.values()]
    return found


def _broken(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("recompute", [None, "kept", "reentrant"])
@pytest.mark.parametrize("seed", [0, 1])
def test_steps_are_those_without_it_to_the_bit(
    lora4: Any, streams: Callable[..., Late], recompute: str | None, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from test_speed_nf4 import quantised

    from phi3_lora_plugin.speed.apply import speed_up
    from phi3_lora_plugin.speed.proved_prefetch import start

    models = [quantised(True, torch.bfloat16), quantised(False, torch.bfloat16)][: 1 + seed]
    for model in models:
        lines = {one.part: str(one) for one in speed_up(model)}
        assert (
            lines["lora"] == "lora: on (8 layers; NF4 weights are unpacked when they are wanted: they are not on a GPU)"
        )
    want = run(models, recompute)
    late = streams(seed=seed)
    for model in models:
        start(model)
    with Between(late):
        got = run(models, recompute)
    assert len(got) == len(want) and all(map(torch.equal, got, want))
    assert late.unpacked_beside > 30 * len(models)


def test_what_a_wrapper_has_moved_is_unpacked_when_it_is_wanted(lora4: Any, streams: Callable[..., Late]) -> None:
    from test_speed_nf4 import quantised, step

    from phi3_lora_plugin.speed.lora_swap import fuse_lora
    from phi3_lora_plugin.speed.proved_prefetch import start, stop

    model = quantised(True, torch.float32)
    fuse_lora(model)
    want = [step(model) for _ in range(3)]
    late = streams()
    start(model)
    for name, module in model.named_modules():
        if name.endswith("base_layer"):
            if "qkv" in name:
                module.weight.data = module.weight.data.clone()  # as FSDP1 and ZeRO-3 do
            elif "o_proj" in name:
                state = module.weight.quant_state
                module.weight = torch.nn.Parameter(module.weight.data, requires_grad=False)  # as FSDP2 does
                module.weight.quant_state = state
            else:
                module.weight.ds_id = 1
    got = [step(model) for _ in range(3)]
    assert all(torch.equal(a[1][name], b[1][name]) for a, b in zip(got, want, strict=True) for name in a[1])
    assert late.unpacked_beside == 0
    stop(model)
    assert not lora4._ahead


def test_memory_made_in_an_evaluation_is_written_to_in_training(lora4: Any, streams: Callable[..., Late]) -> None:
    from test_speed_nf4 import quantised, step

    from phi3_lora_plugin.speed.lora_swap import fuse_lora

    model = quantised(True, torch.float32)
    fuse_lora(model)
    streams()
    with torch.inference_mode():
        model(input_ids=torch.tensor([[3, 4, 5]]))
    step(model)


@pytest.mark.parametrize("careless", [False, True])
def test_the_trial_finds_a_card_that_reads_too_early(
    lora4: Any, streams: Callable[..., Late], careless: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from test_speed_nf4 import quantised

    from phi3_lora_plugin.speed import proved_prefetch
    from phi3_lora_plugin.speed.lora_swap import fuse_lora

    model = quantised(True, torch.float32)
    fuse_lora(model)
    streams(careless=careless)
    monkeypatch.setattr(proved_prefetch, "_ROWS", 8)
    monkeypatch.setattr(proved_prefetch, "_timed", lambda *of: 1.05)
    layers = proved_prefetch._layers(model)[:4]
    found = proved_prefetch.trial(layers, torch.device("cpu"), torch.float32)
    assert found == ("a product differs on this card" if careless else 1.05)
    assert not lora4._ahead


def test_a_trial_that_fails_or_gains_nothing_leaves_one_buffer_and_says_why(
    lora4: Any, streams: Callable[..., Late], monkeypatch: pytest.MonkeyPatch
) -> None:
    from test_speed_nf4 import quantised

    from phi3_lora_plugin.speed import proved_prefetch
    from phi3_lora_plugin.speed.lora_swap import fuse_lora

    model = quantised(True, torch.float32)
    assert proved_prefetch.prefetch_used(model) == ""
    fuse_lora(model)
    streams()
    monkeypatch.setattr(proved_prefetch, "_obstacle", lambda weights: None)
    monkeypatch.setattr(proved_prefetch, "_tried", {})
    monkeypatch.setattr(proved_prefetch, "_ROWS", 8)
    monkeypatch.setattr(proved_prefetch, "_timed", lambda *of: "it is 1.00x as fast")
    said = proved_prefetch.prefetch_used(model)
    assert said == "NF4 weights are unpacked when they are wanted: it is 1.00x as fast" and not lora4._ahead
    assert proved_prefetch.prefetch_used(model, "torch_compile is on").endswith("wanted: torch_compile is on")
    proved_prefetch._tried.clear()
    monkeypatch.setattr(proved_prefetch, "_timed", lambda *of: 1.04)
    said = proved_prefetch.prefetch_used(model)
    assert said == "the next NF4 weight is unpacked while a product runs, 1.04x as fast in a trial here"
    assert len(lora4._ahead) == 8
