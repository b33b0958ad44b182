"""Serves and builds on all nodes of a Ray cluster. Only this package knows Ray; its modules import it when they run."""
