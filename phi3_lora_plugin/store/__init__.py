"""Checkpoints on disk.

In: the bytes of an adapter and of the resume state. Out: folders that appear whole or not at all, verified and pruned.
Never: runs a model, or trusts a file whose hash does not match its manifest.
"""
