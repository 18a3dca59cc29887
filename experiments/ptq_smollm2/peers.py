"""What PyTorch peers made of the same model on the same tokens, as they were measured.

The tokens are known by their digests: figures are of use beside rows on those tokens alone.
"""

import dataclasses
import hashlib

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peer:
    """A published or measured row. `seconds` and `rss` (GB) are `None` where nobody wrote them."""

    what: str
    nll: float
    kl: float
    windows: int = 0
    seconds: str | None = None
    rss: float | None = None


EVALUATION = "ff746dd66ce144be"
"""Of the 24 windows of 512 tokens: see `digest`."""
CALIBRATION = "522dd381425dd842"
"""Of the 128 windows of 512 tokens."""

PEERS = {
    "sym_round": Peer(what="rounding", nll=0.301, kl=0.407, seconds="1", rss=0.9),
    "asym_round": Peer(what="rounding", nll=0.232, kl=0.308, seconds="1", rss=0.9),
    "sym_gptq": Peer(
        what="llm-compressor 0.14, static act-order",
        nll=0.300,
        kl=0.318,
        windows=128,
        seconds="233-260",
        rss=2.8,
    ),
    "sym_gptq_stored": Peer(
        what="llm-compressor, no act-order",
        nll=0.379,
        kl=0.433,
        windows=128,
        seconds="235",
        rss=2.3,
    ),
    "sym_gptq_damping": Peer(what="llm-compressor, damping 1e-4", nll=0.368, kl=0.374, windows=128),
    "asym_gptq": Peer(
        what="llm-compressor, static act-order",
        nll=0.166,
        kl=0.189,
        windows=128,
        seconds="336",
        rss=1.9,
    ),
    "awq": Peer(what="AWQ, duo scaling", nll=0.150, kl=0.149, windows=16, seconds="258", rss=1.8),
    "hqq": Peer(what="HQQ", nll=0.157, kl=0.210, seconds="8", rss=0.9),
    "nf4": Peer(what="NF4, blocks of 64", nll=0.219, kl=0.261, seconds="1-3", rss=0.9),
    "nvfp4": Peer(what="NVFP4", nll=0.220, kl=0.241, seconds="1-3", rss=0.9),
    "mxfp4": Peer(what="MXFP4", nll=0.400, kl=0.468, seconds="1-3", rss=0.9),
    "channel_round": Peer(what="rounding", nll=0.780, kl=0.916, seconds="1"),
    "channel_gptq": Peer(what="llm-compressor", nll=0.368, kl=0.414, windows=128, seconds="264"),
    "w3_round": Peer(what="rounding", nll=1.705, kl=1.886, seconds="1"),
    "w3_gptq": Peer(what="llm-compressor", nll=1.729, kl=1.747, windows=128, seconds="244"),
    "w3_hqq": Peer(what="HQQ", nll=1.998, kl=2.032, seconds="8"),
    "w8a8": Peer(what="dynamic", nll=0.028, kl=0.034, seconds="1", rss=1.8),
    "w8a8_smooth5": Peer(
        what="SmoothQuant 0.5", nll=0.025, kl=0.031, windows=32, seconds="42", rss=1.8
    ),
    "w8a8_smooth8": Peer(
        what="SmoothQuant 0.8", nll=0.020, kl=0.020, windows=32, seconds="43", rss=1.8
    ),
    "llm_int8": Peer(what="bitsandbytes, threshold 6", nll=0.015, kl=0.017, seconds="1", rss=1.1),
    "static": Peer(
        what="static per tensor", nll=0.766, kl=0.820, windows=32, seconds="42-84", rss=1.9
    ),
    "static_smooth5": Peer(
        what="static, SmoothQuant 0.5", nll=0.655, kl=0.698, windows=32, seconds="42-84", rss=1.9
    ),
    "static_smooth8": Peer(
        what="static, SmoothQuant 0.8", nll=0.653, kl=0.674, windows=32, seconds="42-84", rss=1.9
    ),
}


def digest(tokens: np.ndarray) -> str:
    """Of windows of tokens: their shape and values."""
    held = np.ascontiguousarray(tokens, np.int32)
    return hashlib.sha256(str(held.shape).encode() + held.tobytes()).hexdigest()[:16]
