"""An export target: the merged model in a folder of the help desk, next to a script that answers one ticket."""

import shutil
from contextlib import contextmanager

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from phi3_lora_plugin.export.exporter import Shipped, Variant, refuse

ASK = """import sys
from pathlib import Path
from transformers import pipeline

ask = pipeline("text-generation", str(Path(__file__).parent), dtype="float32")
chat = [{"role": "user", "content": sys.argv[1]}]
print(ask(chat, max_new_tokens=64, do_sample=False)[0]["generated_text"][-1]["content"])
"""


class Transformers:
    """The folder as the script will load it; the proof asks it the same as base and adapter."""

    measure = "logits"

    def __init__(self, folder):
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def prompt_ids(self, messages):
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)

    def next_scores(self, ids):
        with torch.inference_mode():
            return self.model(input_ids=torch.tensor([list(ids)])).logits[0, -1].numpy()

    def answer(self, ids, max_new_tokens):
        prompt = torch.tensor([list(ids)])
        with torch.inference_mode():
            made = self.model.generate(prompt, max_new_tokens=max_new_tokens, do_sample=False)
        return made[0, len(ids) :].tolist()


def export(adapted, wanted, folder):
    """Write `folder`; the command saves it only if the answers are the adapter's."""
    refuse("help-desk", wanted, forms=(True,))
    shutil.copytree(adapted.merged(), folder, dirs_exist_ok=True)
    (folder / "ask.py").write_text(ASK, encoding="utf-8")

    @contextmanager
    def opened():
        yield Transformers(folder)

    return Shipped(("python {out}/ask.py 'Where is my parcel?'",), (Variant("merged, float32", opened),))
