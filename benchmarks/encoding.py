"""`python -m benchmarks.encoding`: chats to ids and labels, us against TRL's preparation of the same rows.

    python -m benchmarks.encoding
    python -m benchmarks.encoding --data gsm8k.jsonl --columns '{"prompt": "question", "completion": "answer"}' \\
        --tokenizer phi-3-mini-4k-instruct/ --rows 1000 10000 100000

Ours reads the file, checks it, encodes it and sums it up; TRL gets its rows in memory. Both have the template that
marks the assistant's text, so ids and labels have to be equal: otherwise the command ends with exit code 1.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.workloads import conversations


def arguments() -> argparse.ArgumentParser:
    """What may be asked for on the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.encoding", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rows", type=int, nargs="*", default=[1000, 10_000])
    parser.add_argument("--pairs", type=int, default=5, help="interleaved rounds; medians are taken over them")
    parser.add_argument(
        "--data", type=Path, help="real chats instead of generated ones; repeated, with a number, if few"
    )
    parser.add_argument("--columns", type=json.loads, default={}, help="as data.columns, in JSON")
    parser.add_argument("--tokenizer", default="embedded:tiny-phi3", help="folder of a Phi-3 tokenizer")
    parser.add_argument("--max-length", type=int, default=2048)
    return parser


def main() -> int:
    """Print a line for each number of rows; 0 only if ids and labels are the same."""
    chosen = arguments().parse_args()
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    from phi3_lora_plugin import load_tokenizer

    tokenizer = load_tokenizer(chosen.tokenizer)
    chats = list(conversations(chosen.data, chosen.columns)) if chosen.data else list(_made_up(1000))
    parity = True
    with tempfile.TemporaryDirectory() as folder:
        _pair(_write(Path(folder, "warm.jsonl"), chats, 50), tokenizer, chosen.max_length)
        for count in chosen.rows:
            file = _write(Path(folder, f"{count}.jsonl"), chats, count)
            pairs = [_pair(file, tokenizer, chosen.max_length) for _ in range(chosen.pairs)]
            tokens = pairs[0]["tokens"]
            ours = tokens / statistics.median(pair["ours"] for pair in pairs)
            said = f"{count:>8,} rows, {tokens:>11,} tokens: ours {ours:>11,.0f} tokens/s"
            if "trl" in pairs[0]:
                same = all(pair["same"] for pair in pairs)
                parity &= same
                ratios = sorted(pair["trl"] / pair["ours"] for pair in pairs)
                said += f", TRL {tokens / statistics.median(pair['trl'] for pair in pairs):>9,.0f}, ratio "
                said += f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}), "
                said += f"ids and labels {'equal' if same else 'DIFFER'}"
            else:
                said += ", TRL is not here"
            print(said, flush=True)
    return 0 if parity else 1


def _pair(file: Path, tokenizer: Any, max_length: int) -> dict[str, Any]:
    """One round: seconds of both, and whether they made the same; of ours alone where TRL is not installed."""
    from phi3_lora_plugin import load_recipe
    from phi3_lora_plugin.chat.dataset import load_data
    from phi3_lora_plugin.chat.templates import template_for

    recipe = load_recipe("tiny-cpu", [f"data.path={file}", "data.eval_path=null", f"data.max_length={max_length}"])
    started = time.perf_counter()
    ours = load_data(recipe, tokenizer, {})
    seconds = time.perf_counter() - started
    if find_spec("trl") is None:
        return {"ours": seconds, "tokens": ours.report.train.tokens}
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    marked = deepcopy(tokenizer)
    marked.chat_template = template_for(tokenizer).text
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder, max_length=max_length, assistant_only_loss=True, report_to="none", use_cpu=True
        )
        model = _model(len(tokenizer))
        rows = Dataset.from_list([json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()])
        started = time.perf_counter()
        theirs = SFTTrainer(model, arguments, train_dataset=rows, processing_class=marked).train_dataset
        trl = time.perf_counter() - started
    same = all(ours.train[name][:] == theirs[name][:] for name in ("input_ids", "labels"))
    return {"ours": seconds, "trl": trl, "same": same, "tokens": ours.report.train.tokens}


def _model(vocabulary: int) -> Any:
    """The smallest Phi-3: SFTTrainer prepares no data without a model."""
    from transformers import Phi3Config, Phi3ForCausalLM

    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, pad_token_id=0)
    return Phi3ForCausalLM(Phi3Config(vocab_size=vocabulary, **sizes))


def _write(file: Path, chats: list[Any], count: int) -> Path:
    """`count` rows; a chat that comes again has a number in front, so that nothing is cheaper than it would be."""
    with file.open("w", encoding="utf-8") as out:
        for number in range(count):
            messages = [dict(message) for message in chats[number % len(chats)]]
            if number >= len(chats):
                messages[0]["content"] = f"({number}) {messages[0]['content']}"
            out.write(json.dumps({"messages": messages}) + "\n")
    return file


def _made_up(count: int) -> Iterator[Any]:
    """Word problems of about the length of GSM8K's."""
    draw = random.Random(0)
    names = ["Ana", "Bo", "Cleo", "Dmitri", "Emeka", "Farah"]
    things = ["apples", "stamps", "marbles", "pencils", "biscuits", "shells"]
    for _ in range(count):
        name, thing = draw.choice(names), draw.choice(things)
        steps = [draw.randint(2, 99) for _ in range(draw.randint(3, 9))]
        story = " ".join(f"Then {name} finds {step} more {thing} and puts them into a box." for step in steps)
        total, lines = 0, []
        for step in steps:
            lines.append(f"{total} + {step} = {total + step} {thing} are in the box after that.")
            total += step
        yield [
            {"role": "user", "content": f"{name} has an empty box. {story} How many {thing} are in the box now?"},
            {"role": "assistant", "content": "\n".join([*lines, f"#### {total}"])},
        ]


if __name__ == "__main__":
    sys.exit(main())
