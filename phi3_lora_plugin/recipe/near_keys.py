"""What other programs call a key of ours, for `did you mean`: nearness of spelling cannot find `training.lr`."""

from __future__ import annotations

#: The dotted keys of a recipe, and the words that other trainers, papers and people have for each. A key that is also a
#: setting of the trainer (`training.save_steps`) is not here: `recipe.training` explains those.
_WORDS = {
    "model.path": "base model base_model model_id model_name model_name_or_path model_path "
    "pretrained_model_name_or_path checkpoint id name repo",
    "model.dtype": "precision torch_dtype",
    "model.attention": "attn_implementation flash_attention",
    "model.device": "device_map",
    "model.quantize": "load_in_4bit load_in_8bit quantization quantization_bit bits qlora",
    "data.path": "data data_path dataset dataset_name dataset_path datasets file train_file train_path train_data",
    "data.eval_path": "eval_file val_dataset val_path validation validation_file",
    "data.eval_fraction": "test_size val_set_size val_size validation_split",
    "data.max_length": "context_length cutoff_len max_len max_seq_len max_seq_length model_max_length seq_len "
    "sequence_len",
    "data.max_rows": "limit max_samples",
    "data.packing": "sample_packing",
    "data.template": "chat_template",
    "lora.r": "lora_r lora_rank rank",
    "lora.alpha": "lora_alpha scale scaling",
    "lora.dropout": "lora_dropout",
    "lora.targets": "lora_target lora_target_modules modules target target_modules",
    "training.learning_rate": "lr rate",
    "training.num_train_epochs": "epochs num_epochs n_epochs",
    "training.max_steps": "iters max_iters num_steps steps train_steps",
    "training.per_device_train_batch_size": "batch batch_size bs micro_batch_size train_batch_size",
    "training.per_device_eval_batch_size": "eval_batch_size",
    "training.gradient_accumulation_steps": "accumulation grad_accum grad_accumulation",
    "training.lr_scheduler_type": "lr_scheduler schedule scheduler",
    "training.optim": "optimizer optimiser",
    "training.warmup_steps": "warmup",
    "training.weight_decay": "wd",
    "training.max_grad_norm": "clip grad_clip max_norm",
    "preference.beta": "beta dpo_beta",
    "checkpoint.every_steps": "save_every save_steps",
    "checkpoint.keep_last": "save_total_limit",
    "output_dir": "out out_dir output output_path save_dir",
    "seed": "random_seed",
}
OTHER_WORDS = {word: key for key, words in _WORDS.items() for word in words.split()}


def other_word(name: str) -> str | None:
    """The dotted key of ours for what others call `name`, with or without a section in front; None if unknown."""
    return OTHER_WORDS.get(name.rpartition(".")[2].lower().replace("-", "_"))
