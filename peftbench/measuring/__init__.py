"""Clocks and memory readings. Nothing here knows what is being trained."""
