"""LoRA tensors by name and layout, as files have them.

In: tensors and settings as PEFT, loralib, torchtune or a Trainer wrote them. Out: the same adapter in another layout.
Never: needs a model in memory, or decides where a file is written.
"""
