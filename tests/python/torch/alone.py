"""One pattern tried alone: no other pattern, no stash, no report."""

from __future__ import annotations

from torch import nn

from unswag.torch.patterns.pattern import Candidate, Pattern, cannot_operate, restore
from unswag.torch.patterns.probing import sealed


class Alone:
    """Finds, probes and applies one pattern; `options` as of `apply_unswag_surgery`."""

    def __init__(self, pattern: Pattern, **options: str) -> None:
        self.pattern, self.options = pattern, options

    def candidate(self, module: nn.Module, dtype=None) -> Candidate:
        """The only place that is found in `module`, which stands behind a Linear."""
        model = nn.Sequential(nn.Linear(3, 3), module)
        (found,) = self.found(model if dtype is None else model.to(dtype))
        return found

    def found(self, model: nn.Module) -> list[Candidate]:
        with sealed():
            found = list(self.pattern.find(model))
        for candidate in found:
            candidate.options = self.options
        return found

    def probe(self, found: Candidate) -> str | None:
        with sealed():
            return cannot_operate(found.module) or self.pattern.probe(found)

    def apply(self, found: Candidate) -> None:
        self.pattern.apply(found)

    def patched(self, module: nn.Module, dtype=None) -> nn.Module:
        """`module`, in which the one place that is found is patched."""
        found = self.candidate(module, dtype)
        assert (reason := self.probe(found)) is None, reason
        self.apply(found)
        return module

    def tried(self, model: nn.Module) -> list[tuple[Candidate, str | None]]:
        """Every place in `model`, and the reason to leave it or None."""
        return [(candidate, self.probe(candidate)) for candidate in self.found(model)]

    def operate(self, model: nn.Module) -> dict[str, str]:
        """Patches every place in `model` that may be; {name: reason} of what is left."""
        left = {}
        for candidate, reason in self.tried(model):
            if reason is None:
                self.apply(candidate)
            else:
                left[candidate.name] = reason
        return left


def released(model: nn.Module) -> nn.Module:
    """`model`, with everything put back."""
    for module in model.modules():
        restore(module)
    return model
