"""Attention over the paged pool in Triton: what decode and extend share."""
