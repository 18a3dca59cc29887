"""jaxquant: smaller and faster JAX/Flax models, by storing and computing numbers in fewer bits."""

from . import algorithms as algorithms, recipes as recipes, training as training
from .algorithms import quantize as quantize
from .calibrate import calibrate as calibrate, token_batches as token_batches
from .checkpoint import CheckpointError as CheckpointError, load as load, save as save
from .intercept import (
    Account as Account,
    add_adapters as add_adapters,
    combine as combine,
    convert as convert,
    interceptor as interceptor,
    observe as observe,
    observers as observers,
    partition as partition,
    Plan as Plan,
    plan as plan,
    PlanError as PlanError,
    prepare as prepare,
    Recipe as Recipe,
    Rule as Rule,
    simulate as simulate,
    start_training as start_training,
    training_labels as training_labels,
    update_scales as update_scales,
    wrap as wrap,
)
from .numerics import (
    AbsMax as AbsMax,
    BFLOAT16 as BFLOAT16,
    Convention as Convention,
    E4M3 as E4M3,
    E5M2 as E5M2,
    FLOAT16 as FLOAT16,
    FLOAT32 as FLOAT32,
    Format as Format,
    formats as formats,
    INT4 as INT4,
    INT8 as INT8,
    MinMax as MinMax,
    ranges as ranges,
)
from .ops import (
    dot as dot,
    dot_general as dot_general,
    einsum as einsum,
    Outliers as Outliers,
    OutlierWeights as OutlierWeights,
    quantize_activation as quantize_activation,
    Refusal as Refusal,
    take as take,
)
from .qarray import (
    dequantize as dequantize,
    Layout as Layout,
    PER_CHANNEL as PER_CHANNEL,
    PER_TENSOR as PER_TENSOR,
    QArray as QArray,
    quantize_array as quantize_array,
    relayout as relayout,
    Scheme as Scheme,
    schemes as schemes,
    Tile as Tile,
)
