"""The calls of PEFT's example for OLoRA: no targets named, a Trainer that evaluates and picks its best. Our words."""

import sys

import torch
import transformers
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

base, data, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, device_map="auto")
tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=True)
if tokenizer.pad_token is None:
    tokenizer.pad_token = tokenizer.eos_token


def encoded(example):
    text = f"### Instruction:\n{example['instruction']}\n### Response:\n{example['output']}"
    row = tokenizer(text, truncation=True, max_length=256, padding=False, return_tensors=None)
    if row["input_ids"][-1] != tokenizer.eos_token_id and len(row["input_ids"]) < 256:
        row["input_ids"].append(tokenizer.eos_token_id)
        row["attention_mask"].append(1)
    row["labels"] = row["input_ids"].copy()
    return row


adapter = LoraConfig(
    r=8, lora_alpha=16, target_modules=None, lora_dropout=0.05, bias="none", task_type="CAUSAL_LM",
    init_lora_weights="olora",
)  # fmt: skip
model = get_peft_model(model, adapter)
splits = load_dataset(data)["train"].train_test_split(test_size=4, shuffle=True, seed=42)
trainer = transformers.Trainer(
    model=model,
    train_dataset=splits["train"].shuffle().map(encoded),
    eval_dataset=splits["test"].shuffle().map(encoded),
    args=transformers.TrainingArguments(
        per_device_train_batch_size=4,
        warmup_steps=100,
        num_train_epochs=1,
        learning_rate=3e-4,
        logging_steps=100,
        optim="adamw_torch",
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=1,
        save_steps=1,
        output_dir=out,
        save_total_limit=3,
        load_best_model_at_end=True,
    ),
    data_collator=transformers.DataCollatorForSeq2Seq(
        tokenizer, pad_to_multiple_of=8, return_tensors="pt", padding=True
    ),
)
trainer.train()
model.save_pretrained(out)
