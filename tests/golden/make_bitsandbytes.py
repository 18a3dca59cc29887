"""Writes `bitsandbytes*.npz`: what bitsandbytes makes of a few arrays, on a CPU.

Run by hand where torch and bitsandbytes are installed; README.md has versions and command.
"""

import pathlib

import bitsandbytes
import numpy as np
import torch
from bitsandbytes.functional import create_dynamic_map, dequantize_4bit, quantize_4bit

HERE = pathlib.Path(__file__).parent
# The kernel that bitsandbytes has for processors without one of their own: nearest code by exact
# midpoints, as on a GPU. Its CPU kernel for 8 bits looks codes up in a table of 65536 points.
ANY_DEVICE = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)
quantize_blockwise = torch.ops.bitsandbytes.quantize_blockwise.default

# bitsandbytes.functional.get_4bit_type, in order of code; FP4 over 12.
NF4 = quantize_4bit(torch.ones(64), quant_type="nf4")[1].code.numpy()
FP4 = quantize_4bit(torch.ones(64), quant_type="fp4")[1].code.numpy()


def inputs() -> dict[str, np.ndarray]:
    """Small arrays. All are kept in the file, so that no generator needs to give them again."""
    rng = np.random.Generator(np.random.PCG64(7))
    gauss, heavy = rng.standard_normal((16, 128)), rng.standard_t(4, (16, 128))
    zeros = rng.standard_normal((4, 128))
    zeros[0] = 0
    zeros[2, :64] = 0
    short = rng.standard_normal(5 * 64 + 37)
    # Each block holds 1.0, so that every value is divided by exactly 1: midpoints stay ties.
    ties = np.zeros((2, 128), np.float32)
    for row, table in zip(ties, (NF4, FP4), strict=True):
        ordered = np.unique(table)
        middles = (ordered[:-1] + ordered[1:]) / 2
        beyond = np.nextafter(middles, np.float32(2))
        signs_of_zero = np.array([-0.0, 1e-3, -1e-3, 1e-30, -1e-30], np.float32)
        one = np.concatenate([[1], middles, beyond, -beyond, signs_of_zero])
        row[: len(one)] = one
        row[64] = 1
    made = {
        "gauss": gauss,
        "heavy": heavy,
        "tiny": 1e-6 * gauss[:4],
        "huge": 1e30 * heavy[:4],
        "zeros": zeros,
        "short": short,
        "ties": ties,
    }
    return {name: x.astype(np.float32) for name, x in made.items()}


def double_inputs() -> dict[str, np.ndarray]:
    """More blocks than one second-level block of 256 holds, of different sizes."""
    rng = np.random.Generator(np.random.PCG64(10))
    x = rng.standard_normal((264, 64)) * np.exp(0.3 * rng.standard_normal((264, 1)))
    some = x[:7].copy()
    some[3] = 0
    # As float16, which holds them in half the space and is exact once read.
    made = {"many": x, "zeros": some, "single": x[:1]}
    return {name: part.astype(np.float16) for name, part in made.items()}


def single_level() -> dict[str, np.ndarray]:
    kept = {}
    for name, x in inputs().items():
        kept[name] = x
        for kind in ("nf4", "fp4"):
            for block in (64, 128):
                packed, state = quantize_4bit(torch.from_numpy(x), blocksize=block, quant_type=kind)
                key = f"{name}.{kind}.{block}"
                kept[f"{key}.packed"] = packed.numpy().ravel()
                kept[f"{key}.absmax"] = state.absmax.numpy()
                if block == 64 and name in ("gauss", "short"):
                    kept[f"{key}.values"] = dequantize_4bit(packed, state).numpy().ravel()[-512:]
    return kept


def two_levels() -> dict[str, np.ndarray]:
    kept = {}
    for name, half in double_inputs().items():
        kept[name] = half
        # Flat: its CPU kernel misreads blocks that are longer than a row.
        x = torch.from_numpy(half.astype(np.float32)).ravel()
        for kind, block in (("nf4", 64), ("fp4", 64), ("nf4", 128)):
            if x.numel() < block:
                continue
            options = {"blocksize": block, "quant_type": kind}
            packed, plain = quantize_4bit(x, **options)
            again, state = quantize_4bit(x, compress_statistics=True, **options)
            assert torch.equal(packed, again)
            centred = plain.absmax - state.offset
            codes, nested = quantize_blockwise.redispatch(
                ANY_DEVICE, centred, create_dynamic_map(), 256
            )
            # The CPU kernel writes 0 for a block of zeros, the other one 1e-38 if it is short.
            assert torch.equal(nested.clamp(min=1e-38), state.state2.absmax.clamp(min=1e-38))
            key = f"{name}.{kind}.{block}"
            if name != "many" or (kind, block) == ("nf4", 64):
                kept[f"{key}.packed"] = packed.numpy().ravel()
            kept[f"{key}.absmax"] = plain.absmax.numpy()
            kept[f"{key}.offset"] = state.offset.numpy()
            kept[f"{key}.absmax_codes"] = codes.numpy()
            kept[f"{key}.absmax_codes_cpu"] = state.absmax.numpy()
            kept[f"{key}.nested_absmax"] = state.state2.absmax.numpy()
            values = dequantize_4bit(again, state).numpy()
            kept[f"{key}.values"] = values.ravel()[-2 * block :]
            differ = int((codes != state.absmax).sum())
            print(f"{key}: {differ} of {len(codes)} codes of the CPU kernel differ")
    return kept


def main() -> None:
    versions = f"bitsandbytes {bitsandbytes.__version__}, torch {torch.__version__}"
    one = {"versions": np.array(versions), "nf4": NF4, "fp4": FP4}
    one["dynamic"] = create_dynamic_map().numpy()
    np.savez_compressed(HERE / "bitsandbytes.npz", **one, **single_level())
    two = {"versions": np.array(versions), **two_levels()}
    np.savez_compressed(HERE / "bitsandbytes_double.npz", **two)


if __name__ == "__main__":
    main()
