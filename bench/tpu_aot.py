"""What XLA's TPU compiler says about our functions, for TPUs that are not there: memory, fit and communication.

    make tpu-check                                  (fetches libtpu into build/, then runs every group; an hour on one core)
    python -m bench.tpu_aot [group …]               (what libtpu has been fetched for)

Compiles ahead of time for single chips (v2 and v3: cores) and for small meshes. The sizes are those of the compiler's buffer
assignment, "fits" is whether it compiles, and nothing is run on a TPU. GB are 1e9 bytes. A result is kept under the text of
the module it was compiled from, so a run that was killed goes on, and only what changed is compiled again. Writes
bench/results/tpu-aot.json and the tables of docs/tpu.md.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from bench import smollm2
from bench.kept import Kept
from bench.smollm2 import ROOT, say

LIBTPU = "0.0.42.1"  # goes with jax and jaxlib 0.10.2
FOLDER = ROOT / "build" / f"libtpu-{LIBTPU}"
LIBRARY = FOLDER / "libtpu" / "libtpu.so"
DOCS = ROOT / "docs" / "tpu.md"

# what topologies.get_topology_desc wants; one device of each is a chip, of v2 and v3 a core
TOPOLOGIES: dict[str, tuple[str, dict[str, Any]]] = {
    "v2": ("v2:2x2", {}),
    "v3": ("v3:2x2", {}),
    "v4": ("v4:2x2x1", {"chip_config_name": "megacore"}),
    "v5e": ("v5e:2x2", {}),
    "v5p": ("v5p:2x2x1", {}),
    "v6e": ("v6e:2x2", {}),
}
GENERATIONS = tuple(TOPOLOGIES)
COLLECTIVES = ("all-gather", "all-to-all", "collective-permute", "all-reduce", "reduce-scatter")

TOKENS, WIDTH, HIDDEN = 131072, 3584, 14336  # of the founding text; width and hidden size of Gemma-2-9B
CHUNK = 4096  # rows

OUT_OF_MEMORY = re.compile(
    r"Used ([\d.]+[KMGT]) of ([\d.]+[KMGT]) hbm|\(([\d.]+[KMGT])\) exceeds available HBM \(([\d.]+[KMGT])"
)

Row = dict[str, Any]


def gb(size: int | None) -> str:
    if not size:
        return "–" if size is None else "0"
    return f"{size / 1e9:.2f}" if size >= 5e6 else "< 0.01"


# ---- the compiler


def fetch() -> None:
    """libtpu into build/. It is Google's, under the Google Cloud Platform Terms of Service: for this check alone."""
    if LIBRARY.exists():
        return
    say(f"fetching libtpu {LIBTPU} (proprietary, 213 MB; using it means accepting the Google Cloud Platform Terms of Service)")
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-input", "--no-deps", "--target", FOLDER, f"libtpu=={LIBTPU}"]
    )
    if done.returncode:
        raise SystemExit(f"pip cannot get libtpu {LIBTPU}; without it there is no TPU compiler and nothing was checked")


def prepare() -> None:
    """The environment in which jax finds the compiler and looks for no TPU. Before jax is imported."""
    if importlib.util.find_spec("jax") is None:
        raise SystemExit("jax is not installed: pip install -c constraints.txt jax")
    if not LIBRARY.exists():
        raise SystemExit(f"{LIBRARY.relative_to(ROOT)} is not there: make tpu-check fetches it")
    sys.path.insert(0, str(ROOT / "python"))
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "TPU_LIBRARY_PATH": str(LIBRARY),
        "TPU_SKIP_MDS_QUERY": "1",  # no look-up on the network
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # need not be the target
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")} | {"libtpu": LIBTPU}


@functools.cache
def devices(generation: str, name: str | None = None) -> list[Any]:
    from jax.experimental import topologies

    usual, options = TOPOLOGIES[generation]
    return topologies.get_topology_desc(platform="tpu", topology_name=name or usual, **options).devices


class Compiler:
    """Compiles, or finds what was compiled before from the same text."""

    def __init__(self) -> None:
        self._kept = Kept("tpu-aot", of=json.dumps(versions()))

    def one(self, generation: str, function: Callable, *arguments: Any, donate: tuple[int, ...] = ()) -> Row:
        """For one device; `arguments` are arrays or ShapeDtypeStructs, in any structure."""
        import jax
        from jax.sharding import SingleDeviceSharding

        place = SingleDeviceSharding(devices(generation)[0])
        placed = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), arguments)
        return self.lowered(generation, jax.jit(function, donate_argnums=donate), *placed)

    def lowered(self, target: str, jitted: Any, *arguments: Any) -> Row:
        """fits, and if so sizes in bytes and the number of collectives, if not what it needs; error for any other end."""
        lowered = jitted.trace(*arguments).lower(lowering_platforms=("tpu",))
        settings = {"target": target, "module": hashlib.sha256(lowered.as_text().encode()).hexdigest()}
        result = self._kept.get(settings)
        if result is None:
            start = time.monotonic()
            result = _compiled(lowered)
            result["compile_seconds"] = round(time.monotonic() - start, 1)
            self._kept.put(settings, result)
        say(" ", target, told(result))
        return result


def _compiled(lowered: Any) -> Row:
    try:
        compiled = lowered.compile()
    except Exception as error:
        message = str(error)
        if "RESOURCE_EXHAUSTED" not in message:
            return {"fits": False, "error": f"{type(error).__name__}: {message.splitlines()[0][:300]}"}
        found = re.search(
            r"Used ([\d.]+[KMGT]) of ([\d.]+[KMGT]) hbm|\(([\d.]+[KMGT])\) exceeds available HBM \(([\d.]+[KMGT])", message
        )
        needs, of = [size for size in found.groups() if size] if found else (None, None)
        return {"fits": False, "needs": needs, "of": of, "said": message.splitlines()[0][:300]}
    memory, cost, text = compiled.memory_analysis(), compiled.cost_analysis() or {}, compiled.as_text()
    seconds = cost.get("optimal_seconds")
    return {
        "fits": True,
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "peak": memory.peak_memory_in_bytes,
        "modelled_seconds": seconds if seconds and seconds > 0 else None,  # negative: not known
        "collectives": {name: count for name in COLLECTIVES if (count := len(re.findall(rf" {name}(?:-start)?\(", text)))},
    }


def told(result: Row, size: str = "peak") -> str:
    """One cell."""
    if result["fits"]:
        return gb(result[size])
    if "error" in result:
        return "error"
    return "no: " + (f"{result['needs']}iB" if result["needs"] else "out of memory")


# ---- what is compiled


def relus() -> dict[str, Callable]:
    import jax

    from unswag.jax import relu

    return {
        "jax.nn.relu": jax.nn.relu,
        "unswag": functools.partial(relu, layout="rows256"),
        "unswag, pallas": functools.partial(relu, implementation="pallas"),
    }


def operator(compiler: Compiler, generation: str, relu: Callable, tokens: int, dtype: str) -> Row:
    """relu alone: forward to value and residual (x is given away), backward (dy is given away)."""
    import jax

    x = jax.ShapeDtypeStruct((tokens, HIDDEN), dtype)
    y, backward = jax.eval_shape(lambda x: jax.vjp(relu, x), x)
    residual = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(backward))
    return {
        "residual": residual,
        "forward": compiler.one(generation, lambda x: jax.vjp(relu, x), x, donate=(0,)),
        "backward": compiler.one(generation, lambda backward, dy: backward(dy)[0], backward, y, donate=(1,)),
    }


@dataclasses.dataclass(frozen=True)
class Mlp:
    """x + relu(x w1) w2 so many times; the step gives d/dx, d/dw1, and d/dw2 if it is trained, of the sum of squares."""

    generation: str
    dtype: str
    tokens: int
    layers: int
    variant: str
    trained: bool = False  # the second matrix
    scanned: bool = True

    def compile(self, compiler: Compiler) -> Row:
        import jax

        def array(*shape: int) -> Any:
            return jax.ShapeDtypeStruct(shape, self.dtype)

        weights = {"w1": array(self.layers, WIDTH, HIDDEN), "w2": array(self.layers, HIDDEN, WIDTH)}
        frozen = {} if self.trained else {"w2": weights.pop("w2")}
        say(*dataclasses.astuple(self))
        return compiler.one(self.generation, self._step(), array(self.tokens, WIDTH), weights, frozen)

    def _step(self) -> Callable:
        import jax
        import jax.numpy as jnp

        block = VARIANTS[self.variant]()

        def loss(x, weights, frozen):
            both = {**weights, **frozen}
            if self.scanned and self.layers > 1:
                x, _ = jax.lax.scan(lambda x, w: (block(x, w["w1"], w["w2"]), None), x, both)
            else:
                for i in range(self.layers):
                    x = block(x, both["w1"][i], both["w2"][i])
            return jnp.sum(jnp.square(x.astype(jnp.float32)))

        return jax.value_and_grad(loss, argnums=(0, 1))


def _mlp(relu: Callable) -> Callable:
    return lambda x, w1, w2: x + relu(x @ w1) @ w2


def _chunked(block: Callable) -> Callable:
    import jax

    def chunked(x, w1, w2):
        chunks = x.reshape(-1, CHUNK, x.shape[-1])
        return jax.lax.map(lambda chunk: block(chunk, w1, w2), chunks).reshape(x.shape)

    return chunked


def _keeps_x() -> Callable:
    """The naive relu, which keeps its input."""
    import jax
    import jax.numpy as jnp

    relu = jax.custom_vjp(lambda x: jnp.maximum(x, 0))
    relu.defvjp(lambda x: (jnp.maximum(x, 0), x), lambda x, dy: (jnp.where(x > 0, dy, 0),))
    return relu


def _checkpoint(block: Callable) -> Callable:
    import jax

    return jax.checkpoint(block)


def _fused() -> Callable:
    from unswag.jax.linear_relu import linear_relu

    return lambda x, w1, w2: x + linear_relu(x, w1) @ w2


VARIANTS: dict[str, Callable[[], Callable]] = {
    "keeps x": lambda: _mlp(_keeps_x()),
    "jax.nn.relu": lambda: _mlp(relus()["jax.nn.relu"]),
    "mask": lambda: _mlp(relus()["unswag"]),
    "mask, pallas": lambda: _mlp(relus()["unswag, pallas"]),
    "mask, linear_relu": _fused,
    "recompute": lambda: _checkpoint(_mlp(relus()["jax.nn.relu"])),
    "recompute, mask": lambda: _checkpoint(_mlp(relus()["unswag"])),
    "chunks, mask": lambda: _chunked(_mlp(relus()["unswag"])),
    "chunks, recompute": lambda: _chunked(_checkpoint(_mlp(relus()["jax.nn.relu"]))),
}


# ---- groups: each yields rows of the JSON and ends in a table of docs/tpu.md


def _keeps_bool() -> Callable:
    """jax.nn.relu as one program has it. Cut in two after the forward, it would keep an array of zeros too, which is no fault
    of its mask."""
    import jax
    import jax.numpy as jnp

    relu = jax.custom_vjp(jax.nn.relu)
    relu.defvjp(lambda x: (jax.nn.relu(x), x > 0), lambda bit, dy: (jnp.where(bit, dy, jnp.zeros_like(dy)),))
    return relu


def operators(compiler: Compiler) -> Iterator[Row]:
    for generation in GENERATIONS:
        for name, relu in (relus() | {"jax.nn.relu": _keeps_bool()}).items():
            say(generation, name)
            yield {
                "generation": generation, "relu": name, "tokens": TOKENS, "dtype": "float32",
                **operator(compiler, generation, relu, TOKENS, "float32"),
            }  # fmt: skip


def operators_table(rows: list[Row]) -> Iterator[str]:
    yield f"relu alone, {TOKENS:,} x {HIDDEN:,} float32 (7.52 GB): what it keeps, temporaries of forward and backward, GB."
    yield from markdown(
        ("", "relu", "keeps", "forward, temporaries", "backward, temporaries"),
        (
            (
                r["generation"],
                r["relu"],
                gb(r["residual"]),
                told(r["forward"], "temporaries"),
                told(r["backward"], "temporaries"),
            )
            for r in rows
        ),
    )


def wall(compiler: Compiler) -> Iterator[Row]:
    relu = relus()["unswag"]
    for tokens in (262144, 524288):
        for dtype in ("bfloat16", "float32"):
            for generation in GENERATIONS:
                say(generation, tokens, dtype)
                yield {
                    "generation": generation, "tokens": tokens, "dtype": dtype,
                    **operator(compiler, generation, relu, tokens, dtype),
                }  # fmt: skip


def wall_table(rows: list[Row]) -> Iterator[str]:
    yield "unswag.jax.relu beyond the 256k wall: peak of forward / backward, GB, or what it needs where the memory is smaller."
    sizes = list(dict.fromkeys((r["tokens"], r["dtype"]) for r in rows))

    def cell(generation: str, size: tuple[int, str]) -> str:
        (r,) = (r for r in rows if (r["generation"], r["tokens"], r["dtype"]) == (generation, *size))
        return f"{told(r['forward'])} / {told(r['backward'])}"

    yield from markdown(
        ("", *(f"{tokens:,} {dtype}" for tokens, dtype in sizes)),
        ((g, *(cell(g, size) for size in sizes)) for g in dict.fromkeys(r["generation"] for r in rows)),
    )


def scanned(compiler: Compiler) -> Iterator[Row]:
    for variant in (
        "jax.nn.relu",
        "mask",
        "mask, pallas",
        "mask, linear_relu",
        "recompute",
        "chunks, mask",
        "chunks, recompute",
    ):
        mlp = Mlp("v5e", "bfloat16", TOKENS, 4, variant)
        yield {**dataclasses.asdict(mlp), **mlp.compile(compiler)}


def scanned_table(rows: list[Row]) -> Iterator[str]:
    yield f"v5e, bfloat16, {TOKENS:,} tokens, 4 scanned layers {WIDTH:,} → {HIDDEN:,}, second matrix frozen: peak, GB."
    yield from markdown(("", "peak"), ((r["variant"], told(r)) for r in rows))


def layers(compiler: Compiler) -> Iterator[Row]:
    """The honest table: unrolled and scanned, frozen and trained, mask, recompute and chunks."""
    cases: list[tuple[Mlp, tuple[str, ...]]] = []
    for trained in (False, True):
        for count in (1, 4):
            unrolled = Mlp("v5p", "float32", TOKENS, count, "", trained, scanned=False)
            cases.append((unrolled, ("jax.nn.relu", "mask", "recompute")))
        cases.append((Mlp("v5p", "float32", TOKENS, 8, "", trained), ("jax.nn.relu", "mask", "recompute")))
        small = Mlp("v5e", "float32", 12288, 8, "", trained)
        cases.append((small, ("keeps x", "jax.nn.relu", "mask", "recompute", "recompute, mask")))
        single = Mlp("v5e", "float32", TOKENS, 1, "", trained)
        cases.append((single, ("jax.nn.relu", "mask", "chunks, mask", "chunks, recompute")))
    for mlp in (
        Mlp("v5e", "float32", 12288, 1, ""),
        Mlp("v5e", "bfloat16", 12288, 4, "", scanned=False),
        Mlp("v5e", "float32", TOKENS, 4, ""),
        Mlp("v5e", "bfloat16", 262144, 4, ""),
    ):
        cases.append((mlp, ("jax.nn.relu", "mask", "recompute", "chunks, mask", "chunks, recompute")))
    for case, variants in cases:
        for variant in variants:
            mlp = dataclasses.replace(case, variant=variant)
            yield {**dataclasses.asdict(mlp), **mlp.compile(compiler)}


def layers_table(rows: list[Row]) -> Iterator[str]:
    yield (
        f"Peak of forward + backward of layers {WIDTH:,} → {HIDDEN:,}, GB; in brackets seconds of the compiler's own model, "
        "which only ranks (of a scan it counts one layer)."
    )
    variants = list(dict.fromkeys(r["variant"] for r in rows))
    cases: dict[tuple, dict[str, Row]] = {}
    for r in rows:
        key = (r["generation"], r["dtype"], r["tokens"], r["layers"], r["scanned"], r["trained"])
        cases.setdefault(key, {})[r["variant"]] = r

    def cell(r: Row | None) -> str:
        if r is None:
            return "–"
        return told(r) + (f" ({r['modelled_seconds']:.3f})" if r.get("modelled_seconds") else "")

    yield from markdown(
        ("", "second matrix", *variants),
        (
            (
                f"{generation} {dtype} {tokens:,}, {count} {'layer' if count == 1 else 'scanned' if scan else 'unrolled'}",
                "trained" if trained else "frozen",
                *(cell(found.get(v)) for v in variants),
            )
            for (generation, dtype, tokens, count, scan, trained), found in cases.items()
        ),
    )


def tokens(compiler: Compiler) -> Iterator[Row]:
    """The longest sequence that fits on a v5e, one layer, to 8,192 tokens."""
    for dtype in ("float32", "bfloat16"):
        for trained in (False, True):
            for variant in ("jax.nn.relu", "mask", "mask, pallas", "chunks, mask", "chunks, recompute"):
                mlp = Mlp("v5e", dtype, 0, 1, variant, trained)
                found, peak = largest(lambda n, m=mlp: dataclasses.replace(m, tokens=n).compile(compiler))
                row = {**dataclasses.asdict(mlp), "tokens": found, "peak": peak}
                say(f"largest: {found:,} tokens")
                yield row


def largest(compile_at: Callable[[int], Row], step: int = 8192, guess: int = 131072) -> tuple[int, int]:
    """The largest multiple of `step` that fits, and its peak: bisection, led by the line through the last two peaks."""
    low, high, peaks = 0, 1 << 22, {}
    while high - low > step:
        result = compile_at(guess)
        if "error" in result:
            raise RuntimeError(result["error"])
        if result["fits"]:
            low, peaks[guess] = guess, result["peak"]
        else:
            high = guess
        if not peaks:
            guess = high // 2
        else:
            n = sorted(peaks)[-2:]
            slope = (peaks[n[-1]] - peaks[n[0]]) / (n[-1] - n[0]) if len(n) == 2 else peaks[n[0]] / n[0]
            guess = int(low + (HBM - peaks[low]) / slope) if slope > 0 else high
            if guess >= high:  # the line leads too far
                guess = (low + high) // 2 if high - low > 4 * step else high - step
        guess = min(max(guess // step * step, low + step), high - step if high - step > low else low + step)
    return low, peaks.get(low, 0)


HBM = int(15.75 * 2**30)  # what the compiler has on a v5e


def tokens_table(rows: list[Row]) -> Iterator[str]:
    yield "v5e, one layer, forward + backward: the most tokens that fit, in steps of 8,192, and the peak there, GB."
    variants = list(dict.fromkeys(r["variant"] for r in rows))
    yield from markdown(
        ("", "second matrix", *variants),
        (
            (
                dtype,
                "trained" if trained else "frozen",
                *(
                    f"{r['tokens']:,} ({gb(r['peak'])})"
                    for v in variants
                    for r in rows
                    if (r["dtype"], r["trained"], r["variant"]) == (dtype, trained, v)
                ),
            )
            for dtype, trained in dict.fromkeys((r["dtype"], r["trained"]) for r in rows)
        ),
    )


SPECS: tuple[tuple[tuple[int, ...], tuple[Any, ...]], ...] = (
    ((TOKENS, HIDDEN), ("data", None)),
    ((TOKENS, HIDDEN), ("data", "model")),
    ((TOKENS, HIDDEN), (None, "model")),
    ((TOKENS, HIDDEN), (("data", "model"), None)),
    ((8, 16384, HIDDEN), ("data", None, None)),
    ((8, 16384, HIDDEN), ("data", "model", None)),
    ((8, 16384, HIDDEN), (None, "model", None)),
    ((8, 16384, HIDDEN), ("data", None, "model")),
)


def sharding(compiler: Compiler) -> Iterator[Row]:
    """Forward and backward of arrays sharded over a v5e 2x2: what is communicated."""
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    mesh = Mesh(np.array(devices("v5e")).reshape(2, 2), ("data", "model"))
    for shape, spec in SPECS:
        partition = PartitionSpec(*spec)
        place = NamedSharding(mesh, partition)
        x = jax.ShapeDtypeStruct(shape, "float32", sharding=place)
        for name, relu in relus().items():

            def both(x, dy, relu=relu):
                y, backward = jax.vjp(relu, x)
                return y, backward(dy)[0]

            if "pallas" in name:
                both = jax.shard_map(both, mesh=mesh, in_specs=(partition, partition), out_specs=(partition, partition))
            say(name, shape, spec)
            jitted = jax.jit(both, out_shardings=(place, place))
            yield {"shape": shape, "spec": str(partition), "relu": name, **compiler.lowered("v5e 2x2", jitted, x, x)}


def sharding_table(rows: list[Row]) -> Iterator[str]:
    yield "v5e 2x2 (axes data and model), float32, automatic sharding (pallas: in shard_map): collectives and temporaries, GB."
    names = list(dict.fromkeys(r["relu"] for r in rows))

    def cell(r: Row) -> str:
        if "error" in r:
            return "error"
        count = sum(r["collectives"].values()) if r["fits"] else None
        return f"{count}; {told(r, 'temporaries')}" if r["fits"] else told(r)

    yield from markdown(
        ("", *names),
        (
            (f"{' x '.join(f'{n:,}' for n in r['shape'])}, `{r['spec']}`", *(cell(s) for s in rows if s["spec"] == r["spec"]))
            for r in {r["spec"]: r for r in rows}.values()
        ),
    )


LAYERS, HEADS, KV_HEADS, HEAD, VOCABULARY, RANK = 42, 16, 8, 256, 256000, 16
CORES: dict[str, str | None] = {"v3": None, "v5e": "v5e:2x4"}  # eight each


@dataclasses.dataclass(frozen=True)
class Model:
    """42 layers of Gemma-2-9B's shape with relu(gate) up, frozen in bfloat16 but for LoRA (r = 16) on the four matrices of
    attention: loss and gradients of the adapters. Eight devices; each has an eighth of the tokens and of every matrix, and
    gathers a layer's matrices when it needs them, in the backward again. Attention of both sides: at most 2^23 scores per
    head at a time, made again in the backward. No sliding window, no soft caps, no optimizer, no embedding look-up."""

    generation: str
    tokens: int
    ours: bool  # rms_norm, the MLP and the loss in chunks that are made again
    recompute: bool  # jax.checkpoint around each layer

    def compile(self, compiler: Compiler) -> Row:
        import jax
        import numpy as np
        from jax.sharding import Mesh, NamedSharding, PartitionSpec

        everyone = devices(self.generation, CORES[self.generation])[:8]
        mesh = Mesh(np.array(everyone), ("tokens",))

        def array(*shape: int, spec: tuple[str | None, ...] = (), dtype: str = "bfloat16") -> Any:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

        sizes = {
            "q": (WIDTH, HEADS * HEAD), "k": (WIDTH, KV_HEADS * HEAD), "v": (WIDTH, KV_HEADS * HEAD),
            "o": (HEADS * HEAD, WIDTH),
            "gate": (WIDTH, HIDDEN), "up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH),
        }  # fmt: skip
        frozen = {name: array(LAYERS, *size, spec=(None, "tokens")) for name, size in sizes.items()}
        frozen |= {name: array(LAYERS, WIDTH) for name in ("norm1", "norm2")}
        lora = {
            name: (array(LAYERS, rows, RANK), array(LAYERS, RANK, cols))
            for name, (rows, cols) in sizes.items() if name in "qkvo"
        }  # fmt: skip
        arguments = (
            lora,
            frozen,
            array(VOCABULARY, WIDTH, spec=("tokens",)),
            array(self.tokens, WIDTH, spec=("tokens",)),
            array(self.tokens, spec=("tokens",), dtype="int32"),
        )
        specs = jax.tree.map(lambda a: a.sharding.spec, arguments)
        loss = jax.shard_map(self._loss, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)
        say(*dataclasses.astuple(self))
        return compiler.lowered(f"{self.generation} x 8", jax.jit(jax.value_and_grad(loss)), *arguments)

    def _loss(self, lora, frozen, head, x, labels):
        """Of this device's tokens, summed over all."""
        import jax
        import jax.numpy as jnp
        from jax import lax
        from jax.ad_checkpoint import checkpoint_name

        from unswag.jax import reglu, rms_norm

        def gathered(w):
            return checkpoint_name(lax.all_gather(w, "tokens", axis=0, tiled=True), "gathered")

        def norm(x, weight):
            if self.ours:
                return rms_norm(x, weight)
            v = x.astype(jnp.float32)
            return (v * lax.rsqrt(jnp.mean(v * v, -1, keepdims=True) + 1e-6) * weight).astype(x.dtype)

        def in_chunks(function, rows, *arrays):
            chunks = [a.reshape(-1, rows, *a.shape[1:]) for a in arrays]
            return lax.map(jax.checkpoint(lambda chunk: function(*chunk)), chunks)

        def attention(q, k, v):
            local = q.shape[0]
            first = lax.axis_index("tokens") * local
            keys = jnp.arange(k.shape[0])

            def some(q, row):
                scores = jnp.einsum("qgid,kgd->giqk", q, k, preferred_element_type=jnp.float32) * HEAD**-0.5
                p = jax.nn.softmax(jnp.where(keys <= row[:, None], scores, -jnp.inf)).astype(q.dtype)
                return jnp.einsum("giqk,kgd->qgid", p, v)

            q = q.reshape(local, KV_HEADS, HEADS // KV_HEADS, HEAD)
            rows = min(1024, 1 << max(3, (2**23 // self.tokens).bit_length() - 1))  # a power of two
            return in_chunks(some, rows, q, first + jnp.arange(local)).reshape(local, HEADS * HEAD)

        def mlp(h, gate, up, down):
            act = reglu if self.ours else lambda g, u: jax.nn.relu(g) * u
            return act(h @ gate, h @ up) @ down

        def layer(x, weights):
            frozen, lora = weights

            def linear(name, h):
                a, b = lora[name]
                return h @ gathered(frozen[name]) + (h @ a) @ b

            h = norm(x, frozen["norm1"])
            k, v = (gathered(linear(name, h)).reshape(-1, KV_HEADS, HEAD) for name in "kv")
            x = x + linear("o", attention(linear("q", h), k, v))
            h = norm(x, frozen["norm2"])
            matrices = [gathered(frozen[name]) for name in ("gate", "up", "down")]
            if self.ours:
                return x + in_chunks(lambda h: mlp(h, *matrices), min(1024, h.shape[0]), h).reshape(x.shape), None
            return x + mlp(h, *matrices), None

        policy = None if self.recompute else jax.checkpoint_policies.save_anything_except_these_names("gathered")
        x, _ = lax.scan(jax.checkpoint(layer, policy=policy), x, (frozen, lora))
        full = gathered(head)

        def cross_entropy(x, labels):
            logits = (x @ full.T).astype(jnp.float32)
            return jnp.sum(jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, labels[:, None], -1)[:, 0])

        total = jnp.sum(in_chunks(cross_entropy, min(512, x.shape[0]), x, labels)) if self.ours else cross_entropy(x, labels)
        return lax.psum(total, "tokens") / self.tokens


def model(compiler: Compiler) -> Iterator[Row]:
    """The longest context of a whole model on eight cores, to 8,192 tokens."""
    for generation in CORES:
        for recompute in (False, True):
            for ours in (False, True):
                one = Model(generation, 0, ours, recompute)
                found, peak = largest(lambda n, m=one: dataclasses.replace(m, tokens=n).compile(compiler))
                say(f"largest: {found:,} tokens")
                yield {**dataclasses.asdict(one), "tokens": found, "peak": peak}


def model_table(rows: list[Row]) -> Iterator[str]:
    yield (
        "42 layers of Gemma-2-9B's shape with relu in the gate, frozen bfloat16, LoRA (r = 16) on attention, sequence and "
        "matrices over 8 cores of 16 GB: the longest context that compiles, in steps of 8,192, and the peak there, GB. "
        "Attention is chunked on both sides; ours has rms_norm, and MLP and loss in chunks that are made again."
    )
    yield from markdown(
        ("8 cores", "jax.checkpoint around layers", "stock", "ours"),
        (
            (
                generation,
                "yes" if recompute else "no",
                *(
                    f"{r['tokens']:,} ({gb(r['peak'])})" if r["tokens"] else "none"
                    for ours in (False, True)
                    for r in rows
                    if (r["generation"], r["recompute"], r["ours"]) == (generation, recompute, ours)
                ),
            )
            for generation, recompute in dict.fromkeys((r["generation"], r["recompute"]) for r in rows)
        ),
    )


GROUPS: dict[str, tuple[Callable[[Compiler], Iterator[Row]], Callable[[list[Row]], Iterator[str]], str]] = {
    "operators": (operators, operators_table, "One operator"),
    "wall": (wall, wall_table, "The 256k wall"),
    "scanned": (scanned, scanned_table, "Four scanned layers"),
    "tokens": (tokens, tokens_table, "How many tokens fit"),
    "layers": (layers, layers_table, "The honest table"),
    "sharding": (sharding, sharding_table, "Automatic sharding"),
    "model": (model, model_table, "A whole model"),
}


# ---- the report


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    header = tuple(header)
    yield ""
    yield f"| {' | '.join(header)} |"
    yield f"|{'---|' * len(header)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def report(results: dict[str, Any]) -> str:
    """The tables of docs/tpu.md."""
    v = results["versions"]
    lines = [f"`make tpu-check`, jax {v['jax']}, jaxlib {v['jaxlib']}, libtpu {v['libtpu']}, {results['date']}:"]
    for name, (_, table, title) in GROUPS.items():
        rows = results["groups"].get(name)
        lines += ["", f"### {title}", ""]
        lines += table(rows) if rows else ["Not run."]
    return "\n".join(lines) + "\n"


BEGIN, END = "<!-- tables: begin, written by bench/tpu_aot.py -->\n", "<!-- tables: end -->\n"


def document(text: str, results: dict[str, Any]) -> str:
    """`text` of docs/tpu.md with the tables of `results`."""
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"{DOCS.name} has lost one of its marks: {BEGIN.strip()} and {END.strip()}")
    return f"{before}{BEGIN}{report(results)}{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", metavar="group", help=f"which (default: all): {', '.join(GROUPS)}")
    parser.add_argument("--fetch", action="store_true", help=f"get libtpu {LIBTPU} with pip if it is not there")
    arguments = parser.parse_args()
    if unknown := set(arguments.groups) - set(GROUPS):
        parser.error(f"there is no group {', '.join(sorted(unknown))}; choose from {', '.join(GROUPS)}")
    if arguments.fetch:
        fetch()
    prepare()
    compiler = Compiler()
    path = smollm2.RESULTS / "tpu-aot.json"
    groups: dict[str, list[Row]] = {}
    with contextlib.suppress(FileNotFoundError):
        before = json.loads(path.read_text())
        groups = before["groups"] if before["versions"] == versions() else {}
    for name in arguments.groups or GROUPS:
        say(f"== {name}")
        groups[name] = list(GROUPS[name][0](compiler))
        ordered = {name: groups[name] for name in GROUPS if name in groups}
        smollm2.write("tpu-aot", {"versions": versions(), "groups": ordered})
        DOCS.write_text(document(DOCS.read_text(), json.loads(path.read_text())))


if __name__ == "__main__":
    main()
