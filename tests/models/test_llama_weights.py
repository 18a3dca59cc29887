"""The weight maps cover the model, and the permutation undoes llama.cpp's."""

import dataclasses

import numpy as np
import pytest
from flax import nnx
from tiny_configs import LLAMA

from jaxquant.models import Llama
from jaxquant.models._llama_weights import _deinterleave, gguf_origins, huggingface_origins

CONFIG = LLAMA


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_the_maps_name_each_parameter_once(tied, qkv_bias):
    config = dataclasses.replace(CONFIG, tied=tied, qkv_bias=qkv_bias)
    paths = {path for path, _ in nnx.to_flat_state(nnx.state(Llama.abstract(config)))}
    for origins in (gguf_origins(config, interleaved=True), huggingface_origins(config)):
        assert origins.keys() == paths
        assert len({origin.name for origin in origins.values()}) == len(paths)


@pytest.mark.parametrize("shape", [(32, 3), (32,)])
def test_pairs_side_by_side_come_to_lie_half_a_head_apart(shape):
    # Row 16 * head + 2 * pair + member of the file is row 16 * head + 8 * member + pair of ours.
    rows = np.arange(np.prod(shape)).reshape(shape)
    ours = _deinterleave(rows, 2)
    for head in range(2):
        for pair in range(8):
            for member in range(2):
                theirs = rows[16 * head + 2 * pair + member]
                np.testing.assert_array_equal(ours[16 * head + 8 * member + pair], theirs)
