"""How `torch_*.pt` beside this file were made: PyTorch 2.13, `python make_torch_files.py FOLDER`.

`torch_legacy.pt` and `torch_nested.pt` have the format of PyTorch before 1.6, the others that of
today.
"""

import collections
import pathlib
import sys

import torch

out = pathlib.Path(sys.argv[1])
base = torch.arange(24, dtype=torch.float32).reshape(4, 6) / 8
tensors = collections.OrderedDict()
for name in (
    *("float64", "float32", "float16", "bfloat16"),
    *("int64", "int32", "int16", "int8", "uint8", "bool"),
):
    tensors[name] = (torch.arange(6) - 3).to(getattr(torch, name)).reshape(2, 3)
tensors["transposed"] = base.t()
tensors["slice"] = base[1:, ::2]
tensors["shared"] = base
tensors["scalar"] = torch.tensor(2.5)
tensors["empty"] = torch.zeros(0, 5)
tensors["parameter"] = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
tensors["note"] = "not a tensor"
state = torch.nn.BatchNorm1d(2).state_dict()
tensors.update({f"norm.{name}": tensor for name, tensor in state.items()})
tensors._metadata = state._metadata

torch.save(tensors, out / "torch_zip.pt")
torch.save(tensors, out / "torch_zip_protocol4.pt", pickle_protocol=4)
torch.save(tensors, out / "torch_legacy.pt", _use_new_zipfile_serialization=False)
nested = {"epoch": 3, "state_dict": {"w": base}}
torch.save(nested, out / "torch_nested.pt", _use_new_zipfile_serialization=False)
torch.save(nested, out / "torch_nested_zip.pt")
