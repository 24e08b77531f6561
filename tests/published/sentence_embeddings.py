"""An embedding model on Phi with a LoRA adapter, trained by sentence-transformers as its documentation shows."""

import sys

from datasets import Dataset
from peft import LoraConfig, TaskType
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.losses import MultipleNegativesRankingLoss
from sentence_transformers.models import Pooling, Transformer

base, out = sys.argv[1:]
words = Transformer(base, max_seq_length=32)
model = SentenceTransformer(modules=[words, Pooling(words.get_word_embedding_dimension(), "mean")], device="cpu")
model.add_adapter(
    LoraConfig(
        task_type=TaskType.FEATURE_EXTRACTION, r=4, lora_alpha=8, lora_dropout=0.0,
        target_modules=["qkv_proj", "o_proj"],
    )
)  # fmt: skip
rows = Dataset.from_dict({"anchor": ["what is two?", "the quick fox"] * 4, "positive": ["it is two.", "a dog"] * 4})
trainer = SentenceTransformerTrainer(
    model=model,
    args=SentenceTransformerTrainingArguments(
        out, max_steps=2, per_device_train_batch_size=2, use_cpu=True, report_to="none"
    ),
    train_dataset=rows,
    loss=MultipleNegativesRankingLoss(model),
)
trainer.train()
model.save_pretrained(f"{out}/final")
