"""Trains a small ReLU language model on the docstrings of this Python, with jax.nn.relu and with unswag_relu, and compares.

Flax NNX, float32, bytes as tokens, Adam. Both sides start from the same weights and see the same batches: the losses are
compared bit by bit. What the forward pass keeps for the backward pass is counted for two ways of training: all weights, and
with the second matrices of the MLPs frozen, where the ReLU's output need not be kept. Written to --out: result.json and
picture.png.

    python -m examples.jax_lm
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import jax
import numpy as np
from examples import jax_sides
from examples.docstrings import documented
from examples.jax_lm.model import LanguageModel, cross_entropy
from flax import nnx

from unswag import audit

ROOT = Path(__file__).parents[2]


def batches(steps: int, rows: int, tokens: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pieces of the text, drawn once: (input, label), the label one byte on."""
    text = np.frombuffer("\n\n".join(f"{item.signature}\n{item.text}" for item in documented()).encode(), np.uint8)
    starts = np.random.default_rng(0).integers(0, len(text) - tokens - 1, (steps, rows))
    pieces = text[starts[..., None] + np.arange(tokens + 1)].astype(np.int32)
    return [(piece[:, :-1], piece[:, 1:]) for piece in pieces]


def is_down(path: tuple[Any, ...], _: Any) -> bool:
    return "down" in path


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120, help="per side (default 120)")
    parser.add_argument("--rows", type=int, default=16, help="of a batch (default 16)")
    parser.add_argument("--tokens", type=int, default=128, help="of a row, which are bytes (default 128)")
    parser.add_argument("--layers", type=int, default=4, help="(default 4)")
    parser.add_argument("--width", type=int, default=128, help="of the hidden states; MLPs have 4 times that (default 128)")
    parser.add_argument("--out", type=Path, default=ROOT / "demo-out" / "jax-lm", help="folder (default demo-out/jax-lm)")
    args = parser.parse_args(arguments)

    data = batches(args.steps, args.rows, args.tokens)
    shapes = [jax.ShapeDtypeStruct(part.shape, part.dtype) for part in data[0]]

    def model(act: Any) -> LanguageModel:
        return LanguageModel(args.layers, args.width, max(1, args.width // 32), args.tokens, act, nnx.Rngs(0))

    _, down, rest = nnx.split(nnx.jit(model, static_argnums=0)(jax.nn.relu), is_down, ...)
    sides, kept = [], {"all trained": {}, "second matrices frozen": {}}
    for name, act in jax_sides.ACTIVATIONS.items():
        graph = nnx.graphdef(nnx.eval_shape(lambda act=act: model(act)))

        def loss(rest: Any, down: Any, x: Any, labels: Any, graph: Any = graph) -> jax.Array:
            return cross_entropy(nnx.merge(graph, down, rest)(x), labels)

        def loss_of_all(both: Any, x: Any, labels: Any, loss: Any = loss) -> jax.Array:
            return loss(*both, x, labels)

        tokens = args.rows * args.tokens
        kept["all trained"][name] = audit(loss_of_all, (rest, down), *shapes, tokens=tokens)
        kept["second matrices frozen"][name] = audit(loss, rest, down, *shapes, tokens=tokens)
        print(kept["second matrices frozen"][name])
        sides.append(jax_sides.train(name, loss_of_all, (rest, down), data, rate=1e-3))
    title = f"{args.layers} layers of width {args.width}, {args.rows} x {args.tokens} bytes of text a step, float32"
    return jax_sides.report(args.out, title, sides, kept, "token")


if __name__ == "__main__":
    main()
