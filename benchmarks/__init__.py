"""Benchmarks: every figure is a ratio of two contestants that took turns in one run, over real servers and sockets."""
