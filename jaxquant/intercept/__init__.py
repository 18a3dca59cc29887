"""Finding the sites of a Flax model, and evaluating it with other arithmetic."""

from . import observers as observers
from ._account import Account as Account, SiteAccount as SiteAccount
from ._adapters import add_adapters as add_adapters
from ._fold import Fold as Fold, SiteRef as SiteRef, Source as Source, tie as tie
from ._folds import find_folds as find_folds
from ._front import observe as observe, plan as plan, wrap as wrap
from ._graph import (
    evaluate_step as evaluate_step,
    Graph as Graph,
    Step as Step,
    trace as trace,
    Value as Value,
)
from ._histogram import Histogram as Histogram
from ._linen import interceptor as interceptor, LinenModel as LinenModel
from ._mark import MarkedSite as MarkedSite, Root as Root
from ._nnx import NNXModel as NNXModel
from ._observers import (
    Count as Count,
    Drift as Drift,
    Extremes as Extremes,
    Gram as Gram,
    mean_magnitude as mean_magnitude,
    Moments as Moments,
    nonfinite as nonfinite,
    Peak as Peak,
)
from ._partition import (
    combine as combine,
    partition as partition,
    training_labels as training_labels,
)
from ._plan import LeafPlan as LeafPlan, Plan as Plan, PlanError as PlanError, SitePlan as SitePlan
from ._prepare import prepare as prepare
from ._rules import Recipe as Recipe, Rule as Rule
from ._scales import update_scales as update_scales
from ._train import (
    check_learned as check_learned,
    convert as convert,
    simulate as simulate,
    SimulatedLinen as SimulatedLinen,
    SimulatedNNX as SimulatedNNX,
    start_training as start_training,
)
from ._variables import (
    leaf_paths as leaf_paths,
    map_leaves as map_leaves,
    PlanStamp as PlanStamp,
    stamped as stamped,
)
