"""Norm, rotation and gate as one function each: the numbers and gradients of transformers' layers, with less kept."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import tiny
import torch
from test_pack import LONGROPE
from test_speed_documents import equal, lora, padded, rows, step
from transformers.models.phi3 import modeling_phi3

from phi3_lora_plugin.error import Phi3LoraError
from phi3_lora_plugin.speed import layers
from phi3_lora_plugin.speed.apply import PARTS, slow_down, speed_up
from phi3_lora_plugin.speed.cpu_attention import attend
from phi3_lora_plugin.speed.elementwise import add_and_norm, rms_norm, rotate, swiglu
from phi3_lora_plugin.speed.last_layer import last_layer_obstacle
from phi3_lora_plugin.speed.lora_linear import gradient_of_a, kept_of
from phi3_lora_plugin.speed.loss import supervised_cross_entropy

ALONE = dict.fromkeys(PARTS, False) | {"layers": True}
SHAPES = [(1, 7, 4, 4, 8, 8), (3, 5, 4, 1, 16, 12), (2, 1, 6, 2, 10, 2)]


def leaf(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def agree(mine: Any, stock: Any, dtype: torch.dtype) -> None:
    exact = dtype in (torch.float32, torch.float64)
    for one, other in zip(mine, stock, strict=True):
        assert one.dtype == other.dtype == dtype and one.shape == other.shape
        close = {"rtol": 1e-5, "atol": 1e-6} if exact else {"rtol": 2e-2, "atol": 3e-2}
        torch.testing.assert_close(one, other, **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows_", "tokens", "heads", "key_heads", "size", "rotated"), SHAPES)
def test_a_fused_projection_is_split_and_rotated_with_one_gradient(
    rows_: int, tokens: int, heads: int, key_heads: int, size: int, rotated: int, dtype: torch.dtype
) -> None:
    qkv = leaf(rows_, tokens, (heads + 2 * key_heads) * size, dtype=dtype)
    angles = torch.randn(rows_, tokens, rotated // 2, dtype=dtype).repeat(1, 1, 2)
    cos, sin = angles.cos(), angles.sin()

    def stock() -> Any:
        parts = qkv.split([heads * size, key_heads * size, key_heads * size], dim=-1)
        q, k, v = (part.view(rows_, tokens, -1, size).transpose(1, 2) for part in parts)
        return (*modeling_phi3.apply_rotary_pos_emb(q, k, cos, sin), v)

    mine, want = rotate(qkv, cos, sin, heads, key_heads, size), stock()
    reused = rotate(qkv * 1, cos, sin, heads, key_heads, size, reuse=True)
    agree(reused, want, dtype)
    assert len({part.untyped_storage().data_ptr() for part in reused}) == 1, "all three lie where the projection was"
    agree(mine, want, dtype)
    ahead = [leaf(*part.shape, dtype=dtype, seed=3).detach() for part in mine]
    agree(torch.autograd.grad(mine, qkv, ahead), torch.autograd.grad(want, qkv, ahead), dtype)
    agree(torch.autograd.grad(reused, qkv, ahead), torch.autograd.grad(stock(), qkv, ahead), dtype)
    if dtype == torch.float64:
        assert torch.autograd.gradcheck(lambda x: rotate(x, cos, sin, heads, key_heads, size), qkv)
    first = heads * size + key_heads * size
    assert mine[2].data_ptr() == qkv[..., first:].data_ptr(), "values are not copied"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [1, 8, 33])
def test_norm_and_gate_have_the_numbers_of_the_stock_layers(width: int, dtype: torch.dtype) -> None:
    x, both = leaf(2, 3, width, dtype=dtype), leaf(2, 3, 2 * width, dtype=dtype, seed=1)
    norm = modeling_phi3.Phi3RMSNorm(width, eps=1e-5).to(dtype).requires_grad_(False)
    norm.weight.copy_(leaf(width, dtype=dtype, seed=2).detach())
    ahead = leaf(2, 3, width, dtype=dtype, seed=3).detach()
    gate, up = both.chunk(2, dim=-1)
    pairs = (
        (rms_norm(x, norm.weight, 1e-5), norm(x), x),
        (swiglu(both), up * torch.nn.functional.silu(gate), both),
    )
    for mine, stock, given in pairs:
        agree([mine], [stock], dtype)
        agree(torch.autograd.grad(mine, given, ahead), torch.autograd.grad(stock, given, ahead), dtype)
    if dtype == torch.float64:
        assert torch.autograd.gradcheck(swiglu, both)


def test_sums_of_squares_stay_in_float32_under_autocast() -> None:
    x = torch.linspace(-3, 3, 4096).repeat(2, 1)
    weight = torch.ones(4096)
    want = rms_norm(x, weight, 1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(rms_norm(x, weight, 1e-6), want)


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_key_value_heads": 2, "partial_rotary_factor": 0.5, "sliding_window": 7}, LONGROPE],
    ids=["mha", "gqa partial window", "longrope"],
)
@pytest.mark.parametrize("parts", [ALONE, "auto", {"layers": False}], ids=["alone", "with all", "without"])
def test_a_step_is_the_stock_step(changes: dict[str, Any], parts: Any) -> None:
    model = lora(**changes)
    equal(model, padded(rows()), parts)
    model.get_base_model().enable_input_require_grads()
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    equal(model, padded(rows()), parts)


def test_second_derivatives_are_refused_and_not_wrong() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(1, 6, 48, generator=draw, dtype=torch.float64, requires_grad=True)
    angles = torch.randn(1, 6, 2, generator=draw, dtype=torch.float64).repeat(1, 1, 2)
    heads = x.view(1, 6, 4, 12).transpose(1, 2)
    one = torch.ones(48, dtype=torch.float64)
    made = [
        rms_norm(x, one, 1e-5),
        swiglu(x),
        rotate(x, angles.cos(), angles.sin(), 2, 1, 12, False)[0],
        attend(heads, heads, heads, (0, 2, 6), None, None),
        supervised_cross_entropy(x, torch.randn(9, 48, generator=draw, dtype=torch.float64), torch.ones(1, 6).long()),
    ]
    for out in made:
        with pytest.raises(Phi3LoraError, match="the fast paths have no second derivatives"):
            torch.autograd.grad(out.sum(), x, create_graph=True)


def test_less_is_kept_for_backward() -> None:
    kept: list[int] = []
    for parts in ({"layers": False}, "auto"):
        model = lora(torch.float32)
        speed_up(model, parts)
        seen: dict[int, int] = {}
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

        def pack(tensor: torch.Tensor, seen: dict[int, int] = seen) -> torch.Tensor:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(**padded(rows()))
        kept.append(sum(size for place, size in seen.items() if place not in weights))
    assert kept[1] < 0.6 * kept[0], kept


def test_who_looks_at_a_projection_sees_what_it_gave_and_took() -> None:
    model, batch = lora(torch.float32), padded(rows())
    layer = model.get_base_model().model.layers[1]
    found: list[list[torch.Tensor]] = []
    for parts in ({"layers": False}, "auto"):
        speed_up(model, parts)
        seen: list[torch.Tensor] = []
        hooks = [
            layer.self_attn.qkv_proj.register_forward_hook(lambda module, args, out, seen=seen: seen.append(out)),
            layer.mlp.down_proj.register_forward_hook(lambda module, args, out, seen=seen: seen.append(args[0])),
            # what a later sum must not be written into
            layer.self_attn.register_forward_hook(lambda module, args, out, seen=seen: seen.append(out[0])),
            layer.mlp.down_proj.register_forward_hook(lambda module, args, out, seen=seen: seen.append(out)),
        ]
        step(model, batch)
        slow_down(model)
        for hook in hooks:
            hook.remove()
        found.append(seen)
    for mine, want in zip(*found, strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["self_attn", "self_attn.qkv_proj", "mlp", "mlp.gate_up_proj"])
def test_who_changes_what_a_norm_gave_changes_the_gradients_too(name: str) -> None:
    model, batch = lora(torch.float32), padded(rows())

    def more(module: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = (tuple(1.5 * each for each in args[:1]) + args[1:]), dict(kwargs)
        if "hidden_states" in kwargs:
            kwargs["hidden_states"] = 1.5 * kwargs["hidden_states"]
        return args, kwargs

    found = []
    for parts in ("off", "auto"):
        speed_up(model, parts)
        module = model.get_base_model().model.layers[0].get_submodule(name)
        hook = module.register_forward_pre_hook(more, with_kwargs=True)
        found.append(step(model, batch)[1])
        hook.remove()
    for key, want in found[0].items():
        torch.testing.assert_close(found[1][key], want, rtol=1e-4, atol=1e-6, msg=key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_normed_input_is_not_kept(dtype: torch.dtype) -> None:
    total, weight = leaf(2, 3, 8, dtype=dtype), leaf(8, dtype=dtype, seed=1).detach()
    _, normed, unnormed = add_and_norm(total, None, weight, 1e-5)
    kept = kept_of(normed.reshape(-1, 8), unnormed)
    assert kept[0].data_ptr() == total.data_ptr()
    grad_down = leaf(6, 4, dtype=dtype, seed=2).detach()
    made = gradient_of_a(grad_down, torch.float32, kept)
    want = grad_down.double().t() @ normed.detach().double().reshape(-1, 8)
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    assert (made - want).norm() < limit * want.norm()
    if dtype == torch.float16:  # of small numbers, and with a scaler's large gradients
        _, normed, unnormed = add_and_norm(total.detach() / 256, None, weight, 1e-5)
        made = gradient_of_a(grad_down * 2**13, torch.float32, kept_of(normed.reshape(-1, 8), unnormed))
        want = 2.0**13 * grad_down.double().t() @ normed.double().reshape(-1, 8)
        assert (made - want).norm() < limit * want.norm()


def test_generation_a_trained_norm_and_autocast_take_the_stock_layers() -> None:
    model = lora(torch.float32).eval()
    ids = torch.randint(3, 500, (2, 6), generator=torch.Generator().manual_seed(0))
    want = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
    speed_up(model, ALONE)
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=5, do_sample=False), want)
    model.train()
    norm = model.get_base_model().model.norm
    norm.weight.requires_grad_(True)
    model(input_ids=ids, labels=ids).loss.backward()
    assert norm.weight.grad is not None and norm.weight.grad.abs().max() > 0
    slow_down(model)
    norm.weight.requires_grad_(False)
    losses = []
    for parts in ("off", ALONE):
        speed_up(model, parts)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses.append(step(model, {"input_ids": ids, "labels": ids})[0])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm", "Identity"])
def test_norms_of_another_kind_take_their_own_forward(kind: str) -> None:
    model = lora()
    for layer in model.get_base_model().model.layers:
        layer.input_layernorm = {
            "RMSNorm": lambda: torch.nn.RMSNorm(32), "LayerNorm": lambda: torch.nn.LayerNorm(32),
            "Identity": torch.nn.Identity,
        }[kind]().double().requires_grad_(False)  # fmt: skip
    equal(model, padded(rows()))


def test_another_mlp_is_no_obstacle_to_the_other_parts() -> None:
    model = lora()
    for layer in model.get_base_model().model.layers:
        layer.mlp = torch.nn.Identity()
    equal(model, padded(rows()))


@pytest.mark.parametrize(
    "name", ["mlp.activation_fn", "mlp.down_proj.lora_dropout.default", "self_attn.o_proj.lora_dropout.default"]
)
def test_hooks_between_the_parts_of_a_function_are_heard(name: str) -> None:
    model, batch = lora(torch.float32), padded(rows())
    found = []
    for parts in ("off", "auto"):
        speed_up(model, parts)
        module = model.get_base_model().model.layers[0].get_submodule(name)
        hook = module.register_forward_hook(lambda module, args, out: 3 * out)
        found.append(step(model, batch))
        hook.remove()
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-6)
    for key, want in found[0][1].items():
        torch.testing.assert_close(found[1][1][key], want, rtol=1e-4, atol=1e-6, msg=key)


@pytest.mark.parametrize("name", ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.down_proj"])
def test_nothing_is_written_into_what_a_hook_on_a_merged_base_has_kept(name: str) -> None:
    model, batch = lora(torch.float32), padded(rows())
    model.get_base_model().model.embed_tokens.weight.requires_grad_(True)
    model.merge_adapter()
    found: list[torch.Tensor] = []
    for parts in ("off", "auto"):
        speed_up(model, parts)
        base = model.get_base_model().model.layers[0].get_submodule(name).base_layer
        hook = base.register_forward_hook(lambda module, args, out: found.append(out))
        model(**batch)
        hook.remove()
    want = found[0].reshape(-1, found[0].shape[-1])
    kept = batch["attention_mask"].flatten().bool()
    got = found[1].reshape(-1, want.shape[-1])
    torch.testing.assert_close(got, want[kept] if len(got) < len(want) else want, rtol=1e-4, atol=1e-5)


def test_the_last_layer_works_on_labels_again_after_hidden_states_were_asked_for() -> None:
    model, batch = lora(torch.float32), padded(rows())
    speed_up(model)
    assert model(**batch, output_hidden_states=True).hidden_states is not None
    assert last_layer_obstacle(model.get_base_model()) is None


def test_it_is_on_instances_and_goes_away_again() -> None:
    model, other = lora(torch.float32), tiny.model()
    before = [set(module.__dict__) for module in model.modules()]
    speed_up(model, ALONE)
    base = model.get_base_model().model
    assert "forward" in base.norm.__dict__ and "forward" not in other.model.norm.__dict__
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        theirs = made.get_base_model().model
        assert theirs.norm.forward.args[0] is theirs.norm
        assert theirs.layers[0].mlp.forward.args[0] is theirs.layers[0].mlp
    slow_down(model)
    assert [set(module.__dict__) for module in model.modules()] == before


def test_layers_that_compute_something_else_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Phi3MLP(modeling_phi3.Phi3MLP):  # type: ignore[misc]
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden_states) * 1.01

    monkeypatch.setattr(modeling_phi3, "Phi3MLP", Phi3MLP)
    (line,) = [one for one in speed_up(lora(torch.float32)) if one.part == "layers"]
    assert not line.on and line.why.startswith("the MLP of transformers") and "something else" in line.why
    stock = modeling_phi3.Phi3Attention, modeling_phi3.Phi3MLP.__mro__[1], modeling_phi3.Phi3RMSNorm
    layer = modeling_phi3.Phi3DecoderLayer
    assert layers._difference(*stock, layer) is None


def test_trying_the_layers_draws_no_random_number_of_the_run_and_says_nothing(
    capfd: pytest.CaptureFixture[str],
) -> None:
    from transformers.models.phi3 import modeling_phi3 as stock

    from phi3_lora_plugin.speed import layers

    torch.manual_seed(0)
    before = torch.get_rng_state()
    found = layers._difference.__wrapped__(
        stock.Phi3Attention, stock.Phi3MLP, stock.Phi3RMSNorm, stock.Phi3DecoderLayer
    )
    assert found is None and torch.equal(torch.get_rng_state(), before)
    assert capfd.readouterr().err == ""
