"""The driver of calibrated quantization: a model block by block, in bounded memory, resumable."""
