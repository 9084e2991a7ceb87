"""Corpora, preference pairs and the assets they come from."""
