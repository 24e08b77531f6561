"""How good a base or an adapter is.

In: a run, an adapter or a base, and held-out rows. Out: losses, answers and scores.
Never: trains, or writes into the run it looks at.
"""
