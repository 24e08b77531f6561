"""A recipe as another host's own config.

In: a `Recipe`. Out: the text of a config, with a comment for each choice and each thing the host has no word for.
Never: imports the host.
"""
