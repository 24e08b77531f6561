"""Proof that a merged model is the adapted one: its files against the base's, its logits against PEFT's."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi3_lora_plugin.export.merge_plan import HEAD, VerificationError
from phi3_lora_plugin.lora_files.peft_files import loadable
from phi3_lora_plugin.model.folder import read_json
from phi3_lora_plugin.model.logits import logit_limit
from phi3_lora_plugin.model.shards import Weights
from phi3_lora_plugin.model.tokenizer import load_tokenizer
from phi3_lora_plugin.wording import listed

if TYPE_CHECKING:
    from torch import Tensor


def check_written(stage: Path, weights: Weights, untied: bool) -> None:
    """The files hold every weight of the base, in its shape, and nothing else."""
    written = Weights(stage)
    expected = set(weights) | ({HEAD} if untied else set())
    wrong = [name for name in expected if name not in written] + [name for name in written if name not in expected]
    wrong += [name for name in weights if name in written and written.shape(name) != weights.shape(name)]
    if wrong:
        raise VerificationError(f"the written files do not have the base's weights: {listed(sorted(wrong))}")


def fits(total_bytes: int, dtype: str) -> bool:
    """Whether the model is likely to fit into free memory in float32."""
    needed = total_bytes * (1 if dtype == "float32" else 2)
    if "SC_AVPHYS_PAGES" not in os.sysconf_names:
        return needed < 4e9
    return needed * 1.5 < os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def sample_ids(vocabulary: int, length: int = 24) -> Any:
    """Two rows of token ids, always the same for one vocabulary: (2, length)."""
    import torch

    return torch.randint(0, vocabulary, (2, length), generator=torch.Generator().manual_seed(0))


def compare_logits(stage: Path, source: Path, adapter: Path, dtype: str, quantize: str) -> tuple[float, float]:
    """(largest logit difference from PEFT's model, largest effect of the adapter); one model is in memory at a time."""
    import torch

    from phi3_lora_plugin.model.load import load_model

    ids = sample_ids(read_json(stage / "config.json")["vocab_size"])
    plain, wanted = _trained_logits(source, adapter, ids, quantize)
    with torch.inference_mode():
        got = load_model(str(stage), dtype="float32", attention="eager", device="cpu").eval()(input_ids=ids).logits
    difference = float((got - wanted).abs().max())
    # A quantised model computes in 16 bits, so no closer agreement can be asked of it.
    limit = logit_limit(dtype if quantize == "none" else "bfloat16", float(wanted.abs().max()))
    if not difference <= limit:  # also where it is not a number
        raise VerificationError(
            f"the merged model's logits differ from PEFT's by {difference:.2e}, more than {limit:.2e}; nothing written"
        )
    return difference, float((wanted - plain).abs().max())


def _trained_logits(source: Path, adapter: Path, ids: Any, quantize: str) -> tuple[Tensor, Tensor]:
    """(logits of the base, logits with the adapter on it), float32 on the CPU."""
    import torch

    from phi3_lora_plugin.model.load import load_model

    where = {"dtype": "float32", "device": "cpu"} if quantize == "none" else {"quantize": quantize}
    model = load_model(str(source), attention="eager", **where).eval()
    with torch.inference_mode():
        plain = model(input_ids=ids.to(model.device)).logits.float().cpu()
        adapted = with_adapter(model, adapter)
        return plain, adapted(input_ids=ids.to(model.device)).logits.float().cpu()


def with_adapter(model: Any, adapter: Path) -> Any:
    """The model with an adapter on it by PEFT, ready to be asked."""
    from peft import PeftModel

    with warnings.catch_warnings(), loadable(adapter) as folder:
        # PEFT asks for a name that transformers has deprecated.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        return PeftModel.from_pretrained(model, str(folder)).eval()


def quantization_loss(stage: Path, source: Path, adapter: Path, kind: str, dequantized: bool) -> str:
    """What the merge changed against the model that was trained: quantised base and adapter."""
    import torch

    from phi3_lora_plugin.model.load import load_model

    merged = load_model(str(stage), dtype="float32", attention="eager", device="cpu").eval()
    ids = _text_ids(stage, merged.config.vocab_size)
    with torch.inference_mode():
        ours = merged(input_ids=ids).logits.float()
    del merged
    _, trained = _trained_logits(source, adapter, ids, kind)
    loss = [
        float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
        for logits in (trained, ours)
    ]
    onto = "the values of the quantised base" if dequantized else "the unquantised base"
    return (
        f"trained on a {kind} base and merged onto {onto}: logits differ from the trained model's by up to "
        f"{float((trained - ours).abs().max()):.2e}, {float((trained - ours).abs().mean()):.2e} on average; loss on a "
        f"sample text {loss[0]:.4f} before, {loss[1]:.4f} merged"
    )


def _text_ids(folder: Path, vocabulary: int) -> Any:
    """Ids of a few plain sentences, or random ones where the folder has no tokenizer."""
    import torch

    if not (folder / "tokenizer.json").is_file():
        return sample_ids(vocabulary)
    text = "Once upon a time there was a little dog. It liked to run and play outside with its friends every day."
    return torch.tensor([load_tokenizer(folder)(text)["input_ids"]])
