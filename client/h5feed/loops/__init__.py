"""Batches in the order in which training wants them, fetched before it wants them."""
