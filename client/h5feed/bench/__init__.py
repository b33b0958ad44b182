"""``h5feed bench``: how fast a training loop gets its batches, what limits the rate, and what would raise it."""
