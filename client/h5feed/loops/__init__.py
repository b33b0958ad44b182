"""Training loops: batches in training order, fetched ahead."""
