"""A small ReLU language model in Flax NNX, with jax.nn.relu and with unswag_relu."""
