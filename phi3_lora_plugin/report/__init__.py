"""A page about a run.

In: the folder of a run, or a data report. Out: one HTML file that needs no network, script or other file.
Never: changes the run, or fails because a part of what it shows is missing.
"""
