"""The weight maps cover the model."""

import dataclasses

import pytest
from flax import nnx
from tiny_configs import LLAMA

from jaxquant.models import Llama
from jaxquant.models._llama_weights import gguf_origins, huggingface_origins

CONFIG = LLAMA


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_the_maps_name_each_parameter_once(tied, qkv_bias):
    config = dataclasses.replace(CONFIG, tied=tied, qkv_bias=qkv_bias)
    paths = {path for path, _ in nnx.to_flat_state(nnx.state(Llama.abstract(config)))}
    for origins in (gguf_origins(config, interleaved=True), huggingface_origins(config)):
        assert origins.keys() == paths
        assert len({origin.name for origin in origins.values()}) == len(paths)
