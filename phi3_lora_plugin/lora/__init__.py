"""LoRA on a model in memory.

In: a base model, targets, rank and alpha. Out: a PEFT model with checked coverage, and its LoRA-only state.
Never: touches the disk.
"""
