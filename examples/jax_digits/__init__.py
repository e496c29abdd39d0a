"""A small ReLU ResNet in Flax Linen on scikit-learn's digits, with jax.nn.relu and with unswag_relu."""
