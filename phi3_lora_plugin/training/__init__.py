"""What a Trainer needs from us.

In: a recipe's arguments, a Trainer. Out: callbacks that save, resume and stop a run, and `attach` for scripts.
Never: loads data or a model by itself.
"""
