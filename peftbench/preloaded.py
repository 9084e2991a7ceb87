"""What the fork server imports, once for all children; the heap that they inherit is frozen.

What the imports left is never garbage. Without that each child's collections walk through it all: a
third of a second when it starts. This is the one module whose import does something, and only the
server imports it.
"""

import gc
import logging
from contextlib import suppress
from importlib import import_module

from peftbench.provenance import torch_cuda_version
from peftbench.worker import PRELOAD_CPU, PRELOAD_CUDA

# It warns at every import that a faster kernel could be had from a Hub. The server's screen is the
# user's; in a child, whose warnings go to its log, it may speak.
_talkative = logging.getLogger("bitsandbytes")
_talkative.setLevel(logging.ERROR)
for _name in PRELOAD_CUDA if torch_cuda_version() else PRELOAD_CPU:
    with suppress(ImportError):  # for the child to meet, which has a log and a status
        import_module(_name)
_talkative.setLevel(logging.NOTSET)

gc.collect()
gc.freeze()
