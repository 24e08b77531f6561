"""A plain Trainer script that finds its Phi-3 parts by discovery: recipe, model loader, data format, callbacks.

python examples/host.py [RECIPE] [KEY=VALUE]...
"""

import sys

from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from phi3_lora_plugin import add_lora, encode, latest_complete, load_plugins, load_recipe

ANSWERS = {
    "What can this host do?": "It can train.",
    "Who loads the model?": "A plugin does.",
    "Who reads the rows?": "An adapter does.",
    "Who saves what was learned?": "A callback does.",
}
ROWS = [{"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]} for q, a in ANSWERS.items()]


def main(name: str = "tiny-cpu", *overrides: str) -> None:
    plugins = load_plugins()
    recipe = load_recipe(name, overrides, find=lambda wanted: plugins.pick("recipes", wanted))
    model, tokenizer = plugins.pick("models", recipe.model.loader)(recipe)
    adapt = plugins.pick("dataset_adapters", "sharegpt")
    rows = [encode(adapt(row), tokenizer, max_length=recipe.data.max_length) for row in ROWS]
    lora = recipe.lora
    arguments = {"output_dir": recipe.output_dir, "seed": recipe.seed, "save_strategy": "no", "report_to": "none"}
    arguments |= {"use_cpu": recipe.model.device == "cpu", **recipe.training}
    trainer = Trainer(
        model=add_lora(model, targets=lora.targets, r=lora.r, alpha=lora.alpha, dropout=lora.dropout),
        args=TrainingArguments(**arguments),
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),
        callbacks=plugins.callbacks(recipe),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss from {losses[0]:.3f} to {losses[-1]:.3f}; adapter saved to {latest_complete(recipe.output_dir)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
