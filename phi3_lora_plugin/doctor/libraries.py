"""Which libraries can be imported, and what each device would give a run: read by a child, told here."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from typing import Any

from phi3_lora_plugin.doctor.child import Outcome, run
from phi3_lora_plugin.doctor.extras import declared, requirements
from phi3_lora_plugin.doctor.finding import Finding
from phi3_lora_plugin.doctor.versions import installed
from phi3_lora_plugin.wording import human

AREA = "libraries"
PROBE = "phi3_lora_plugin.doctor.probe"
SECONDS = 180
#: Distribution -> module, in the order in which one needs the other.
CORE = {
    "torch": "torch",
    "safetensors": "safetensors",
    "tokenizers": "tokenizers",
    "pydantic": "pydantic",
    "transformers": "transformers",
    "accelerate": "accelerate",
    "datasets": "datasets",
    "peft": "peft",
    "trl": "trl",
}
#: Modules of extras whose name is not that of the distribution.
_MODULES = {"lm-eval": "lm_eval", "mlx-lm": "mlx_lm", "onnx-ir": "onnx_ir", "onnxruntime-genai": "onnxruntime_genai"}
_MODULES |= {"openvino-genai": "openvino_genai", "openvino-tokenizers": "openvino_tokenizers"}


def wanted() -> dict[str, str]:
    """Distribution -> module of what is installed and should import: the core, then extras."""
    names = [name for extra in declared() for name in requirements(extra)]
    others = {name: _MODULES.get(name, name) for name in names if installed(name) is not None}
    return {name: module for name, module in CORE.items() if installed(name) is not None} | others


def libraries(asked: Mapping[str, str] | None = None) -> Iterator[Finding]:
    """Whether each library imports, then devices; `asked` is what `wanted` gives if not given."""
    asked = wanted() if asked is None else asked
    outcome = run(PROBE, *asked.values(), seconds=SECONDS)
    names = {module: name for name, module in asked.items()}
    good = []
    for line in outcome.lines:
        if "library" in line:
            name = names.get(line["library"], line["library"])
            if "error" in line:
                yield _broken(name, line["error"], line.get("missing"))
            else:
                good.append(name)
    if outcome.ended is not None:
        yield _died(outcome, names)
    if good:
        yield Finding(AREA, "imported", ", ".join(good))
    yield from _devices(outcome)


def _broken(name: str, error: str, missing: str | None) -> Finding:
    """A library that is installed and cannot be imported."""
    remedy = f"pip install --force-reinstall --no-deps {name}"
    if missing and missing.split(".")[0] not in (name, name.replace("-", "_")):
        remedy = f"pip install {missing.split('.')[0]}, or {remedy}"
    if name not in CORE:
        remedy += f"; or, if you do not need it: pip uninstall {name}"
    return Finding(AREA, name, f"{installed(name)} cannot be imported: {error}", "problem", remedy)


def _died(outcome: Outcome, names: dict[str, str]) -> Finding:
    """The process itself ended while it did something, which a library's native code does."""
    doing = next((line["begins"] for line in reversed(outcome.lines) if "begins" in line), "starting")
    name = names.get(doing, doing)
    text = f"the process that imported it {outcome.ended}; what follows was not looked at"
    return Finding(AREA, name, text, "problem", f"pip install --force-reinstall --no-deps {name}")


def _devices(outcome: Outcome) -> Iterator[Finding]:
    rows = [row for line in outcome.lines for row in line.get("devices", ())]
    for line in outcome.lines:
        if "devices" in line and "error" in line:
            remedy = "see whether nvidia-smi works, then reinstall torch for your driver (pytorch.org)"
            yield Finding("devices", "devices", f"torch cannot look at them: {line['error']}", "problem", remedy)
    for row in rows:
        if row["kind"] != "torch":
            yield _device(row)
    build: dict[str, Any] = next((row for row in rows if row["kind"] == "torch"), {})
    cards = any(row["kind"] not in ("cpu", "torch") for row in rows)
    if build and not cards and shutil.which("nvidia-smi"):
        what = f"built for CUDA {build['cuda']}" if build["cuda"] else "a build without CUDA"
        remedy = "see whether nvidia-smi works, and install torch for your driver (pytorch.org)"
        yield Finding("devices", "cuda", f"a driver is here and torch sees no card: {what}", "problem", remedy)
    if rows and not cards:
        text = "no GPU; Phi-3-mini trains on a CPU, in hours where a card takes minutes"
        yield Finding("devices", "gpu", text, "note")


def _device(row: dict[str, Any]) -> Finding:
    """A device in one line: what it is, the dtype of frozen weights and of training, attention, 4 bits."""
    mixed = {"bf16": "bfloat16 autocast", "fp16": "float16 autocast", "no": "no autocast"}[row["mixed"]]
    large = " for bases over 1B parameters, float32 below" if row["kind"] == "cpu" else ""
    parts = [
        f"weights {row['weights']}{large}, {mixed}",
        f"attention {' or '.join(row['attention'])}",
        ", ".join(row["fast"]),
        "nf4 and int8 by bitsandbytes" if row["nf4"] else "no nf4 (extra qlora)",
    ]
    cards = row.get("cards", ())
    names = [f"{card['name']}, {human(card['memory'])}, compute capability {card['capability']}" for card in cards]
    text = "; ".join([" and ".join(names) or row["name"], *parts, *row["notes"]])
    return Finding("devices", row["kind"], text)
