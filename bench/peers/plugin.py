"""A pytest plugin: each model that a test builds or loads is operated, and each test's outcome becomes a line of JSON.

UNSWAG_PEERS_OUT   the file that gets the lines
UNSWAG_PEERS_SIDE  "stock" or "operated"

Operated as a user would: what the outermost `Model(config)` or `Model.from_pretrained(...)` returns. The constructors are
wrapped in this process only. A model on the meta device has nothing to operate on; that, and a surgery that raises, leaves the
model as it is and is counted. The surgery's dry run is left out, as in bench.architectures: it is two thirds of its time and
estimates bytes.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import PreTrainedModel, set_seed

LIMIT = 300  # seconds for a test


class Surgeon:
    """Operates on what comes out of constructors. `operated`, `left`: how many models, and why others stayed stock."""

    def __init__(self) -> None:
        self._depth = 0
        self.start()

    def start(self) -> None:
        self.operated, self.left = 0, Counter[str]()

    @contextlib.contextmanager
    def _inside(self) -> Iterator[None]:
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1

    def operate(self, model: Any) -> None:
        """Unless another model is being made around it."""
        from unswag import apply_unswag_surgery
        from unswag.torch.dry_run import NoDryRun

        if self._depth or not isinstance(model, PreTrainedModel):
            return
        if any(p.is_meta for p in model.parameters()):
            self.left["on the meta device"] += 1
            return
        dry = mock.patch("unswag.torch.operation.dry_run", side_effect=NoDryRun("left out"))
        try:
            with self._inside(), dry:
                apply_unswag_surgery(model, verbose=False)
        except Exception as error:
            self.left[_line(error)] += 1
        else:
            self.operated += 1

    def wrap_constructors(self) -> None:
        """Of every model class that is imported."""
        classes = [PreTrainedModel]
        for cls in classes:
            classes.extend(cls.__subclasses__())
        for cls in dict.fromkeys(classes):
            if "__init__" in vars(cls) and not hasattr(cls.__init__, "of_peers"):
                self._wrap_constructor(cls)
        load = PreTrainedModel.from_pretrained.__func__

        @functools.wraps(load)
        def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
            with self._inside():
                made = load(cls, *args, **kwargs)
            self.operate(made[0] if isinstance(made, tuple) else made)
            return made

        PreTrainedModel.from_pretrained = classmethod(from_pretrained)

    def _wrap_constructor(self, cls: type) -> None:
        make = cls.__init__

        @functools.wraps(make)
        def __init__(this: Any, *args: Any, **kwargs: Any) -> None:
            with self._inside():
                make(this, *args, **kwargs)
            if type(this).__init__ is __init__:  # not inside the constructor of a subclass that a test made
                self.operate(this)

        __init__.of_peers = True
        cls.__init__ = __init__


def _line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200] if text else ''}"


class Recorder:
    def __init__(self, out: Path, surgeon: Surgeon | None):
        self._out, self._surgeon = out, surgeon
        self._outcomes: dict[str, tuple[str, str]] = {}

    def pytest_collection_finish(self) -> None:
        if self._surgeon is not None:
            self._surgeon.wrap_constructors()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Any:
        """One line per test, when it has ended."""
        if self._surgeon is not None:
            self._surgeon.start()
        set_seed(0)
        signal.signal(signal.SIGALRM, _too_long)
        signal.alarm(LIMIT)
        started = time.perf_counter()
        try:
            return (yield)
        finally:
            signal.alarm(0)
            outcome, reason = self._outcomes.pop(item.nodeid, ("skipped", ""))
            line = {
                "test": item.nodeid.partition("::")[2],
                "outcome": outcome,
                "seconds": round(time.perf_counter() - started, 2),
            }
            if reason:
                line["reason"] = reason
            if self._surgeon is not None:
                line |= {"operated": self._surgeon.operated, "left": dict(self._surgeon.left)}
            with self._out.open("a") as out:
                print(json.dumps(line), file=out)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: Any, call: Any) -> Any:
        """The worst of set-up, call, subtests and tear-down counts."""
        report = yield
        worst, why = self._outcomes.get(item.nodeid, ("", ""))
        if report.failed and worst != "failed":
            self._outcomes[item.nodeid] = "failed", _where(call) if call.excinfo else ""
        elif report.skipped and not worst:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self._outcomes[item.nodeid] = "skipped", reason.removeprefix("Skipped: ")
        elif report.passed and report.when == "call" and not worst:
            self._outcomes[item.nodeid] = "passed", why
        return report


def _where(call: Any) -> str:
    """The error's first line, and where it was raised."""
    last = call.excinfo.traceback[-1]
    return f"{_line(call.excinfo.value)} [{Path(str(last.path)).name}:{last.lineno + 1}]"


def _too_long(*_: object) -> None:
    raise TimeoutError(f"more than {LIMIT} s")


def pytest_configure(config: Any) -> None:
    torch.set_num_threads(1)
    operated = os.environ["UNSWAG_PEERS_SIDE"] == "operated"
    config.pluginmanager.register(Recorder(Path(os.environ["UNSWAG_PEERS_OUT"]), Surgeon() if operated else None))
