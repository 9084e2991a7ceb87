"""What must not leave the user's machine in a record, a log or a report: secrets and places."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSW|API_?KEY|CREDENTIAL", re.IGNORECASE)
_SHORTEST_SECRET = 8  # a shorter value would be found in innocent text
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")
_URL_USER = re.compile(r"(?<=://)[^/\s@'\"]+(?=@)")
HIDDEN = "***"


def without_paths(text: str) -> str:
    """Records travel: where the user's files lie is not theirs to tell."""
    return text.replace(str(Path.cwd()), ".").replace(str(Path.home()), "~")


def without_secrets(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """The text with `***` for every secret: the values of environment variables that are named like
    one, tokens of the Hub, and the user and password of an address."""
    values = {
        value
        for name, value in environment.items()
        if _SECRET_NAME.search(name) and len(value) >= _SHORTEST_SECRET
    }
    for value in sorted(values, key=len, reverse=True):  # one may be part of another
        text = text.replace(value, HIDDEN)
    return _URL_USER.sub(HIDDEN, _HUB_TOKEN.sub(HIDDEN, text))


def clean_file(path: Path) -> None:
    """Hide the secrets in a text file that libraries have written to; a clean one is untouched."""
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8", errors="replace")
    clean = without_secrets(text)
    if clean != text:
        path.write_text(clean, encoding="utf-8")
