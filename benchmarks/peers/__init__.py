"""What users would pick instead of h5feed, on the same file and rows: ``python -m benchmarks --peers``."""
