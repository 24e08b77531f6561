"""Rows -> messages -> token ids and labels -> packed rows."""
