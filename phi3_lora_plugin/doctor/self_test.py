"""Train something tiny, save it, load it again: `python -m phi3_lora_plugin.doctor.self_test FOLDER`, in a child."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from phi3_lora_plugin.doctor.child import run, teller
from phi3_lora_plugin.doctor.finding import Finding

AREA = "self-test"
SECONDS = 240
_STEPS = 3


def self_test() -> Iterator[Finding]:
    """Three steps of the embedded Phi-3 on this machine's device, its adapter verified and reloaded with plain PEFT."""
    try:
        with tempfile.TemporaryDirectory(prefix="phi3-lora-doctor-", ignore_cleanup_errors=True) as folder:
            outcome = run("phi3_lora_plugin.doctor.self_test", folder, seconds=SECONDS)
    except OSError as error:
        text = f"no temporary folder: {error.strerror or error}"
        yield Finding(AREA, "train", text, "problem", "set TMPDIR=FOLDER")
        return
    result = next((line for line in outcome.lines if "steps" in line), None)
    if result is None:
        said = next((line["error"] for line in outcome.lines if "error" in line), outcome.ended or "said nothing")
        yield Finding(AREA, "train", f"failed: {said}", "problem", "see the problems above; else report this output")
        return
    text = f"{result['steps']} steps on {result['device']}, saved, verified, reloaded: logits {result['logits']}"
    yield Finding(AREA, "train", f"{text}; {result['seconds']} s")


def main(folder: str) -> None:
    """Print one line of JSON: what came of it, or what went wrong."""
    tell = teller()
    from phi3_lora_plugin.plugins.contain import describe

    start = time.perf_counter()
    try:
        line = _train(Path(folder)) | {"seconds": round(time.perf_counter() - start, 1)}
    except Exception as error:
        line = {"error": describe(error)}
    tell(line)


def _train(folder: Path) -> dict[str, Any]:
    import torch
    from peft import PeftModel
    from transformers import TrainerCallback

    from phi3_lora_plugin.embedded import locate
    from phi3_lora_plugin.model.load import load_model
    from phi3_lora_plugin.model.logits import logit_limit
    from phi3_lora_plugin.pipeline import train
    from phi3_lora_plugin.recipe import load_recipe
    from phi3_lora_plugin.store.checkpoint import verify

    ids = torch.tensor([[1, 400, 401, 402]])
    seen: dict[str, Any] = {}

    class Look(TrainerCallback):  # type: ignore[misc]
        """Keeps what the trained model says, to compare."""

        def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            seen.update(device=str(model.device), logits=_logits(model, ids))

    settings = [f"training.max_steps={_STEPS}", "training.num_train_epochs=null", "data.max_rows=64"]
    settings += ["data.eval_path=null", "training.disable_tqdm=true", "model.device=auto"]
    result = train(
        load_recipe("tiny-cpu", [*settings, f"output_dir={folder / 'run'}"]), check=False, callbacks=[Look()]
    )
    assert result.adapter is not None
    report = verify(result.adapter)
    if not report:
        raise OSError(f"the adapter was saved and is damaged: {'; '.join(report.problems)}")
    base = load_model(str(locate("embedded:tiny-phi3")), device="cpu", dtype="float32")
    again = _logits(PeftModel.from_pretrained(base, result.adapter), ids)
    far = (again - seen["logits"]).abs().max().item()
    # Another device multiplies in another order, and cards in TF32.
    limit = logit_limit("float32" if seen["device"] == "cpu" else "bfloat16", again.abs().max().item())
    if not far <= limit:
        raise ArithmeticError(f"the reloaded adapter gives other logits: they differ by {far:.3g}")
    return {"steps": result.steps, "device": seen["device"], "logits": "identical" if far == 0 else f"within {far:.1e}"}


def _logits(model: Any, ids: Any) -> Any:
    import torch

    was_training = model.training
    model.eval()
    with torch.inference_mode():
        found = model(input_ids=ids.to(model.device)).logits[0].float().cpu()
    model.train(was_training)
    return found


if __name__ == "__main__":
    main(sys.argv[1])
