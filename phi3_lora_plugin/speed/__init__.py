"""The parts of a training step made fast: each is exact, reversible, and gives way to stock code when in doubt."""
