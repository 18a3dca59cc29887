"""`jaxquant inspect`: every tensor of a model and what it costs."""

import argparse
import pathlib
from typing import Any

from ..checkpoint import read_account
from ..models import Inventory, is_checkpoint, read_inventory
from ._console import check_json, say, show, table, write_json


def run_inspect(arguments: argparse.Namespace) -> None:
    """The command."""
    check_json(arguments.json)
    inventory, source = read_inventory(arguments.model)
    local = pathlib.Path(arguments.model).expanduser()
    if is_checkpoint(local):
        say(str(read_account(local)))
    else:
        _show_tensors(inventory)
    say(f"{arguments.model}: {source}")
    say(
        f"{len(inventory.tensors)} tensors, {inventory.parameters:,} parameters, "
        f"{inventory.bytes:,} bytes, {inventory.bits_per_weight:.3f} bits a weight"
    )
    write_json(arguments.json, inventory_json(inventory))


def _show_tensors(inventory: Inventory) -> None:
    listed = table("tensor", "shape", "scheme", "bits", "size")
    for tensor in inventory.tensors:
        listed.add_row(
            tensor.path,
            "x".join(map(str, tensor.shape)),
            tensor.scheme,
            f"{tensor.bits_per_value:.3f}",
            size_text(tensor.bytes),
        )
    show(listed)


def inventory_json(inventory: Inventory) -> dict[str, Any]:
    """Totals and tensors as `--json` has them."""
    return {
        "bytes": inventory.bytes,
        "parameters": inventory.parameters,
        "bits_per_weight": inventory.bits_per_weight,
        "tensors": [
            {
                "path": tensor.path,
                "shape": list(tensor.shape),
                "scheme": tensor.scheme,
                "bits_per_value": tensor.bits_per_value,
                "bytes": tensor.bytes,
                "rule": tensor.rule,
                "reason": tensor.reason,
                "sqnr_db": tensor.sqnr_db,
            }
            for tensor in inventory.tensors
        ],
    }


def size_text(count: int | float) -> str:
    """Bytes in the unit that leaves three digits before the point."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
