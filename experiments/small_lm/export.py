"""A float run as a Hugging Face folder with a model card: config, float16 weights, tokenizer.

python experiments/small_lm/export.py FOLDER --out run/small_lm --text kjv.txt
"""

import argparse
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from jaxquant.evaluate import score
from jaxquant.models import Llama, LlamaConfig, open_model
from jaxquant.models._llama_weights import huggingface_origins
from small_lm.one_run import corpus_of, text_arguments
from small_lm.score import FLOAT, float_model
from small_lm.settings import read_shared
from small_lm.text import Corpus, END

CARD = pathlib.Path(__file__).with_name("model_card.md")
MOST_LOST = 1e-3
"""Nats a token that float16 may cost; more is an error of this file."""


def tensors_of(model: Llama) -> dict[str, np.ndarray]:
    """The parameters as Hugging Face names and lays them, in float16.

    **Raises:** `ValueError` for a weight that float16 does not hold.
    """
    flat = dict(nnx.to_flat_state(nnx.state(model)))
    found = {}
    for path, origin in huggingface_origins(model.config).items():
        x = np.asarray(flat[path].get_value())
        x = x if origin.axes is None else x.transpose(origin.axes)
        found[origin.name] = np.ascontiguousarray(x.astype(np.float16))
        if not np.isfinite(found[origin.name]).all():
            raise ValueError(f"{origin.name} holds values that float16 does not. Use bfloat16.")
    return found


def config_json(config: LlamaConfig, end: int) -> dict[str, object]:
    """What `config.json` says."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_epsilon,
        "max_position_embeddings": config.max_length,
        "tie_word_embeddings": config.tied,
        "bos_token_id": end,
        "eos_token_id": end,
        "torch_dtype": "float16",
    }


def export(model: Llama, corpus: Corpus, row: dict[str, float], out: pathlib.Path) -> None:
    """Writes the folder."""
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors_of(model), out / "model.safetensors", metadata={"format": "pt"})
    end = corpus.tokenizer.eos_id
    assert end is not None
    files = {
        "config.json": config_json(model.config, end),
        "tokenizer_config.json": {"bos_token": END, "eos_token": END},
    }
    for name, content in files.items():
        (out / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    corpus.tokenizer.inner.save(str(out / "tokenizer.json"))
    said = {
        "parameters": f"{row['parameters']:,}",
        "tokens": f"{row['tokens']:,}",
        "steps": f"{row['steps']:,}",
        "nll": f"{row['nll']:.4f}",
        "bits_per_byte": f"{row['bits_per_byte']:.3f}",
        "held_out": ", ".join(corpus.books),
        "vocabulary": f"{model.config.vocab_size:,}",
        "length": str(model.config.max_length),
        "sha256": corpus.sha256,
    }
    card = CARD.read_text(encoding="utf-8")
    for key, value in said.items():
        card = card.replace("{" + key + "}", value)
    (out / "README.md").write_text(card, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=pathlib.Path, help="where the model goes")
    text_arguments(parser)
    given = parser.parse_args()
    shared, corpus = read_shared(given.configs), corpus_of(given)
    model = float_model(corpus, shared, given.out)
    if not isinstance(model, Llama):
        print(f"{given.out} holds no run {FLOAT}. Train it first.", file=sys.stderr)
        return 2
    row = json.loads((given.out / FLOAT / "row.json").read_text(encoding="utf-8"))
    export(model, corpus, row, given.folder)
    opened = open_model(given.folder)
    found = score(opened.ready(), corpus.held_out, against=model, batch=8)
    size = (given.folder / "model.safetensors").stat().st_size
    print(
        f"{size / 1e6:.2f} MB; NLL {found.nll:.4f} ({found.nll_difference:+.1e}), KL {found.kl:.1e}"
    )
    lost = found.nll_difference
    if lost is None or abs(lost) > MOST_LOST:
        print(f"float16 changes the NLL by {lost}: more than {MOST_LOST}.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
