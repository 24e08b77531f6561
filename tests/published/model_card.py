"""The calls of the model card's fine-tuning script of 2024, with the arguments that it passes, in our words."""

import logging
import sys

import datasets
import torch
import transformers
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments
from trl import SFTTrainer

settings = TrainingArguments(
    bf16=True,
    do_eval=False,
    learning_rate=5.0e-06,
    log_level="info",
    logging_steps=20,
    logging_strategy="steps",
    lr_scheduler_type="cosine",
    num_train_epochs=1,
    max_steps=-1,
    output_dir="./checkpoint_dir",
    overwrite_output_dir=True,
    per_device_eval_batch_size=4,
    per_device_train_batch_size=4,
    remove_unused_columns=True,
    save_steps=100,
    save_total_limit=1,
    seed=0,
    gradient_checkpointing=True,
    gradient_checkpointing_kwargs={"use_reentrant": False},
    gradient_accumulation_steps=1,
    warmup_ratio=0.2,
)
adapter = LoraConfig(
    r=16, lora_alpha=32, lora_dropout=0.05, bias="none", task_type="CAUSAL_LM", target_modules="all-linear"
)

logger = logging.getLogger(__name__)
logging.basicConfig(handlers=[logging.StreamHandler(sys.stdout)])
level = settings.get_process_log_level()
logger.setLevel(level)
datasets.utils.logging.set_verbosity(level)
transformers.utils.logging.set_verbosity(level)
transformers.utils.logging.enable_default_handler()
transformers.utils.logging.enable_explicit_format()
logger.warning(f"rank {settings.local_rank}, device {settings.device}, {settings.n_gpu} GPUs, fp16 {settings.fp16}")

base = "microsoft/Phi-3-mini-4k-instruct"
model = AutoModelForCausalLM.from_pretrained(
    base,
    use_cache=False,
    trust_remote_code=True,
    attn_implementation="flash_attention_2",
    torch_dtype=torch.bfloat16,
    device_map=None if "--no-map" in sys.argv else "cuda",
)
tokenizer = AutoTokenizer.from_pretrained(base)
tokenizer.model_max_length = 2048
tokenizer.pad_token = tokenizer.unk_token
tokenizer.pad_token_id = tokenizer.convert_tokens_to_ids(tokenizer.pad_token)
tokenizer.padding_side = "right"


def rendered(example, tokenizer):
    example["text"] = tokenizer.apply_chat_template(example["messages"], tokenize=False, add_generation_prompt=False)
    return example


raw = load_dataset("HuggingFaceH4/ultrachat_200k")
splits = {
    name: raw[name].map(
        rendered, fn_kwargs={"tokenizer": tokenizer}, num_proc=2, remove_columns=list(raw[name].features), desc=name
    )
    for name in ("train_sft", "test_sft")
}
trainer = SFTTrainer(
    model=model,
    args=settings,
    peft_config=adapter,
    train_dataset=splits["train_sft"],
    eval_dataset=splits["test_sft"],
    max_seq_length=2048,
    dataset_text_field="text",
    tokenizer=tokenizer,
    packing=True,
)
metrics = trainer.train().metrics
trainer.log_metrics("train", metrics)
trainer.save_metrics("train", metrics)
trainer.save_state()
tokenizer.padding_side = "left"
metrics = trainer.evaluate()
metrics["eval_samples"] = len(splits["test_sft"])
trainer.log_metrics("eval", metrics)
trainer.save_metrics("eval", metrics)
trainer.save_model(settings.output_dir)
