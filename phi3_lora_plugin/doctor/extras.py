"""The extras of this package: which are installed, and what each would add."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata

from phi3_lora_plugin.doctor.finding import Finding
from phi3_lora_plugin.doctor.versions import NAME, installed, version_of

AREA = "extras"
#: Extra -> what it adds. tests/test_doctor.py holds it to pyproject.toml; those for developers are left out.
ADDS = {
    "qlora": "4-bit and 8-bit bases (model.quantize), 8-bit and paged optimizers",
    "ray": "runs on Ray (train --ray)",
    "gguf": "GGUF files (convert --to gguf)",
    "dedup": "near duplicates (data check --near)",
    "ollama": "export to Ollama, tried before it is saved",
    "llama-cpp": "export to llama.cpp, and eval --as llama.cpp",
    "onnx": "export to ONNX Runtime",
    "openvino": "export to OpenVINO",
    "mlx": "export to MLX",
    "lm-eval": "benchmarks (eval --lm-eval)",
    "wandb": "curves at Weights & Biases (training.report_to)",
    "mlflow": "curves at MLflow (training.report_to)",
    "trackio": "curves in a local Trackio (training.report_to)",
    "tensorboard": "curves in TensorBoard (training.report_to)",
    "trackers": "curves in TensorBoard, Trackio, MLflow and Weights & Biases (training.report_to)",
}
#: Not for users: what developing and building this package takes.
DEVELOPERS = ("dev", "docs", "release")


def requirements(extra: str) -> dict[str, str]:
    """Distribution -> bounds of what an extra installs on this machine."""
    from packaging.requirements import Requirement

    found: dict[str, str] = {}
    for line in metadata.requires(NAME) or []:
        requirement = Requirement(line)
        marker = requirement.marker
        if marker is not None and marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""}):
            found[requirement.name] = str(requirement.specifier)
    return found


def declared() -> list[str]:
    """The extras of the installed package, those for developers left out."""
    return [extra for extra in metadata.metadata(NAME).get_all("Provides-Extra") or [] if extra not in DEVELOPERS]


def extras() -> Iterator[Finding]:
    """Each extra: there, in part, too old, or what it would add."""
    for extra in declared():
        adds, wanted = ADDS.get(extra, ""), requirements(extra)
        there = {name: version for name in wanted if (version := installed(name)) is not None}
        pip = f"pip install '{NAME}[{extra}]'"
        if not there:
            yield Finding(AREA, extra, f"not installed; would add {adds}", "ok", pip)
            continue
        old = [found for name in there if (found := version_of(name, wanted[name])).state == "problem"]
        missing = [name for name in wanted if name not in there]
        text = ", ".join(f"{name} {version}" for name, version in there.items())
        if old:
            yield Finding(AREA, extra, "; ".join(f"{one.name} {one.text}" for one in old), "problem", pip)
        elif missing:
            yield Finding(AREA, extra, f"{text}; {', '.join(missing)} missing, for {adds}", "note", pip)
        else:
            yield Finding(AREA, extra, f"{text}: {adds}")
