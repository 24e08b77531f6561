"""`python -m benchmarks.gpu`: one command that proves this package on the card at hand; see `__main__`."""
