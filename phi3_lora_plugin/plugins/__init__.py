"""Plugins, found by entry point.

In: what is installed. Out: loaders, data formats, recipes and callbacks by name, and why a plugin failed.
Never: imports torch, or lets one broken plugin hide another.
"""
