"""Prove an adapter: a fresh process that knows only transformers and peft must give the logits that we have here."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi3_lora_plugin.error import Phi3LoraError
from phi3_lora_plugin.model.logits import logit_limit

# Runs in a process of its own and imports nothing of ours: what it loads, everybody can load.
_SCRIPT = """
import json, sys
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
ask = json.load(open(sys.argv[1]))
model = AutoModelForCausalLM.from_pretrained(ask["base"], revision=ask["revision"], dtype=getattr(torch, ask["dtype"]))
model = PeftModel.from_pretrained(model, ask["adapter"]).to(ask["device"]).eval()
with torch.inference_mode():
    logits = model(input_ids=torch.tensor([ask["ids"]], device=ask["device"])).logits[0].float().cpu()
save_file({"logits": logits.contiguous()}, sys.argv[2])
"""


class ReloadError(Phi3LoraError, RuntimeError):
    """The saved adapter does not give the logits of the model it was saved from."""


@dataclass(frozen=True)
class ReloadCheck:
    """Outcome of a reload: largest difference of a logit, and how many logits were compared."""

    largest_difference: float
    logits: int


def reload_check(model: Any, adapter: Path, base: str, revision: str | None, ids: Sequence[int]) -> ReloadCheck:
    """Load `adapter` on `base` with plain PEFT in a fresh process and compare logits [tokens, vocabulary] with `model`.

    Raises:
        ReloadError: the process fails, or a logit differs by more than the dtype's rounding (`logit_limit`).
    """
    import torch
    from safetensors.torch import load_file

    was_training = model.training
    model.eval()
    # Under mixed precision, accelerate has put another forward in front (older ones one for training and one for
    # evaluation), which rounds what the fresh process does not: the class still has its own.
    with torch.inference_mode():
        logits = type(model).forward(model, input_ids=torch.tensor([list(ids)], device=model.device)).logits
    here = logits[0].float().cpu()
    model.train(was_training)
    dtype = str(model.get_input_embeddings().weight.dtype).removeprefix("torch.")
    asked: dict[str, Any] = {"base": base, "revision": revision, "adapter": str(adapter), "ids": list(ids)}
    asked |= {"dtype": dtype, "device": str(model.device)}
    with tempfile.TemporaryDirectory() as folder:
        ask, answer = Path(folder, "ask.json"), Path(folder, "answer.safetensors")
        ask.write_text(json.dumps(asked))
        done = subprocess.run([sys.executable, "-c", _SCRIPT, str(ask), str(answer)], capture_output=True, text=True)
        if done.returncode != 0:
            raise ReloadError(f"plain PEFT could not load {adapter} on {base}:\n{done.stderr.strip()[-2000:]}")
        there = load_file(answer)["logits"]
    difference = (here - there).abs().max().item()
    limit = logit_limit(dtype, here.abs().max().item())
    if not difference <= limit:
        raise ReloadError(
            f"{adapter} reloaded with plain PEFT gives other logits: they differ by up to {difference:.3g} in {dtype}; "
            f"expected at most {limit:.3g}. Do not use this adapter; please report it."
        )
    return ReloadCheck(difference, here.numel())
