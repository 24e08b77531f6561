"""The base model and its tokenizer.

In: a folder, `embedded:NAME` or hub id. Out: a config, a tokenizer, or a loaded model that stops where it should.
Never: runs remote code, reads a pickle, or knows about LoRA.
"""
