"""`python -m unswag.reference --vectors DIR` writes the golden files."""

from __future__ import annotations

import argparse
from pathlib import Path

from unswag.reference import vectors


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m unswag.reference", description="Writes the golden files.")
    parser.add_argument("--vectors", type=Path, required=True, metavar="DIR")
    directory: Path = parser.parse_args().vectors
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in vectors().items():
        (directory / name).write_text(text)


if __name__ == "__main__":
    main()
