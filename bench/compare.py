"""What got faster or slower between two result files of one benchmark.

    python -m bench.compare OLD.json NEW.json [--noise 0.05]

Compared are times ("ms", "seconds" and the like) and the share of a copy measured beside them ("of_copy"), wherever they
stand in the file; of several measurements of one thing, the best. A row is faster or slower when its time changed by more than
the noise and its share of the copy, if it has one, did too: a copy that changed as much speaks of the machine. Between
different machines only shares are compared. Files that differ in a setting, or have no row in common, are refused.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TIMES, SHARE = ("ms", "seconds", "busy_seconds", "ours_seconds"), "of_copy"
# What tells the rows of a list apart.
NAMES = ("kind", "kernel", "op", "function", "act", "name", "dtype", "shape", "threads", "tokens", "training", "side", "who")
ABOUT_A_RUN = ("date", "title", "machine", "goals", "summary")
MAY_DIFFER = ("backend", "best_of", "rounds", "sources", "complete", *ABOUT_A_RUN)  # settings that rows may be compared across
SAME_MACHINE = ("cpu", "cores", "instruction_sets", "gpu")

Label = tuple[str, ...]


class Mismatch(Exception):
    """The two files cannot be compared; the text says why."""


@dataclass
class Results:
    path: Path
    machine: dict[str, Any]
    settings: dict[str, Any]
    rows: dict[Label, float] = field(default_factory=dict)  # (..., measure): the best


@dataclass
class Change:
    name: str
    old: float
    new: float
    old_share: float | None
    new_share: float | None
    times: float  # as fast as before; by the share where the machines differ
    verdict: str  # faster | slower | the same | unclear: time and share disagree


def read(path: Path) -> Results:
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise Mismatch(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise Mismatch(f"{path} is not JSON: {error}") from None
    if not isinstance(data, dict) or not isinstance(data.get("machine"), dict):
        raise Mismatch(
            f"{path} is no result of a benchmark: it names no machine; pass files like bench/results/kernels-avx2.json"
        )
    settings = {
        key: value
        for key, value in data.items()
        if key not in (*MAY_DIFFER, *TIMES) and isinstance(value, (str, int, float)) and not isinstance(value, bool)
    }
    results = Results(path, data["machine"], settings)
    for label, value in measures({key: value for key, value in data.items() if key not in ABOUT_A_RUN}):
        better = max if label[-1] == SHARE else min
        results.rows[label] = better(value, results.rows.get(label, value))
    if not results.rows:
        raise Mismatch(f"{path} holds no times")
    return results


def measures(node: object, label: Label = ()) -> Iterator[tuple[Label, float]]:
    """((what is measured ..., measure), value) for every positive number that is a measure."""
    if isinstance(node, list):
        for entry in node:
            yield from measures(entry, label)
        return
    if not isinstance(node, dict):
        return
    names = (f"{name} {node[name]}" if name in ("threads", "tokens") else str(node[name]) for name in NAMES if name in node)
    label = (*label, *names)
    for key, value in node.items():
        sides = value if isinstance(value, dict) else {"": value}
        if key in (*TIMES, SHARE) and all(type(number) in (int, float) for number in sides.values()):
            for side, number in sides.items():
                if math.isfinite(number) and number > 0:
                    yield (*label, *filter(None, [side]), key), float(number)
        elif isinstance(value, (dict, list)) and key not in NAMES:
            yield from measures(value, label if key in ("rows", "rounds") else (*label, key))


def compare(old: Results, new: Results, noise: float) -> list[Change]:
    """The rows that both have, those that lost most first. Raises `Mismatch`."""
    for key in {**old.settings, **new.settings}:
        if old.settings.get(key) != new.settings.get(key):
            values = (f"{r.settings[key]!r} in {r.path}" if key in r.settings else f"not in {r.path}" for r in (old, new))
            raise Mismatch(f"{key} is {' and '.join(values)}; compare runs with the same settings")
    common = [label for label in old.rows if label in new.rows]
    if not common:
        raise Mismatch(f"no row of {old.path} is in {new.path}; compare results of the same benchmark")
    moved = not same_machine(old, new)
    if moved and not any(label[-1] == SHARE for label in common):
        raise Mismatch(
            f"{old.path} and {new.path} are of different machines, and their times stand beside no copy; measure both on one"
        )
    changes = []
    for label in common:
        if label[-1] == SHARE:
            continue
        before, now = old.rows[label], new.rows[label]
        beside = [share for share in ((*label[:-1], SHARE), (*label[:-2], SHARE)) if share in common]
        old_share, new_share = (old.rows[beside[0]], new.rows[beside[0]]) if beside else (None, None)
        if moved and not beside:
            continue
        by_share = new_share / old_share if old_share and new_share else None
        times = by_share if moved and by_share else before / now
        verdict = verdict_of(times, noise)
        if by_share and verdict_of(by_share, noise) != verdict:
            verdict = "unclear"
        name = " ".join(label if label[-1] == "busy_seconds" else label[:-1]) or label[-1]
        changes.append(Change(name, before, now, old_share, new_share, times, verdict))
    return sorted(changes, key=lambda change: change.times)


def same_machine(old: Results, new: Results) -> bool:
    return all(old.machine.get(key) == new.machine.get(key) for key in SAME_MACHINE)


def verdict_of(times: float, noise: float) -> str:
    return "faster" if times > 1 + noise else "slower" if times < 1 / (1 + noise) else "the same"


def text(old: Results, new: Results, changes: list[Change], noise: float) -> str:
    lines = []
    for name, results in (("old", old), ("new", new)):
        machine = ", ".join(f"{key} {value}" for key, value in results.machine.items() if value not in (None, "", []))
        lines.append(f"{name}: {results.path}\n     {machine}")
    if not same_machine(old, new):
        lines.append("Different machines: verdicts are by the share of a copy measured beside each kernel, not by time.")
    for verdict in ("slower", "faster", "unclear"):
        chosen = [change for change in changes if change.verdict == verdict]
        lines.append(f"\n{verdict}: {len(chosen)}" + (f" (beyond {noise:.0%})" if verdict != "unclear" else ""))
        for c in chosen if verdict != "faster" else reversed(chosen):
            share = f"  of a copy {c.old_share:.2f} -> {c.new_share:.2f}" if c.old_share and c.new_share else ""
            lines.append(f"  {c.times:5.2f} x  {c.old:10.4g} -> {c.new:10.4g}{share}  {c.name}")
    lines.append(f"\nthe same: {sum(change.verdict == 'the same' for change in changes)}")
    for one, other in ((old, new), (new, old)):
        if missing := {" ".join(label[:-1]) for label in one.rows if label not in other.rows}:
            lines.append(f"only in {one.path}: {'; '.join(sorted(missing))}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument(
        "--noise", type=float, default=0.05, help="a change of a time or share that counts as none (default: 0.05)"
    )
    args = parser.parse_args()
    try:
        old, new = read(args.old), read(args.new)
        changes = compare(old, new, args.noise)
    except Mismatch as error:
        parser.exit(2, f"bench.compare: {error}\n")
    print(text(old, new, changes, args.noise))


if __name__ == "__main__":
    main()
