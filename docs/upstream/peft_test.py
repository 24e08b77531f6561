"""For tests/test_tuners_utils.py of PEFT: LoRA without `target_modules` on Phi-3, whose projections are fused."""

from peft import LoraConfig, get_peft_model
from transformers import Phi3Config, Phi3ForCausalLM


def test_phi3_has_default_lora_targets():
    config = Phi3Config(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = get_peft_model(Phi3ForCausalLM(config), LoraConfig(r=2, task_type="CAUSAL_LM"))
    adapted = {name.rpartition(".")[2] for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert adapted == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
