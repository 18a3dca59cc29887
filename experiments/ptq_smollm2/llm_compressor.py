"""The peer's GPTQ on the same tokens: needs `pip install llmcompressor gguf`, in a venv of its own.

Prints its seconds, its memory, and its scores against the float32 model. See README.md.
"""

import argparse
import json
import pathlib
import resource
import sys
import tempfile
import time
from typing import Any

import numpy as np
import torch  # type: ignore[import-not-found]
from datasets import Dataset  # type: ignore[import-not-found]
from llmcompressor import oneshot  # type: ignore[import-not-found]
from llmcompressor.modifiers.gptq import GPTQModifier  # type: ignore[import-not-found]
from transformers import (  # type: ignore[import-not-found]
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=pathlib.Path, help="SmolLM2, a GGUF file")
    parser.add_argument("--calibration", type=pathlib.Path, required=True)
    parser.add_argument("--evaluation", type=pathlib.Path, required=True)
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--threads", type=int, required=True)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    calibration = np.load(given.calibration)["tokens"][: given.windows]
    evaluation = np.load(given.evaluation)["tokens"]
    group = {"targets": ["Linear"], "weights": WEIGHTS}
    recipe = GPTQModifier(ignore=["lm_head"], config_groups={"group_0": group})
    with tempfile.TemporaryDirectory() as folder:
        # It reads a folder with a configuration and a tokenizer, though tokens are given.
        unpack(given.model, folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        start = time.perf_counter()
        oneshot(
            model=model,
            dataset=dataset(calibration),
            recipe=recipe,
            max_seq_length=calibration.shape[1],
            num_calibration_samples=len(calibration),
            shuffle_calibration_samples=False,
        )
        seconds = time.perf_counter() - start
        reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    unit = 1 if sys.platform == "darwin" else 1024
    found = {
        "seconds": seconds,
        "threads": given.threads,
        "windows": len(calibration),
        "rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        **scores(model, reference, evaluation),
    }
    print(json.dumps(found))


def unpack(gguf: pathlib.Path, folder: str) -> None:
    source, file = str(gguf.parent), gguf.name
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
    # A model from such a file counts as quantized, and is not saved: its values go into another.
    facts = {k: v for k, v in model.config.to_dict().items() if k != "quantization_config"}
    plain = LlamaForCausalLM(LlamaConfig(**facts))
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(folder)


def dataset(tokens: np.ndarray) -> Dataset:
    ids = tokens.astype(np.int64)
    return Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": np.ones_like(ids)})


@torch.no_grad()
def scores(model: Any, reference: Any, tokens: np.ndarray) -> dict[str, float]:
    """Means over all positions: KL(reference, model), and what the NLL grew by."""
    divergences, growths = [], []
    for window in tokens:
        ids = torch.from_numpy(window.astype(np.int64))[None]
        wanted, got = (
            torch.log_softmax(m(ids).logits[0, :-1].float(), dim=-1) for m in (reference, model)
        )
        divergences.append((wanted.exp() * (wanted - got)).sum(-1).mean().item())
        growths.append((wanted - got).gather(1, ids[0, 1:, None]).mean().item())
    return {"kl": float(np.mean(divergences)), "nll_difference": float(np.mean(growths))}


if __name__ == "__main__":
    main()
