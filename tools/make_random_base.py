"""A random Phi-3 of two layers, with the tokenizer of a given folder or of the embedded one.

python tools/make_random_base.py OUT [TOKENIZER_FOLDER]
"""

import shutil
import sys
from pathlib import Path

import torch
from transformers import Phi3Config, Phi3ForCausalLM

from phi3_lora_plugin import load_tokenizer
from phi3_lora_plugin.embedded import locate


def main() -> None:
    out = Path(sys.argv[1])
    source = Path(sys.argv[2] if len(sys.argv) > 2 else locate("embedded:tiny-phi3"))
    tokenizer = load_tokenizer(source)
    torch.manual_seed(0)
    config = Phi3Config(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        original_max_position_embeddings=4096,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    Phi3ForCausalLM(config).save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)


if __name__ == "__main__":
    main()
