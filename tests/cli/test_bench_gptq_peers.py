"""The loops of others, which are timed beside ours: they have to be GPTQ."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.algorithms import GPTQ
from jaxquant.cli._bench_gptq import gptq_input, GROUP, SCHEME
from jaxquant.cli._bench_gptq_peers import torch_gptq


def test_the_torch_loop_gives_our_codes_but_within_a_block():
    pytest.importorskip("torch", reason="a peer, timed where it is installed")
    w, gram = gptq_input(8, GROUP)
    codes = torch_gptq(w, gram, group=GROUP, threads=1)()
    ours = GPTQ().run(jnp.asarray(w), {"gram": jnp.asarray(gram)}, SCHEME).codes
    # One group: beyond it, the loop's scales are of stale columns. A negative peak is a tie.
    assert (np.asarray(ours) == codes).mean() > 0.9
