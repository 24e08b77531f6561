"""One small module for each host.

In: a host's own config and calls. Out: the same rows, targets and checkpoints as `phi3-lora train` has.
Never: is imported unless that host is used, and keeps nothing on disk of its own.
"""
