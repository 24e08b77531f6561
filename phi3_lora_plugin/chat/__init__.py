"""Conversations as training rows.

In: rows of any data format. Out: token ids and labels, packed or not, and a report of what was left out.
Never: opens model weights, or searches rendered text for what to train.
"""
