"""Reference models in Flax NNX, and how their weights are read from foreign files."""

from ._generate import generate as generate
from ._inventory import Inventory as Inventory
from ._inventory import TensorSize as TensorSize
from ._inventory import variables_inventory as variables_inventory
from ._llama import KVCache as KVCache, Llama as Llama
from ._llama_config import LlamaConfig as LlamaConfig
from ._load import bind as bind, load_model as load_model, LoadedModel as LoadedModel
from ._open import OpenedModel as OpenedModel
from ._open import is_checkpoint as is_checkpoint
from ._open import open_model as open_model
from ._open import read_inventory as read_inventory
from ._open import save_model as save_model
from ._smollm2 import find_smollm2 as find_smollm2
