"""The `peftbench` command. Exit codes: 0 done, 2 a mistake in what was given, 130 stopped."""

from __future__ import annotations

import argparse
import sys

from peftbench import __version__
from peftbench.adapters import ADAPTERS
from peftbench.case import PRESETS
from peftbench.data import assets
from peftbench.data.loading import DATA
from peftbench.errors import UserError, unknown_name
from peftbench.methods import METHODS
from peftbench.models import MODELS
from peftbench.summary import table


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="peftbench",
        description="The benchmark itself is `pytest bench`; this is what is around it.",
    )
    parser.add_argument("--version", action="version", version=f"peftbench {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="models, adapters, methods, data and presets by name")
    asset = commands.add_parser("assets", help="the real model and text that presets use offline")
    actions = asset.add_subparsers(dest="action", required=True)
    fetch = actions.add_parser("fetch", help="download, check and keep them in the cache")
    fetch.add_argument("names", nargs="*", help=f"of: {', '.join(assets.ASSETS)} (default: all)")
    actions.add_parser("list", help="what there is, and what is in the cache")
    return parser


def list_tables() -> None:
    """Everything that has a name, from the tables themselves."""
    sections = {
        "models": [[n, m.about] for n, m in MODELS.items()],
        "adapters": [[n, f"{a.about} ({a.family})"] for n, a in ADAPTERS.items()],
        "methods": [[n, m.name] for n, m in METHODS.items()],
        "data": [[n, d.about] for n, d in DATA.items()],
        "presets": [[n, p.about] for n, p in PRESETS.items()],
    }
    for name, rows in sections.items():
        print("\n".join(table([name, ""], rows)) + "\n")


def list_assets() -> None:
    rows = []
    for name, asset in assets.ASSETS.items():
        folder = assets.cached_path(name)
        state = "in the cache" if folder else "not fetched"
        rows.append([name, f"{asset.download_bytes / 2**20:.0f} MiB", state, asset.about])
    print("\n".join(table(["asset", "download", "state", ""], rows)))


def fetch_assets(names: list[str]) -> None:
    for name in names:
        if name not in assets.ASSETS:
            raise unknown_name("asset", name, assets.ASSETS)
    for name in names or list(assets.ASSETS):
        print(f"{name}: {assets.fetch(name)}")


def main(arguments: list[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    try:
        if options.command == "list":
            list_tables()
        elif options.action == "fetch":
            fetch_assets(options.names)
        else:
            list_assets()
    except UserError as error:
        print(f"peftbench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0
