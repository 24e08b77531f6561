"""Hold what a host trained to the tests of our own runs: rows, targets, adapter and checkpoints; print a line of JSON.

python tools/check_host_run.py BASE CHATS.jsonl ROWS.jsonl OUTPUT_DIR [ADAPTER]
"""

import json
import sys
from pathlib import Path


def check_rows(base: str, chats: Path, seen: Path) -> dict:
    """How many of the rows that the host's Trainer got have the published template's ids and exact labels."""
    from phi3_lora_plugin import encode, load_tokenizer

    tokenizer = load_tokenizer(base)
    wanted = {}
    for line in chats.read_text(encoding="utf-8").splitlines():
        row = cut(encode(json.loads(line)["messages"], tokenizer))
        wanted[tuple(row["input_ids"])] = row["labels"]
    got = [cut(json.loads(line)) for line in seen.read_text(encoding="utf-8").splitlines()]
    same_ids = [row for row in got if tuple(row["input_ids"]) in wanted]
    exact = [row for row in same_ids if row["labels"] == wanted[tuple(row["input_ids"])] and not row["trained_padding"]]
    found = {"rows": len(got), "ids": len(same_ids), "labels": len(exact)}
    if got and len(exact) < len(got):
        odd = next(row for row in got if row not in exact)
        # Decoded one by one, because decoding a row hides white space.
        found["trained"] = [tokenizer.decode([label]) for label in odd["labels"] if label != -100][-3:]
        found["begins"] = [tokenizer.decode([token]) for token in odd["input_ids"][:3]]
        found["ends"] = [tokenizer.decode([token]) for token in odd["input_ids"][-3:]]
    return found


def cut(row: dict) -> dict:
    """The row without what comes after its last trained token, which no trained token sees."""
    end = max((number for number, label in enumerate(row["labels"], 1) if label != -100), default=0)
    return row | {"input_ids": row["input_ids"][:end], "labels": row["labels"][:end]}


def check_adapter(base: str, adapter: Path) -> dict:
    """Whether LoRA is on every projection of every layer, has been trained, and loads into the base with plain PEFT."""
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from phi3_lora_plugin.inspect.weights import weights_problems
    from phi3_lora_plugin.model.families import projections

    config = json.loads((Path(base) / "config.json").read_text(encoding="utf-8"))
    state = load_file(adapter / "adapter_model.safetensors")
    missing = [
        f"{layer}.{projection.path}"
        for layer in range(config["num_hidden_layers"])
        for projection in projections(config)
        if not any(f"layers.{layer}.{projection.path}.lora_B" in key for key in state)
    ]
    untrained = [key for key, value in state.items() if "lora_B" in key and not value.any()]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    problems = weights_problems(adapter)
    found = {"tensors": len(state), "missing": missing, "untrained": untrained, "problems": list(problems)}
    return found | {"loads": type(model).__name__}


def main() -> None:
    base, chats, seen, out, *given = sys.argv[1:]
    from phi3_lora_plugin import latest_complete, verify

    found: dict = {"rows": check_rows(base, Path(chats), Path(seen)) if Path(seen).is_file() else None}
    folder = Path(given[0]) if given else Path(out)
    if (folder / "adapter_config.json").is_file():
        found["adapter"] = check_adapter(base, folder)
    newest = latest_complete(out)
    if newest is not None:
        report = verify(newest)
        found["checkpoint"] = {"step": report.step, "ok": bool(report), "problems": list(report.problems)}
        found["our_adapter"] = check_adapter(base, newest)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
