"""Memory, steps and tokens of a run before it starts.

In: a recipe. Out: a `Plan` of what it takes and whether it fits.
Never: loads weights or needs the device that it plans for.
"""
