"""Measure a training step against the peers: same weights, rows, order and adapter; no speed counts without parity."""
