"""Trains a small ReLU ResNet on scikit-learn's digits, with jax.nn.relu and with unswag_relu, and compares.

Flax Linen, float32, Adam. Both sides start from the same weights and see the same batches: the losses are compared bit by
bit. Written to --out: result.json and picture.png.

    python -m examples.jax_digits
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from examples import jax_sides
from jax import Array
from sklearn.datasets import load_digits

from unswag import audit

ROOT = Path(__file__).parents[2]
HELD_OUT = 297  # of the 1,797 images

conv = partial(nn.Conv, use_bias=False, kernel_init=nn.initializers.he_uniform())


class Block(nn.Module):
    """He et al. 2015, with GroupNorm in place of BatchNorm."""

    channels: int
    act: Callable[[Array], Array]
    stride: int = 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        y = conv(self.channels, (3, 3), (self.stride, self.stride))(x)
        y = self.act(nn.GroupNorm(8)(y))
        y = nn.GroupNorm(8)(conv(self.channels, (3, 3))(y))
        if x.shape != y.shape:
            x = conv(self.channels, (1, 1), (self.stride, self.stride))(x)
        return self.act(x + y)


class ResNet(nn.Module):
    channels: int
    act: Callable[[Array], Array]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = self.act(nn.GroupNorm(8)(conv(self.channels, (3, 3))(x)))
        for channels, stride in ((self.channels, 1), (2 * self.channels, 2)):
            x = Block(channels, self.act, stride)(x)
        return nn.Dense(10)(x.mean((1, 2)))


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120, help="per side (default 120)")
    parser.add_argument("--rows", type=int, default=64, help="images of a batch (default 64)")
    parser.add_argument("--channels", type=int, default=32, help="of the first stage (default 32)")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "demo-out" / "jax-digits", help="folder (default demo-out/jax-digits)"
    )
    args = parser.parse_args(arguments)

    digits = load_digits()
    images = (digits.images[..., None] / 16).astype(np.float32)
    random = np.random.default_rng(0)
    order = random.permutation(len(images))
    tested, trained = order[:HELD_OUT], order[HELD_OUT:]
    chosen = [random.choice(trained, args.rows, replace=False) for _ in range(args.steps)]
    data = [(images[rows], digits.target[rows].astype(np.int32)) for rows in chosen]

    parameters = jax.jit(ResNet(args.channels, jax.nn.relu).init)(jax.random.key(0), data[0][0])
    sides, kept = [], {"all trained": {}}
    for name, act in jax_sides.ACTIVATIONS.items():
        model = ResNet(args.channels, act)

        def loss(parameters: Any, x: Any, labels: Any, model: ResNet = model) -> jax.Array:
            return optax.softmax_cross_entropy_with_integer_labels(model.apply(parameters, x), labels).mean()

        kept["all trained"][name] = audit(loss, parameters, *data[0], tokens=args.rows)
        sides.append(jax_sides.train(name, loss, parameters, data, rate=2e-3))
    logits = jax.jit(model.apply)(sides[-1].parameters, images[tested])
    right = float(jnp.mean(jnp.argmax(logits, -1) == digits.target[tested]))
    print(f"{100 * right:.1f} % of {HELD_OUT} held-out images are right with {sides[-1].name}")
    title = f"ResNet, {args.channels} channels, batches of {args.rows} images of 8 x 8, float32"
    return jax_sides.report(args.out, title, sides, kept, "image") | {"right": right}


if __name__ == "__main__":
    main()
