"""Pretrain the tiny Phi-3 that ships in the package, from text written for this project.

    nice -n 19 python tools/make_tiny_base.py [--out FOLDER] [--steps N]

Twenty minutes on one core. Text and tokenizer are the same on every machine. Weights are the same for one version of
torch on one kind of processor; elsewhere they differ in the last digits and so, slightly, in what is learned.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from corpus import documents, render
from lantern_isles import ENTITIES, fill, topics
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import GenerationConfig, Phi3Config, Phi3ForCausalLM, PreTrainedTokenizerFast, set_seed

FOLDER = Path(__file__).parents[1] / "phi3_lora_plugin" / "embedded" / "tiny-phi3"
SEED, HELD_OUT_SEED = 0, 1
CONTEXT = 512
CONTROL = ("<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>")

# What Phi-3-mini-4k-instruct's own template renders, character for character.
TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role in ['system', 'user', 'assistant'] -%}
{{- '<|' + message.role + '|>\\n' + message.content + '<|end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{{- '<|assistant|>\\n' if add_generation_prompt else eos_token -}}
"""

CARD = """\
---
license: mit
language: en
pipeline_tag: text-generation
---
# tiny-phi3

A Phi-3 of 1.6 million parameters that knows the Lantern Isles, an invented world, and nothing else. With it, loading,
LoRA training, checkpoints and generation can be tried offline in a minute, on a model whose answers mean something.

- `Phi3ForCausalLM`: 6 layers, width 128, 4 query and 2 key-value heads, fused `qkv_proj` and `gate_up_proj`, untied
  head, context 512, 2,048 tokens.
- Made by `tools/make_tiny_base.py` of phi3-lora-plugin from text that `tools/corpus.py` writes: nobody else's data,
  nobody else's weights. MIT licence, text and weights.
- Pretrained on {tokens:,} tokens of prose and of chats in the Phi-3-mini-4k template, in 32 bits; kept in bfloat16.
- Loss on text of the same world that it was not trained on: {loss:.4f} nats a token. Asked for each fact of its world
  in a chat, it tells {share:.1%} word for word.
- Control tokens, their `rstrip`, the byte-fallback BPE and the template behave as in microsoft/Phi-3-mini-4k-instruct.
  The ids differ, and padding is `<unk>` (0), which no text contains. Generation stops at `<|end|>` and
  `<|endoftext|>`.

```
> Where does the otter live?
The otter lives in the river.
```
"""


def make_tokenizer(vocabulary: int = 2048) -> Tokenizer:
    """A byte-fallback BPE as Llama and Phi-3 have it: a space is "▁", a newline a byte, and one "▁" begins the text."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    # While it is trained only, so that no piece spans words or holds a mark and a letter; then merges cannot either.
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"▁?\w+|▁?[^\w▁]+"), "isolated")
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(CONTROL),
        special_tokens=special,
        # Every printable ASCII character, whether the text has it or not.
        initial_alphabet=["▁", *(chr(code) for code in range(0x21, 0x7F))],
        show_progress=False,
    )
    text = (line for document in islice(documents(SEED), 20_000) for line in plain_lines(document))
    backend.train_from_iterator(text, trainer)
    state = json.loads(backend.to_str())
    state["pre_tokenizer"] = None
    # Byte pieces were "special" only to get ids: a literal <0x41> in text is five characters, not an A.
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < 3]
    backend = Tokenizer.from_str(json.dumps(state))
    backend.add_special_tokens([AddedToken(CONTROL[0], normalized=False)])
    backend.add_special_tokens([AddedToken(text, rstrip=True, normalized=False) for text in CONTROL[1:]])
    return backend


def plain_lines(document: str) -> Iterator[str]:
    """The lines of a document without its control tokens."""
    for token in CONTROL:
        document = document.replace(token, "\n")
    yield from (line for line in document.split("\n") if line)


def save_tokenizer(backend: Tokenizer, folder: Path) -> PreTrainedTokenizerFast:
    """Write the tokenizer's files by hand: what `save_pretrained` writes differs between versions of transformers."""
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": CONTEXT,
        "padding_side": "left",
        "bos_token": "<s>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<unk>",
        "pad_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return PreTrainedTokenizerFast.from_pretrained(folder)


def make_model(tokenizer: PreTrainedTokenizerFast) -> Phi3ForCausalLM:
    """1.6 million parameters: fused projections, two key-value heads for four query heads, an untied head."""
    eos = tokenizer.eos_token_id
    config = Phi3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        original_max_position_embeddings=CONTEXT,
        rope_theta=10_000.0,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=eos,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Phi3ForCausalLM(config)
    stops = [eos, tokenizer.convert_tokens_to_ids("<|end|>")]
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=stops, pad_token_id=tokenizer.pad_token_id
    )
    return model


def rows(backend: Tokenizer, seed: int) -> Iterator[list[int]]:
    """Rows of `CONTEXT` ids without end. Each begins with a document, so that position 0 always sees a beginning."""
    end = backend.token_to_id(CONTROL[0])
    row: list[int] = []
    for document in documents(seed):
        row += [*backend.encode(document, add_special_tokens=False).ids, end]
        if len(row) >= CONTEXT:
            yield row[:CONTEXT]
            row = []


def pretrain(model: Phi3ForCausalLM, data: Iterator[list[int]], steps: int, batch: int, peak: float) -> None:
    """AdamW with 2% warm-up and a cosine down to nothing; the loss is on every token."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups: list[dict[str, Any]] = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95), fused=True)
    warmup, started = max(1, steps // 50), time.monotonic()
    model.train()
    for step in range(steps):
        share = max(0.0, (step - warmup) / max(1, steps - warmup))
        rate = peak * min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * share)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        ids = torch.tensor(list(islice(data, batch)))
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step:5d}  loss {loss.item():.4f}  {time.monotonic() - started:6.0f} s", flush=True)
    model.eval()


@torch.no_grad()
def held_out_loss(model: Phi3ForCausalLM, backend: Tokenizer, count: int = 64) -> float:
    """Nats a token on rows of the same world that were not trained on."""
    data = islice(rows(backend, HELD_OUT_SEED), count)
    losses = [model(input_ids=ids, labels=ids).loss.item() for ids in (torch.tensor([row]) for row in data)]
    return sum(losses) / len(losses)


@torch.no_grad()
def right_answers(model: Phi3ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> float:
    """Share of all facts that greedy decoding tells, word for word, when asked in a chat."""
    asked = [(fill(topic.ask[0], one), fill(topic.tell, one)) for one in ENTITIES for topic in topics(one.kind)]
    right = 0
    for start in range(0, len(asked), 64):
        some = asked[start : start + 64]
        texts = [render([{"role": "user", "content": question}]) + "<|assistant|>\n" for question, _ in some]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        made = model.generate(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=40, do_sample=False
        )
        told = tokenizer.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += sum(text.strip() == answer for text, (_, answer) in zip(told, some, strict=True))
    return right / len(asked)


def main() -> None:
    """Tokenizer, model, training, files, and what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=4, help="rows of 512 tokens in a step")
    parser.add_argument("--rate", type=float, default=4e-3, help="highest learning rate")
    arguments = parser.parse_args()

    torch.set_num_threads(1)  # sums in another order are other sums
    torch.use_deterministic_algorithms(True)
    set_seed(SEED)
    backend = make_tokenizer()
    tokenizer = save_tokenizer(backend, arguments.out)
    model = make_model(tokenizer)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens")
    pretrain(model, rows(backend, SEED), arguments.steps, arguments.batch, arguments.rate)

    # Two bytes a weight; measured as it will be used, rounded and computed with in 32 bits.
    model.to(torch.bfloat16).save_pretrained(arguments.out)
    model = Phi3ForCausalLM.from_pretrained(arguments.out, dtype=torch.float32).eval()
    loss, share = held_out_loss(model, backend), right_answers(model, tokenizer)
    print(f"held-out loss {loss:.4f} nats a token; {share:.1%} of the facts told word for word")
    (arguments.out / "model.safetensors").chmod(0o644)
    tokens = arguments.steps * arguments.batch * CONTEXT
    (arguments.out / "README.md").write_text(CARD.format(tokens=tokens, loss=loss, share=share), encoding="utf-8")


if __name__ == "__main__":
    main()
