"""Reference models in Flax, and how their weights are read from foreign files."""

from ._bert import (
    Bert as Bert,
    BertConfig as BertConfig,
    load_bert as load_bert,
    LoadedBert as LoadedBert,
)
from ._efficientnet import (
    EfficientNetLite0 as EfficientNetLite0,
    fold_batch_norm as fold_batch_norm,
    load_efficientnet_lite0 as load_efficientnet_lite0,
    LoadedEfficientNet as LoadedEfficientNet,
    normalize_pixels as normalize_pixels,
)
from ._generate import generate as generate
from ._gpt2 import (
    GPT2 as GPT2,
    GPT2Config as GPT2Config,
    load_gpt2 as load_gpt2,
    LoadedGPT2 as LoadedGPT2,
)
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
from ._outline import Outline as Outline, read_outline as read_outline
from ._packages import (
    find_efficientnet_lite0 as find_efficientnet_lite0,
    find_microformer as find_microformer,
    find_minilm as find_minilm,
    find_smollm2 as find_smollm2,
)
