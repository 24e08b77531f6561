"""The calls of TRL's example for ORPO; for CPO with `--cpo`, which its example shares but for two names. Our words."""

import sys

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser
from trl import ModelConfig, ScriptArguments, get_peft_config

if "--cpo" in sys.argv:
    sys.argv.remove("--cpo")
    from trl.experimental.cpo import CPOConfig as Settings
    from trl.experimental.cpo import CPOTrainer as PairTrainer
else:
    from trl.experimental.orpo import ORPOConfig as Settings
    from trl.experimental.orpo import ORPOTrainer as PairTrainer

if __name__ == "__main__":
    script, settings, given = HfArgumentParser((ScriptArguments, Settings, ModelConfig)).parse_args_into_dataclasses()
    model = AutoModelForCausalLM.from_pretrained(given.model_name_or_path)
    tokenizer = AutoTokenizer.from_pretrained(given.model_name_or_path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    rows = load_dataset(script.dataset_name, name=script.dataset_config)
    trainer = PairTrainer(
        model,
        args=settings,
        train_dataset=rows[script.dataset_train_split],
        eval_dataset=rows[script.dataset_test_split] if settings.eval_strategy != "no" else None,
        processing_class=tokenizer,
        peft_config=get_peft_config(given),
    )
    trainer.train()
    trainer.save_model(settings.output_dir)
