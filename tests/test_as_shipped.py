"""`phi3-lora eval --as`: the same rows and questions in the runtime that will serve them, next to base and adapter."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from exports import EMBEDDED

from phi3_lora_plugin.error import Phi3LoraError
from phi3_lora_plugin.evaluate.as_shipped import sentence
from phi3_lora_plugin.evaluate.evaluate import Evaluation, Wanted, evaluate
from phi3_lora_plugin.evaluate.figures import Figures
from phi3_lora_plugin.evaluate.target import find_target
from phi3_lora_plugin.plugins.discovery import load_plugins

ROWS = Wanted(data="embedded:chats/held_out.jsonl", rows=3, answers=2, max_new_tokens=40)


def measured(folder: Path, form: str) -> Evaluation:
    plugins = load_plugins()
    target = find_target(str(folder), [], lambda name: plugins.pick("recipes", name))
    return evaluate(target, replace(ROWS, as_shipped=form), plugins)


@pytest.mark.parametrize(
    ("form", "module"), [("llama.cpp:q8_0", "xllamacpp"), ("onnx:int4", "onnxruntime_genai"), ("mlx:4bit", "mlx_lm")]
)
def test_a_quantised_form_is_measured_on_the_same_tokens(random_adapter, form, module):
    pytest.importorskip(module, reason=f"{module} is not installed")
    found = measured(random_adapter, form)
    assert found.shipped == form and found.adapter_figures and found.shipped_figures
    assert 0 < abs(found.shipped_figures.loss - found.adapter_figures.loss) < 0.2 * found.adapter_figures.loss
    assert set(found.shipped_figures.answers) == set(found.adapter_figures.answers)
    assert found.notes[-1].startswith(f"shipped as {form}, against the adapter: loss ")
    assert all(one.shipped for one in found.asked)
    assert json.loads(found.to_json())["shipped_figures"]["loss"] == found.shipped_figures.loss


@pytest.mark.parametrize(
    ("form", "module"), [("llama.cpp", "xllamacpp"), ("onnx", "onnxruntime_genai"), ("hub", "transformers")]
)
def test_unquantised_forms_have_the_adapter_s_own_figures(random_adapter, form, module):
    pytest.importorskip(module, reason=f"{module} is not installed")
    found = measured(random_adapter, form)
    near = 2e-2 if form != "onnx" else 1e-4  # the base is in 16 bits, and only ONNX ships 32
    assert found.shipped_figures.loss == pytest.approx(found.adapter_figures.loss, rel=near)
    assert found.shipped_figures.token_accuracy == pytest.approx(found.adapter_figures.token_accuracy, abs=0.02)


def test_what_cannot_be_measured_is_told_before_anything_is(random_adapter):
    for what, form, message in (
        (random_adapter, "lama.cpp:q8_0", "did you mean 'llama.cpp'"),
        (random_adapter, ":q8_0", "expected TARGET or TARGET:FORM"),
        (EMBEDDED, "hub", "there is no adapter to ship"),
    ):
        with pytest.raises(Phi3LoraError, match=message):
            measured(what, form)
    with pytest.raises(Phi3LoraError, match="--quantize q9: available: none"):
        measured(random_adapter, "hub:q9")


def test_the_cost_is_said_even_where_it_is_nothing():
    same = Figures(0.5, 1.6, 0.9, {"exact": 0.25})
    said = "shipped as tin:1bit, against the adapter: loss +0, token accuracy +0, exact +0"
    assert sentence("tin:1bit", same, same) == said
