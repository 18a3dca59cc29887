"""The same roundings in PyTorch, on transformers' BERT, without jaxquant: an independent check.

    python torch_side.py FOLDER TEXT

FOLDER is MiniLM's (`jaxquant.models.find_minilm()`), TEXT the excerpt that `run.py` takes by
default. Needs torch and transformers. Prints mean cosines to float32 over 200 pairs of verses.
"""

import pathlib
import sys
from collections.abc import Callable

import torch
from transformers import AutoTokenizer, BertModel

Rounding = Callable[[torch.Tensor], torch.Tensor]


def per_channel(w: torch.Tensor) -> torch.Tensor:
    """int8, symmetric, one scale along the last axis: an output channel's, or a token's."""
    scale = w.abs().amax(-1, keepdim=True) / 127
    return (w / scale).round().clamp(-127, 127) * scale


def zero_points(x: torch.Tensor) -> torch.Tensor:
    """int8 with a zero point, one of each along the last axis."""
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = (high - low) / 255
    zero = (-low / scale).round()
    return (((x / scale).round() + zero).clamp(0, 255) - zero) * scale


def groups(w: torch.Tensor) -> torch.Tensor:
    """int4 in groups of 64 inputs; the largest of a group meets -8, and scales are bfloat16."""
    tiles = w.reshape(w.shape[0], -1, 64)
    largest = tiles.gather(-1, tiles.abs().argmax(-1, keepdim=True))
    scale = (largest / -8).bfloat16().float()
    return ((tiles / scale).round().clamp(-8, 7) * scale).reshape(w.shape)


def verses(file: pathlib.Path) -> list[str]:
    chapters: list[list[str]] = []
    for line in filter(None, file.read_text(encoding="utf-8").splitlines()):
        words = line.split()
        if len(words) == 2 and words[1].isdigit():
            chapters.append([])
        else:
            chapters[-1].append(line.strip())
    pairs = [
        " ".join(two) for chapter in chapters for two in zip(chapter, chapter[1:], strict=False)
    ]
    return [pairs[index * len(pairs) // 200] for index in range(200)]


def main() -> None:
    folder, texts = sys.argv[1], verses(pathlib.Path(sys.argv[2]))
    settings = {"padding": "max_length", "truncation": True, "max_length": 128}
    encoded = AutoTokenizer.from_pretrained(folder)(texts, return_tensors="pt", **settings)

    def embed(weights: Rounding | None = None, activations: Rounding | None = None) -> torch.Tensor:
        model = BertModel.from_pretrained(folder).eval()
        for name, layer in model.named_modules():
            if not isinstance(layer, torch.nn.Linear) or "pooler" in name:
                continue
            if weights is not None:
                layer.weight.data = weights(layer.weight.data)
            if activations is not None:
                layer.register_forward_pre_hook(lambda _, inputs: (activations(inputs[0]),))
        with torch.no_grad():
            features = model(**encoded).last_hidden_state.double()
        mask = encoded["attention_mask"][..., None]
        mean = (features * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.normalize(mean, dim=1)

    plain = embed()
    sides = {
        "w8a16": (per_channel, None),
        "w8a8": (per_channel, per_channel),
        "w8a8 with zero points": (per_channel, zero_points),
        "w4a16_g64": (groups, None),
    }
    for name, roundings in sides.items():
        print(name, f"{(embed(*roundings) * plain).sum(1).mean():.5f}")


if __name__ == "__main__":
    main()
