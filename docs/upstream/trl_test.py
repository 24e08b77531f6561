"""For tests/test_chat_template_utils.py of TRL: a Phi-3 template spelled differently that renders the same."""

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from trl.chat_template_utils import get_training_chat_template, phi3_chat_template, phi3_training_chat_template


def test_phi3_template_is_found_by_what_it_renders():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), eos_token="<|endoftext|>")
    tokenizer.chat_template = "{#- another revision -#}" + phi3_chat_template
    assert get_training_chat_template(tokenizer) == phi3_training_chat_template
