"""The world outside: files of other projects, and our own checkpoints."""

from ._bitsandbytes import (
    read_bitsandbytes as read_bitsandbytes,
    write_bitsandbytes as write_bitsandbytes,
)
from ._errors import CheckpointError as CheckpointError
from ._folder import load as load, read_files as read_files, save as save
from ._gguf import GGUFFile as GGUFFile, open_gguf as open_gguf
from ._huggingface import (
    fetch_huggingface as fetch_huggingface,
    HuggingFaceFolder as HuggingFaceFolder,
    open_huggingface as open_huggingface,
    read_huggingface_config as read_huggingface_config,
    read_json as read_json,
)
from ._lazy import LazyArray as LazyArray, materialize as materialize
from ._manifest import (
    Manifest as Manifest,
    read_account as read_account,
    read_manifest as read_manifest,
)
from ._tokenizer import (
    Tokenizer as Tokenizer,
    tokenizer_from_gguf as tokenizer_from_gguf,
    tokenizer_from_huggingface as tokenizer_from_huggingface,
)
from ._torch_file import open_torch as open_torch, TorchFile as TorchFile
