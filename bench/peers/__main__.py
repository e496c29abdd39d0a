"""The tests that come with the sdist of transformers, on stock models and on operated ones.

Each family's tests run twice, in processes of their own: as they are, and with every model they build or load operated
(bench/peers/plugin.py). No test may pass on stock and do anything else on operated models, but for those of expected.toml, each
with its reason.

python -m bench.peers [family …]    all without names, and then bench/results/peers.json; kept results are not run again
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench.kept import Kept
from bench.smollm2 import ROOT, say, table, write

HERE = Path(__file__).parent
FOLDER = ROOT / "build" / "peers"
SIDES = ("stock", "operated")
LIMIT = 3600  # seconds for one side of a family


def sdist(name: str) -> Path:
    """The unpacked sdist of the version that is installed; fetched once."""
    release = f"{name}-{version(name)}"
    if not (FOLDER / release / "tests").is_dir():
        FOLDER.mkdir(parents=True, exist_ok=True)
        say(f"fetching the sdist of {release}")
        download = ("download", "--quiet", "--no-deps", "--no-build-isolation", "--no-binary", ":all:")
        subprocess.run([sys.executable, "-m", "pip", *download, "-d", FOLDER, release.replace("-", "==")], check=True)
        with tarfile.open(FOLDER / f"{release}.tar.gz") as archive:
            archive.extractall(FOLDER, filter="data")
    return FOLDER / release


def run(family: str, side: str) -> list[dict[str, Any]]:
    """What the plugin says of each test."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "tests.jsonl"
        paths = (str(ROOT / "python"), str(ROOT), os.environ.get("PYTHONPATH", ""))
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(p for p in paths if p),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "UNSWAG_PEERS_OUT": str(out),
            "UNSWAG_PEERS_SIDE": side,
            "UNSWAG_PEERS_TESTS": str(sdist("transformers") / "tests"),
        }
        # nothing of our own pytest settings, nor of transformers'
        options = ("-q", "-c", os.devnull, "--rootdir", folder, "--import-mode=importlib", "-p", "no:cacheprovider")
        command = [sys.executable, "-m", "pytest", *options, "-p", "bench.peers.plugin", f"{HERE / 'families.py'}::{family}"]
        log = FOLDER / f"{family}-{side}.log"
        with log.open("w") as words:
            done = subprocess.run(command, cwd=folder, env=environment, stdout=words, stderr=subprocess.STDOUT, timeout=LIMIT)
        if done.returncode not in (0, 1) or not out.exists():
            raise RuntimeError(f"pytest ended with {done.returncode} for {family}, {side}; see {log.relative_to(ROOT)}")
        return [json.loads(line) for line in out.read_text().splitlines()]


def depends_on(side: str) -> str:
    """A name for what a run's outcomes depend on. The list of expected differences is not among it."""
    state = hashlib.sha256("".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft")).encode())
    files = list(HERE.glob("*.py"))
    if side == "operated":
        files += [*(ROOT / "python").rglob("*.py"), *(ROOT / "python").rglob("_core*.so")]
    for file in sorted(files):
        state.update(file.read_bytes())
    return state.hexdigest()


def both(family: str, kept: dict[str, Kept]) -> dict[str, list[dict[str, Any]]]:
    sides = {}
    for side in SIDES:
        result = kept[side].get([family, side])
        if result is None:
            result = run(family, side)
            kept[side].put([family, side], result)
            say(f"{family}, {side}:", _counts(Counter(test["outcome"] for test in result)))
        sides[side] = result
    return sides


def expected() -> list[dict[str, Any]]:
    return tomllib.loads((HERE / "expected.toml").read_text()).get("expected", [])


def compare(family: str, sides: dict[str, list[dict[str, Any]]], known: list[dict[str, Any]]) -> dict[str, Any]:
    """One family's part of the result."""
    stock, ours = ({_name(t): t for t in sides[side]} for side in SIDES)
    tests, differences = {}, []
    left = Counter[str]()
    for name, before in stock.items():
        after = ours.get(name, {"outcome": "not run", "reason": ""})
        tests[name] = f"{before['outcome']}, {after['outcome']}"
        left.update(after.get("left", {}))
        if before["outcome"] == "passed" != after["outcome"]:
            why = next((e["reason"] for e in known if family in e["families"] and name in e["tests"]), None)
            differences.append({"test": name, "operated": after["outcome"], "said": after.get("reason", ""), "expected": why})
    return {
        "outcomes": dict(Counter(tests.values())),
        "models": {"operated": sum(t["operated"] for t in ours.values()), "left as stock": dict(left)},
        "seconds": {side: round(sum(t["seconds"] for t in sides[side])) for side in sides},
        "differences": differences,
        "stock_fails": {name: t.get("reason", "") for name, t in stock.items() if t["outcome"] == "failed"},
        "tests": tests,
    }


def _name(test: dict[str, Any]) -> str:
    return test["test"].rpartition("::")[2]


def _counts(counts: Counter[str]) -> str:
    return ", ".join(f"{n} {what}" for what, n in sorted(counts.items()))


def main() -> None:
    os.environ["UNSWAG_PEERS_TESTS"] = str(sdist("transformers") / "tests")
    from bench.peers.families import FAMILIES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="family", help=", ".join(FAMILIES))
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="families at a time (default: one per core)")
    args = parser.parse_args()
    if unknown := set(args.families) - set(FAMILIES):
        parser.error(f"there is no {', '.join(sorted(unknown))}; choose from {', '.join(FAMILIES)}")
    kept = {side: Kept("peers", of=depends_on(side)) for side in SIDES}
    families, known = args.families or list(FAMILIES), expected()
    with ThreadPoolExecutor(args.jobs) as pool:
        ran = pool.map(lambda family: both(family, kept), families)
        results = {family: compare(family, sides, known) for family, sides in zip(families, ran, strict=True)}
    if not args.families:
        write("peers", {"families": results})
    report(results)
    if any(d["expected"] is None for r in results.values() for d in r["differences"]):
        raise SystemExit(1)


def report(results: dict[str, dict[str, Any]]) -> None:
    rows = []
    for family, r in results.items():
        passed = sum(n for what, n in r["outcomes"].items() if what.startswith("passed"))
        new = [d for d in r["differences"] if d["expected"] is None]
        models = r["models"]
        rows.append((
            family, passed, r["outcomes"].get("passed, passed", 0), len(r["differences"]) - len(new), len(new),
            models["operated"], sum(models["left as stock"].values()), sum(r["seconds"].values()),
        ))  # fmt: skip
    rows.append(("all", *(sum(column) for column in list(zip(*rows, strict=True))[1:])))
    header = ("family", "pass on stock", "operated too", "expected not to", "not expected", "operated", "left", "seconds")
    table("transformers' own tests", header, rows)
    for family, r in results.items():
        for d in r["differences"]:
            say(f"{family}: {d['test']} {d['operated']}: {d['expected'] or 'NOT EXPECTED: ' + d['said']}")


if __name__ == "__main__":
    main()
