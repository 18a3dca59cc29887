"""The trap that `numerics.peak` avoids: a maximum that drops NaN makes a bad row look good."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from sides import INT8, ROWS

import jaxquant as jq
from jaxquant.ops.dot import layout_for

WIDTH = 576


def nan_rows() -> Iterator[dict[str, Any]]:
    """For several numbers of rows, the first of which holds a NaN: who notices?"""
    w = jq.quantize_array(
        jax.random.normal(jax.random.key(1), (WIDTH, WIDTH)), INT8, contracted=(0,)
    )
    w = jq.relayout(w, layout_for("xla_cpu", w, (0,), ()))
    plain_peak = jax.jit(lambda x: jnp.max(jnp.abs(x), axis=-1))

    def rounded_product(x: Any, w: Any) -> Any:
        return jq.dot_general(jq.quantize_activation(x, INT8, contracted=(1,)), w, ROWS)

    products = {
        "w8a16": jax.jit(lambda x, w: jq.dot_general(x, w, ROWS)),
        "w8a8": jax.jit(rounded_product),
    }
    for rows in (1, 2, 8, 64, 512):
        x = jax.random.normal(jax.random.key(rows), (rows, WIDTH)).at[0, 3].set(jnp.nan)
        row: dict[str, Any] = {"rows": rows, "jnp.max": bool(jnp.isnan(plain_peak(x)[0]))}
        for name, product in products.items():
            y = np.asarray(product(x, w))
            row[name] = bool(np.isnan(y[0]).all() and np.isfinite(y[1:]).all())
        yield row
