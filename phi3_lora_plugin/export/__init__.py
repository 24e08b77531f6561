"""Adapters for other tools.

In: an adapter, and its base if the target needs one. Out: merged models and other formats, compared with the original.
Never: leaves a half-written folder, or writes what it has not compared.
"""
