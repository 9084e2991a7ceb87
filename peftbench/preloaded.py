"""The last module that the fork server imports: it freezes the heap that all children inherit.

What the imports left is never garbage. Without this each child's collections walk through it all: a
third of a second when it starts. This is the one module whose import does something, and only the
server imports it.
"""

import gc

gc.collect()
gc.freeze()
