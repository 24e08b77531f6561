"""Run a module as `python -m` would, and write down the batches that its Trainer is about to train on.

    python tools/watch_rows.py ROWS.jsonl MODULE WORD...

Whatever host it is, in the end it hands batches to a `transformers.Trainer`; what is in them is what is trained.
"""

import json
import runpy
import sys
from pathlib import Path

import transformers

BATCHES = 8


def rows_of(batch: dict) -> list[dict]:
    """Rows without their padding, which is where the attention mask is 0 (or, without a mask, what is untrained)."""
    ids, labels = batch["input_ids"].tolist(), batch["labels"].tolist()
    mask = batch["attention_mask"].tolist() if batch.get("attention_mask") is not None else [[1] * len(i) for i in ids]
    return [
        {
            "input_ids": [token for token, seen in zip(row, there, strict=True) if seen],
            "labels": [label for label, seen in zip(wanted, there, strict=True) if seen],
            "trained_padding": sum(label != -100 for label, seen in zip(wanted, there, strict=True) if not seen),
        }
        for row, wanted, there in zip(ids, labels, mask, strict=True)
    ]


def main() -> None:
    out, module, *words = sys.argv[1:]
    original = transformers.Trainer.train

    def train(self, *args, **kwargs):
        if self.is_world_process_zero():
            with Path(out).open("w", encoding="utf-8") as file:
                for number, batch in enumerate(self.get_train_dataloader()):
                    if number == BATCHES:
                        break
                    file.writelines(json.dumps(row) + "\n" for row in rows_of(batch))
        return original(self, *args, **kwargs)

    transformers.Trainer.train = train
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
