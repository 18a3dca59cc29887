"""A training loop to start from: see README.md. It knows nothing of models or of quantization."""

from .batches import Order as Order, shuffled as shuffled, TokenWindows as TokenWindows
from .checkpoints import Checkpoints as Checkpoints
from .loop import identity_of as identity_of, train as train, Trained as Trained
from .mesh import FSDP as FSDP, make_mesh as make_mesh, of_parts as of_parts, placed as placed
from .metrics import Metrics as Metrics, read_metrics as read_metrics
from .optimizer import (
    learning_rate as learning_rate,
    make_optimizer as make_optimizer,
    two_stage as two_stage,
)
from .plots import plot_runs as plot_runs
from .problem import Problem as Problem, State as State, TrainingError as TrainingError
from .settings import (
    as_data as as_data,
    Devices as Devices,
    Group as Group,
    Loop as Loop,
    Optimizer as Optimizer,
    read_settings as read_settings,
    Settings as Settings,
    typed as typed,
)
from .shares import in_shares as in_shares
from .step import in_parts as in_parts, make_step as make_step, start as start
