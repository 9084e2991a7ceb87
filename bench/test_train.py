"""Every case of the chosen preset: `pytest bench --benchmark-json=run.json`."""

from peftbench.matrix import test_train

__all__ = ["test_train"]
