"""``h5feed bench``: what a link and a server can feed to a training loop, what bounds it, and what would help."""
