"""``python -m muonrec doctor``: what is installed, what this machine can train, and what to mend."""

from __future__ import annotations

import argparse
import sys

from muonrec import __version__, doctor


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m muonrec", description="Tools of muonrec.")
    parser.add_argument("--version", action="version", version=f"muonrec {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "doctor",
        help="what is installed, what this machine can train, and what to mend",
        description="Exit status 0: this machine can train. 1: at least one fault.",
    )
    parser.parse_args(arguments)
    return doctor.main()


if __name__ == "__main__":
    sys.exit(main())
