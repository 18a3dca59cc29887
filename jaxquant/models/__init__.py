"""Reference models in Flax NNX, and how their weights are read from foreign files."""

from ._generate import generate as generate
from ._inventory import (
    Inventory as Inventory,
    TensorSize as TensorSize,
    variables_inventory as variables_inventory,
)
from ._llama import KVCache as KVCache, Llama as Llama
from ._llama_config import LlamaConfig as LlamaConfig
from ._load import bind as bind, load_model as load_model, LoadedModel as LoadedModel
from ._open import (
    is_checkpoint as is_checkpoint,
    open_model as open_model,
    OpenedModel as OpenedModel,
    read_inventory as read_inventory,
    save_model as save_model,
)
from ._smollm2 import find_smollm2 as find_smollm2
