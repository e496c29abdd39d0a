"""Surgery `exact` on every architecture of transformers that builds small (bench/small.py), against stock and against fp64.

Each type is built small, with random weights, in fp32 and in training mode, and runs one step on 2 x 24 random tokens and one
on the same with padding: stock, in fp64, after the surgery with stock's loss, and after the surgery as it comes. A gradient's
error is its distance from fp64 by its norm, or by 1e-3 of the norm of all gradients if that is more: what is zero by symmetry
has only rounding to show.

exact      with stock's loss every gradient is within 2e-5 of stock's, or at most 1.25 times as far from fp64 (+ 2e-6); with
           ours at most 1.25 times as far (+ 2e-6); the same parameters have one; evaluation and generation are stock's; after
           `remove_unswag_surgery` everything is as before, to the bit. Where one draw of weights says otherwise, up to 8 are
           compared together: of a gradient of one element, a single error is luck
untouched  nothing was recognised or could be proven; the reasons are in the result
wrong      anything else
not built  the reason is transformers' own

python -m bench.architectures [name …]    all of `cases()` without names; kept results are not run again
python -m bench.architectures --sweep [name …]    causal types under gradient checkpointing, layers swept in tiles of 7 tokens
                                                  (docs/long-context.md): swept, or left and why; gradients right
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import re
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

from bench.kept import Kept
from bench.small import TOKENS, small_config, small_model
from bench.smollm2 import ROOT, say, table, write

LIMIT = 600  # seconds for one case
SEEDS = 8  # draws of weights and tokens, at most
SAME = 2e-5  # from stock, with stock's loss
WORSE = 1.25  # as far from fp64 as stock
FLOOR = 2e-6  # sixteen roundings
FLIPPED = 1e-3  # a stock gradient this far from fp64 took another path
MLP = ("gated_mlp", "fused_mlp", "plain_mlp", "experts", "activation", "relu")  # the patterns that an MLP is patched by

TASKS = {  # AutoModel classes of the heads, and what their batch looks like
    "masked LM": ("AutoModelForMaskedLM", "tokens"),
    "sequence classification": ("AutoModelForSequenceClassification", "classes"),
    "token classification": ("AutoModelForTokenClassification", "token classes"),
    "image classification": ("AutoModelForImageClassification", "images"),
    "seq2seq LM": ("AutoModelForSeq2SeqLM", "tokens"),
    "speech": ("AutoModelForSpeechSeq2Seq", "speech"),
    "CTC": ("AutoModelForCTC", "wave"),
    "image-text LM": ("AutoModelForImageTextToText", "tokens"),
    "contrastive": ("AutoModelForZeroShotImageClassification", "pairs"),
}
_TEXT = ("masked LM", "sequence classification", "token classification")
FAMILIES = {
    "bert": _TEXT, "roberta": _TEXT, "distilbert": _TEXT, "deberta": _TEXT, "deberta-v2": _TEXT, "electra": _TEXT,
    "modernbert": _TEXT, "gpt2": _TEXT[1:], "llama": _TEXT[1:], "vit": ("image classification",),
    "resnet": ("image classification",), "convnext": ("image classification",), "t5": ("seq2seq LM", "sequence classification"),
    "bart": ("seq2seq LM",), "whisper": ("speech",), "wav2vec2": ("CTC",), "clip": ("contrastive",),
    "chameleon": ("image-text LM",),  # which edits its logits in place
}  # fmt: skip
NOT_BUILT = {
    "gemma4_assistant": "it reads the keys and values of the model that it assists, and takes no labels",
    "gemma4_unified_assistant": "it reads the keys and values of the model that it assists, and takes no labels",
    "musicgen": "AutoModelForCausalLM gives its decoder the config of the whole model, which it cannot read",
    "musicgen_melody": "AutoModelForCausalLM gives its decoder the config of the whole model, which it cannot read",
}


def cases() -> list[str]:
    """All model types with a causal language model, then families with their other heads ("bert, masked LM")."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *(f"{family}, {task}" for family, tasks in FAMILIES.items() for task in tasks)]


def build(name: str, seed: int) -> tuple[Any, dict[str, Any]]:
    """The model of a case and its batch."""
    import transformers

    model_type, _, task = name.partition(", ")
    config = small_config(model_type)
    if not task:
        if hasattr(config, "is_decoder") and not config.is_encoder_decoder:
            config.is_decoder = True
        return small_model(config, seed=seed), _batch("tokens", config, seed)
    auto, kind = TASKS[task]
    if kind == "classes" and config.pad_token_id is None:
        config.pad_token_id = 0
    return small_model(config, getattr(transformers, auto), seed), _batch(kind, config, seed)


def _batch(kind: str, config: Any, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed + 2)
    ids = torch.randint(3, TOKENS, (2, 24), generator=generator)
    size = getattr(getattr(config, "vision_config", config), "image_size", 64)
    images = torch.randn(2, 3, size, size, generator=generator) if isinstance(size, int) else None
    if config.model_type == "git":
        return {"input_ids": ids, "labels": ids, "pixel_values": images}
    if config.model_type in ("blt", "xlstm"):  # no step of theirs runs with a cache
        return {"input_ids": ids, "labels": ids, "use_cache": False}
    match kind:
        case "tokens":
            return {"input_ids": ids, "labels": ids.clone()}
        case "classes":
            ids[:, -1] = 2  # T5 looks for the end
            return {"input_ids": ids, "labels": torch.tensor([0, 1])}
        case "token classes":
            return {"input_ids": ids, "labels": ids % 2}
        case "images":
            return {"pixel_values": images, "labels": torch.tensor([0, 1])}
        case "speech":
            return {"input_features": torch.randn(2, 16, 128, generator=generator), "labels": ids}
        case "wave":
            return {"input_values": torch.randn(2, 8000, generator=generator), "labels": ids[:, :6]}
        case "pairs":
            return {"input_ids": ids, "pixel_values": images, "return_loss": True}
    raise ValueError(f"kind {kind!r} is none of those in TASKS")


def _padded(batch: dict[str, Any]) -> list[dict[str, Any]]:
    """The batch with one row padded on the right and one on the left, if it has a label for each token."""
    ids, labels = batch.get("input_ids"), batch.get("labels")
    if ids is None or labels is None or ids.shape != labels.shape:
        return []
    mask = torch.ones_like(ids)
    mask[0, 18:] = 0
    mask[1, :5] = 0
    return [batch | {"attention_mask": mask, "labels": labels.where(mask == 1, -100)}]


# ---- one step, exactly


class Exact(TorchFunctionMode):
    """Whatever asks for a smaller float gets float64: the casts to float32 inside norms, softmax and losses too."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16):
            func = torch.Tensor.double
        args = [_wide(a) for a in args]
        return func(*args, **{k: _wide(v) for k, v in (kwargs or {}).items()})

    def __enter__(self) -> Exact:
        self._default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *exception: object) -> None:
        torch.set_default_dtype(self._default)
        super().__exit__(*exception)


def _wide(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value.is_floating_point else value


@dataclass
class Step:
    loss: torch.Tensor
    gradients: dict[str, torch.Tensor]

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, Step)
        return (
            torch.equal(self.loss, other.loss)
            and self.gradients.keys() == other.gradients.keys()
            and all(torch.equal(g, other.gradients[name]) for name, g in self.gradients.items())
        )


def step(model: Any, *batches: dict[str, Any]) -> Step:
    """One step on each batch from the same random state: the sum of the losses, and the gradients of each (those of the second
    by "padded: name"). Buffers (running statistics) are put back."""
    total = torch.zeros((), dtype=torch.float64)
    gradients: dict[str, torch.Tensor] = {}
    buffers = [(b, b.clone()) for b in model.buffers()]
    for words, batch in zip(("", "padded: "), batches, strict=False):
        model.zero_grad(set_to_none=True)
        torch.manual_seed(7)
        loss = model(**batch).loss
        loss.backward()
        with torch.no_grad():
            for b, before in buffers:
                b.copy_(before)
        total += loss.detach()
        gradients |= {words + name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return Step(total, gradients)


def exact_step(twin: Any, *batches: dict[str, Any]) -> Step:
    """The same in fp64 from end to end; `twin` becomes fp64."""
    twin = twin.double()
    if hasattr(twin, "set_experts_implementation"):
        twin.set_experts_implementation("eager")  # the grouped product has no fp64
    with Exact():
        return step(twin, *({k: _double(v) for k, v in batch.items()} for batch in batches))


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


Apart = dict[str, tuple[float, float]]


@dataclass
class Scale:
    """The norms by which errors are divided."""

    exact: Step

    def __post_init__(self) -> None:
        self.total = sum(g.norm().item() ** 2 for g in self.exact.gradients.values()) ** 0.5

    def apart(self, a: Step, b: Step) -> Apart:
        """Distance of each gradient of `a` from that of `b`, and its norm in fp64; the loss under ""."""
        found = {"": (abs(a.loss.double() - b.loss.double()).item(), max(abs(self.exact.loss.item()), 1e-30))}
        for name, want in b.gradients.items():
            norm = max(self.exact.gradients[name].norm().item(), 1e-3 * self.total, 1e-30)
            found[name] = ((a.gradients[name].double() - want.double()).norm().item(), norm)
        return found


def relative(draws: list[Apart]) -> dict[str, float]:
    """Of each gradient the root mean square of its distances over that of its norms; inf for NaN."""
    squares = {name: [sum(d[name][i] ** 2 for d in draws) for i in (0, 1)] for name in draws[0]}
    return {name: (a / b) ** 0.5 if a == a else float("inf") for name, (a, b) in squares.items()}


# ---- one case


def examine(name: str) -> dict[str, Any]:
    """Everything about one case; never raises but for a KeyboardInterrupt."""
    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            result = _examine(name)
        except Exception as error:
            result = {"verdict": "wrong", "reason": _said(error)}
    return {"name": name, **result, "seconds": round(time.perf_counter() - began, 1)}


def _said(error: BaseException) -> str:
    frames = []
    trace = error.__traceback__
    while trace is not None:
        frames.append(trace.tb_frame.f_code.co_qualname)
        trace = trace.tb_next
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[:300]} (in {frames[-1]})"


def _examine(name: str) -> dict[str, Any]:
    if name in NOT_BUILT:
        return {"verdict": "not built", "reason": NOT_BUILT[name]}
    result: dict[str, Any] = {"seeds": []}
    errors: dict[str, list[Apart]] = {}  # by side: of each draw
    problems: list[str] = []
    for seed in range(SEEDS):
        try:
            model, batch = build(name, seed)
            batches = [batch, *(() if name == "reformer" else _padded(batch))]  # there its hashes tie, and chance decides
            stock = step(model, *batches)
        except Exception as error:
            return {"verdict": "not built", "reason": _said(error)}
        if stock != step(model, *batches):
            return {"verdict": "not built", "reason": "two stock steps from one random state differ"}
        exact = exact_step(build(name, seed)[0], *batches)
        scale = Scale(exact)
        if max(relative([scale.apart(stock, exact)]).values()) > FLIPPED:  # routed, or chose, another way
            problems = ["stock takes another path in fp32 than in fp64"]
            continue
        problems = []
        trial = Trial(model, batches, stock, problems, result if not result["seeds"] else None)
        result["seeds"].append(seed)
        errors.setdefault("stock", []).append(scale.apart(stock, exact))
        from unswag.torch.dry_run import NoDryRun

        # the surgery's dry run, two thirds of the time, estimates what is counted here
        with mock.patch("unswag.torch.operation.dry_run", side_effect=NoDryRun("left out")):
            for loss in ("stock", "chunked"):
                ours = trial.operated(loss)
                if not problems:
                    errors.setdefault(f"{loss} loss", []).append(scale.apart(ours, exact))
                    errors.setdefault(f"{loss} loss, from stock", []).append(scale.apart(ours, stock))
        if problems:
            return {**result, "verdict": "wrong", "reason": "; ".join(problems)}
        error = {side: relative(draws) for side, draws in errors.items()}
        result["errors"] = {side: float(f"{max(found.values()):.2e}") for side, found in error.items()}
        problems = list(_too_far(error))
        if not problems:
            return {**result, "verdict": "exact" if result["patched"] else "untouched"}
    return {**result, "verdict": "wrong", "reason": "; ".join(problems)}


@dataclass
class Trial:
    """One model, before, under and after the surgery. What is wrong apart from errors of gradients is added to `problems`,
    what the surgery did to `result`, if there is one."""

    model: Any
    batches: list[dict[str, Any]]
    stock: Step
    problems: list[str]
    result: dict[str, Any] | None

    def __post_init__(self) -> None:
        from unswag import audit

        if self.result is not None:
            self.result["class"] = type(self.model).__name__
            self.result["parameters"] = sum(p.numel() for p in self.model.parameters())
            self.evaluated = _evaluate(self.model, self.batches[0])
            self.kept = audit(self.model, **self.batches[0]).alive
        self.keys, before = list(self.model.state_dict()), _attributes(self.model)
        step(self.model, *self.batches)
        after = _attributes(self.model)
        self.attributes = {k: v for k, v in after.items() if k in before and before[k] == v}  # no step of the model sets them

    def operated(self, loss: str) -> Step:
        """The step after the surgery; the surgery is taken back."""
        from unswag import apply_unswag_surgery, remove_unswag_surgery

        report = apply_unswag_surgery(self.model, loss=loss, verbose=False)
        ours = step(self.model, *self.batches)
        self._say(loss, ours.gradients.keys() == self.stock.gradients.keys(), "other parameters have a gradient")
        self._say(loss, list(self.model.state_dict()) == self.keys, "the state_dict has other keys")
        if self.result is not None and loss == "stock":
            self.problems.extend(_differences(self.evaluated, _evaluate(self.model, self.batches[0])))
        elif self.result is not None:
            self.result.update(self._account(report))
        remove_unswag_surgery(self.model)
        self._say(loss, self.stock == step(self.model, *self.batches), "the step differs after remove_unswag_surgery")
        after = _attributes(self.model)
        odd = [k for k, v in self.attributes.items() if k not in after or after[k] != v]
        odd += [(name, k) for name, k in after if k.startswith("_unswag")]
        self._say(loss, not odd, f"attributes differ after remove_unswag_surgery: {odd[:3]}")
        return ours

    def _say(self, loss: str, holds: bool, otherwise: str) -> None:
        if not holds:
            self.problems.append(f"loss={loss}: {otherwise}")

    def _account(self, report: Any) -> dict[str, Any]:
        from unswag import audit
        from unswag.torch.patterns.pattern import replaced

        patched = Counter(pattern for _, pattern in report.patched)
        after, tokens = audit(self.model, **self.batches[0]), _tokens(self.batches[0])
        return {
            "patched": dict(patched),
            "mlp": {p: patched[p] for p in MLP if patched[p]},
            "skipped": dict(Counter(reason for _, reason in report.skipped)),
            "left": _left(self.model, {n for n, _ in report.patched if n and replaced(self.model.get_submodule(n))}),
            "notes": list(report.notes),
            "logits_made": dict(report.logits_made),
            "bytes_per_token": [round(self.kept / tokens), round(after.alive / tokens)],
        }


def _too_far(error: dict[str, dict[str, float]]) -> Iterator[str]:
    for side in ("stock loss", "chunked loss"):
        bad = {n: e for n, e in error[side].items() if not e <= WORSE * error["stock"][n] + FLOOR}
        if side == "stock loss":
            bad = {n: e for n, e in bad.items() if not error["stock loss, from stock"][n] <= SAME}
        if bad:
            worst = max(bad, key=lambda n: bad[n])
            yield (
                f"{side}: {worst or 'the loss'} is {bad[worst]:.1e} from fp64, stock {error['stock'][worst]:.1e}; "
                f"{len(bad)} of {len(error[side])} too far"
            )


def _tokens(batch: dict[str, Any]) -> int:
    first = batch.get("input_ids", batch["labels"]) if "labels" in batch else batch["input_ids"]
    return int(first.numel())


def _attributes(model: Any) -> dict[tuple[str, str], Any]:
    """Every attribute of every module and of its config: numbers and words by value, others by identity."""
    found = {}
    for name, module in model.named_modules():
        for owner, of in (("", module), ("config.", getattr(module, "config", None))):
            for k, v in vars(of).items() if hasattr(of, "__dict__") else ():
                found[name, owner + k] = v if isinstance(v, (int, float, str, type(None))) else id(v)
    return found


def _evaluate(model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """What the model makes in evaluation: its outputs with a cache, and eight tokens more; or that it cannot."""
    model.eval()
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "use_cache", "return_loss")}
    made: dict[str, Any] = {}
    try:
        with torch.no_grad():
            for what, run in _evaluations(model, inputs).items():
                torch.manual_seed(7)
                try:
                    made[what] = run()
                except Exception as error:
                    made[what] = _said(error)
    finally:
        model.train()
    return made


def _evaluations(model: Any, inputs: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    def logits() -> Any:
        out = model(**inputs)
        return next(v for k, v in out.items() if k in ("logits", "logits_per_image"))

    runs: dict[str, Callable[[], Any]] = {"logits": logits}
    if hasattr(model, "generate"):
        runs["generated"] = lambda: model.generate(**inputs, max_new_tokens=4, do_sample=False)
    return runs


def _differences(stock: dict[str, Any], ours: dict[str, Any]) -> Iterator[str]:
    for what, want in stock.items():
        have = ours[what]
        if isinstance(want, str):  # stock cannot
            continue
        if isinstance(have, str):
            yield f"in evaluation, {what}: {have}"
        elif want.is_floating_point():
            error = ((have.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30)).item()
            if not error <= SAME:
                yield f"in evaluation, {what} are {error:.1e} from stock"
        elif not torch.equal(have, want):
            yield f"in evaluation, {what} tokens differ"


_MLP_NAMES = re.compile(r"mlp|ffn?|feed_?forward|.*experts?|intermediate|.*moe|.*_mlp")


def _left(model: Any, patched: set[str]) -> dict[str, int]:
    """Classes of modules with the name of an MLP that are not patched, nor inside one or around one that is."""
    found: Counter[str] = Counter()
    seen: list[str] = []
    for name, module in model.named_modules():
        if not _MLP_NAMES.fullmatch(name.rpartition(".")[2]) or any(name.startswith(f"{s}.") for s in seen):
            continue
        if any(p == name or p.startswith(f"{name}.") or name.startswith(f"{p}.") for p in patched):
            continue
        seen.append(name)
        if not isinstance(module, torch.nn.Linear):
            found[type(module).__name__] += 1
    return dict(found)


# ---- all of them


def worker() -> None:
    """Examines the cases whose names come as lines, and answers each with a line of JSON."""
    import transformers

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        print(json.dumps(examine(line.strip())), file=answers, flush=True)


class Worker:
    """A process that examines one case after the other."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None
        self.lines: queue.Queue[str] = queue.Queue()

    def examine(self, name: str) -> dict[str, Any]:
        if self.process is None:
            self.lines = queue.Queue()
            path = os.pathsep.join(p for p in (str(ROOT / "python"), str(ROOT), os.environ.get("PYTHONPATH", "")) if p)
            self.process = subprocess.Popen(
                [sys.executable, "-m", "bench.architectures", "--worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            threading.Thread(target=_read, args=(self.process.stdout, self.lines), daemon=True).start()
        assert self.process.stdin is not None
        self.process.stdin.write(name + "\n")
        self.process.stdin.flush()
        try:
            line = self.lines.get(timeout=LIMIT)
        except queue.Empty:
            line = ""
        if line:
            return json.loads(line)
        died = self.process.poll()
        self.close()
        return {
            "name": name,
            "verdict": "wrong",
            "reason": f"more than {LIMIT} s" if died is None else f"its process ended with {died}",
        }

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def _read(stream: Any, lines: queue.Queue[str]) -> None:
    for line in stream:
        lines.put(line)
    lines.put("")


def sweep(names: list[str]) -> list[dict[str, Any]]:
    """The result of each case, kept or new."""
    kept, runner, results = Kept("architectures"), Worker(), []
    try:
        for i, name in enumerate(names):
            result = kept.get(name)
            if result is None:
                result = runner.examine(name)
                kept.put(name, result)
                say(f"{i + 1}/{len(names)} {name}: {result['verdict']}", result.get("reason", ""))
            results.append(result)
    finally:
        runner.close()
    return results


# ---- swept layers -----------------------------------------------------------------------------------------------------------

TILE = 7  # of 24 tokens


def examine_swept(name: str) -> dict[str, Any]:
    """Whether the layers of a causal type are swept, and whether its gradients are right: within SAME of stock's, or at most
    WORSE times as far from fp64 (+ FLOOR). "swept": all of its layers; "in part"; "left": none; "wrong"; "not built"."""
    from unswag import apply_unswag_surgery
    from unswag.torch.dry_run import NoDryRun
    from unswag.torch.operation import SWEEP

    if name in NOT_BUILT:
        return {"name": name, "verdict": "not built", "reason": NOT_BUILT[name]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model, batch = build(name, 0)
            model.activation_checkpointing_enable()
            batch |= {"use_cache": False}
            stock = step(model, batch)
        except Exception as error:
            return {"name": name, "verdict": "not built", "reason": _said(error)}
        try:
            with mock.patch("unswag.torch.operation.dry_run", side_effect=NoDryRun("left out")):
                apply_unswag_surgery(model, loss="stock", sweep=TILE, verbose=False)
        except ValueError as error:
            return {"name": name, "verdict": "left", "reason": str(error)}
        try:
            ours = step(model, batch)
            exact = exact_step(build(name, 0)[0], batch)
            scale = Scale(exact)
            far, near, stocks = (relative([scale.apart(a, b)]) for a, b in ((ours, exact), (ours, stock), (stock, exact)))
        except Exception as error:
            return {"name": name, "verdict": "wrong", "reason": _said(error)}
    sweep = vars(model)[SWEEP]
    worst = max(near, key=near.__getitem__)
    wrong = [k for k in near if near[k] > SAME and not far[k] <= WORSE * stocks[k] + FLOOR]
    return {
        "name": name,
        "verdict": "wrong" if wrong else "swept" if sweep.swept and not sweep.left else "in part" if sweep.swept else "left",
        "layers": len(sweep.swept), "reason": "; ".join(wrong or sorted(sweep.left)),
        "from_stock": near[worst], "from_fp64": max(far.values()), "stock_from_fp64": max(stocks.values()),
    }  # fmt: skip


def swept(names: list[str]) -> None:
    results = []
    for name in names:
        results.append(examine_swept(name))
        say(f"{name}: {results[-1]['verdict']} {results[-1]['reason']}")
    write("sweep_architectures", {"tile": TILE, "cases": results})
    rows = [(r["name"], r["verdict"], f"{r.get('from_stock', 0):.1e}", r["reason"]) for r in results]
    table("Layers swept, small models", ("case", "verdict", "from stock", "reason"), rows)
    counts = Counter(r["verdict"] for r in results)
    say(", ".join(f"{n} {verdict}" for verdict, n in counts.items()))
    if counts["wrong"]:
        raise SystemExit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="name", help="a model type, or a family and its head ('bert, masked LM')")
    parser.add_argument("--sweep", action="store_true", help="layers under gradient checkpointing, swept")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker()
        return
    every = cases()
    if unknown := set(args.names) - set(every):
        parser.error(f"there is no {', '.join(sorted(unknown))}; choose from {', '.join(every)}")
    if args.sweep:
        swept(args.names or [name for name in every if ", " not in name])
        return
    results = sweep(args.names or every)
    if not args.names:
        write("architectures", {"cases": results})
    rows = [
        (r["name"], r["verdict"], " ".join(f"{k} {n}" for k, n in r.get("patched", {}).items()),
         " → ".join(map(str, r.get("bytes_per_token", ()))), r.get("reason", ""))
        for r in results
    ]  # fmt: skip
    table("Surgery exact, small models", ("case", "verdict", "patched", "bytes/token", "reason"), rows)
    counts = Counter(r["verdict"] for r in results)
    say(", ".join(f"{n} {verdict}" for verdict, n in counts.items()))
    say("MLP patched in", sum(bool(r.get("mlp")) for r in results))
    if counts["wrong"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
