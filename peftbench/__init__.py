"""What a way of adapting a language model costs, and what it buys. Start at `pipeline.py`."""

__version__ = "0.1.0"
