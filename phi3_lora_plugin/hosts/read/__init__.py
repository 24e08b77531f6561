"""Another host's config as a recipe: the other direction of hosts/render.

In: a config as plain data. Out: a recipe's sections, and a sentence for each key that has no equal.
Never: imports the host.
"""
