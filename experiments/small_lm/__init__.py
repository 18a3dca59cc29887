"""A small language model, trained in float and in few bits: see README.md."""
