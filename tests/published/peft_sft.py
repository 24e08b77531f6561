"""The calls of PEFT's SFT example: a template of its own with new tokens, a resized base, named targets. Our words."""

import sys

from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, set_seed
from trl import SFTConfig, SFTTrainer

CHATML = (
    "{% for message in messages %}\n{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + "
    "'\n'}}{% if loop.last and add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}{% endfor %}"
)
SPECIAL = ["<|im_start|>user", "<|im_start|>assistant", "<|im_start|>system", "<|im_end|>", "<s>", "<pad>"]

base, data = sys.argv[1:3]
(settings,) = HfArgumentParser(SFTConfig).parse_args_into_dataclasses(sys.argv[3:])
set_seed(settings.seed)
model = AutoModelForCausalLM.from_pretrained(base, trust_remote_code=True, dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(
    base, pad_token="<pad>", bos_token="<s>", eos_token="<|im_end|>", additional_special_tokens=SPECIAL,
    trust_remote_code=True,
)  # fmt: skip
tokenizer.chat_template = CHATML
model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=8)
model.config.use_cache = not settings.gradient_checkpointing
if settings.gradient_checkpointing:
    settings.gradient_checkpointing_kwargs = {"use_reentrant": False}
settings.dataset_kwargs = {"append_concat_token": False, "add_special_tokens": False}


def rendered(rows):
    return {"content": [tokenizer.apply_chat_template(chat, tokenize=False) for chat in rows["messages"]]}


raw = load_dataset(data)
raw = raw.map(rendered, batched=True, remove_columns=raw["train"].column_names)
trainer = SFTTrainer(
    model=model,
    processing_class=tokenizer,
    args=settings,
    train_dataset=raw["train"],
    eval_dataset=raw["test"],
    peft_config=LoraConfig(
        r=8, lora_alpha=16, lora_dropout=0.1, bias="none", task_type="CAUSAL_LM", target_modules="all-linear"
    ),
)
trainer.accelerator.print(f"{trainer.model}")
if hasattr(trainer.model, "print_trainable_parameters"):
    trainer.model.print_trainable_parameters()
trainer.train(resume_from_checkpoint=settings.resume_from_checkpoint)
if trainer.is_fsdp_enabled:
    trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
trainer.save_model()
