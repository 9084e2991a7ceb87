"""Write the METRICS table into the README given."""

from __future__ import annotations

import sys
from pathlib import Path

from pages import write_part

from peftbench.metrics import glossary

if __name__ == "__main__":
    write_part(Path(sys.argv[1]), "glossary", glossary())
