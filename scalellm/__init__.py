"""One decoder, every way to train it, the same loss."""

__version__ = "0.1.0"
