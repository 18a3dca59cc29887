"""Training in FP8 beside bfloat16: see README.md."""
