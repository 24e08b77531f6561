"""What works on this machine, what does not, and what to do about it.

In: an environment, however broken. Out: a `Report` of findings, each problem with its remedy.
Never: imports torch or anything else heavy in its own process, or changes what it looks at.
"""
