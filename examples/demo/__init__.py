"""The demonstration that `make demo` runs: memory and training of a real language model, stock and with UnSwag."""
