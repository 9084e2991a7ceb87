"""Every inference case of the chosen preset: `pytest bench --methods infer`."""

from peftbench.matrix import test_infer

__all__ = ["test_infer"]
