"""A callback that keeps the losses of a run as a table."""

import csv
from pathlib import Path

from transformers import TrainerCallback


class LossLog(TrainerCallback):
    """Write one line per logged loss to `loss_log.csv` in the output folder: step, which loss, its value."""

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.path = Path(args.output_dir) / "loss_log.csv"
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text("step,name,value\n", encoding="utf-8")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and hasattr(self, "path"):  # a first evaluation comes before training begins
            with self.path.open("a", encoding="utf-8", newline="") as file:
                rows = [(state.global_step, name, logs[name]) for name in ("loss", "eval_loss") if name in (logs or {})]
                csv.writer(file, lineterminator="\n").writerows(rows)
