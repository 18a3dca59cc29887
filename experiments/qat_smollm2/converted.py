"""Whether what was trained is what is used: by the command line, site by site, code by code."""

import json
import pathlib
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from fidelity.smollm2 import Inputs
from flax import nnx

import jaxquant as jq
from jaxquant.intercept import SitePlan
from jaxquant.intercept._evaluate import Evaluator, Use
from jaxquant.intercept._linen import checked, is_codes
from jaxquant.intercept._modes import Infer
from jaxquant.intercept._nnx import nnx_function
from jaxquant.intercept._simulate import entered, Simulate
from jaxquant.intercept._trace import run
from jaxquant.intercept._variables import leaf_paths, learned_of, parameters, stamped

from .subject import Subject

COMMAND = "import sys; from jaxquant.cli import main; sys.exit(main())"


def by_command_line(
    folder: pathlib.Path, tokens: np.ndarray, against: pathlib.Path
) -> dict[str, Any]:
    """What `jaxquant evaluate` says of a folder, in a process of its own.

    **Raises:** `RuntimeError` with what it wrote, if it failed.
    """
    npz, out = folder.with_suffix(".npz"), folder.with_suffix(".json")
    np.savez(npz, tokens=tokens.astype(np.int32))
    command = [sys.executable, "-c", COMMAND, "evaluate", str(folder), "--tokens", str(npz)]
    command += ["--against", str(against), "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"jaxquant evaluate {folder} failed: {done.stderr[-2000:]}")
    return json.loads(out.read_text(encoding="utf-8"))


def captured(subject: Subject, tokens: np.ndarray) -> dict[str, jax.Array]:
    """What the sites of a plan multiply their weights with in the float model, `[rows, k]`."""
    assert subject.plan is not None
    ids = jnp.asarray(tokens, jnp.int32)
    found = jq.observe(subject.opened.model, subject.floats, [(ids,)], observers=[Inputs()])
    return {
        site.site: found[site.site]["inputs"]
        for site in subject.plan.sites
        if site.weights is not None and site.site in found
    }


def chosen(inputs: Mapping[str, jax.Array], count: int) -> dict[str, jax.Array]:
    """At most `count` sites, from the first to the last."""
    names = list(inputs)
    if len(names) <= count:
        return dict(inputs)
    taken = np.linspace(0, len(names) - 1, count).round().astype(int)
    return {names[i]: inputs[names[i]] for i in taken}


def site_differences(
    subject: Subject, trained: Any, inputs: Mapping[str, jax.Array]
) -> dict[str, float]:
    """For each site, by how much its outputs differ in training and after: 0 is the same bits.

    The largest difference over the largest magnitude. Each site is a model of one linear layer with
    the same rule, weights and learned scales, simulated, and converted and wrapped.
    """
    plan = subject.plan
    assert plan is not None
    weights, learned = parameters(trained), learned_of(trained)
    found = {}
    for name, x in inputs.items():
        site = plan.by_site[name]
        simulated, used = _both(site, weights[site.path], learned.get(site.path, {}), x)
        off = np.abs(np.asarray(simulated, np.float64) - np.asarray(used, np.float64)).max()
        found[name] = float(off / max(np.abs(used).max(), 1e-30))
    return found


def _both(site: SitePlan, kernel: Any, learned: Mapping[str, Any], x: Any) -> tuple[Any, Any]:
    """The outputs of a site as it is trained, and as it is used."""
    linear = nnx.Linear(*kernel.shape, use_bias=False, rngs=nnx.Rngs(0))
    linear.kernel.set_value(kernel)
    assert site.weights is not None and site.training is not None
    rule = jq.Rule(
        match="*", weights=site.weights, activations=site.activations, training=site.training
    )
    plan = jq.plan(linear, nnx.state(linear), x, recipe=jq.Recipe(name="one site", rules=(rule,)))
    own = {} if not learned else {"kernel": learned}
    variables = stamped(nnx.state(linear), plan.fingerprint, {}, own)
    simulated = jq.simulate(linear, plan, variables)
    wrapped = jq.wrap(linear, plan, jq.prepare(jq.convert(variables, plan), plan))
    call = nnx.jit(lambda model, x: model(x))
    return np.asarray(call(simulated, x)), np.asarray(call(wrapped, x))


class _Kept:
    """Keeps the codes of the activations of each site, by site, while a call is traced."""

    codes: dict[str, Any]

    def keep(self, mode: Any, uses: Sequence[Use], operands: Sequence[Any], eqn: Any) -> None:
        for use in uses:
            site = mode.site_plan(use)
            if site is not None and site.activations is not None:
                contracted, _ = eqn.params["dimension_numbers"]
                other = 1 - use.side
                rounded = jq.quantize_activation(
                    operands[other], site.activations, contracted=contracted[other]
                )
                self.codes[use.site] = rounded.codes


class _Used(Infer, _Kept):
    def compute(self, uses: Sequence[Use], operands: Sequence[Any], eqn: Any) -> Any:
        self.keep(self, uses, operands, eqn)
        return super().compute(uses, operands, eqn)


class _Trained(Simulate, _Kept):
    def compute(self, uses: Sequence[Use], operands: Sequence[Any], eqn: Any) -> Any:
        self.keep(self, uses, operands, eqn)
        return super().compute(uses, operands, eqn)


def flipped_codes(subject: Subject, trained: Any, tokens: np.ndarray) -> dict[str, float]:
    """The share of the codes of activations that differ in training and after, by site.

    Both models read the same tokens from beginning to end, compiled as a whole.
    """
    plan = subject.plan
    assert plan is not None
    function = nnx_function(subject.opened.model)
    ids = jnp.asarray(tokens, jnp.int32)

    @jax.jit
    def in_training(tvariables: Any) -> Any:
        variables = checked(tvariables, plan)
        mode = _Trained(plan)
        mode.codes = {}
        own = entered(plan, parameters(variables), learned_of(tvariables), None)
        paths = leaf_paths(variables)
        out, _ = run(
            function, variables, paths, (ids,), {}, Evaluator(mode),
            lambda path, leaf: path in own, {}, own,
        )  # fmt: skip
        return out, mode.codes

    @jax.jit
    def after(qvariables: Any) -> Any:
        variables = checked(qvariables, plan)
        mode = _Used(plan)
        mode.codes = {}
        paths = leaf_paths(variables)
        out, _ = run(function, variables, paths, (ids,), {}, Evaluator(mode), is_codes)
        return out, mode.codes

    _, ours = in_training(trained)
    _, theirs = after(jq.prepare(subject.converted(trained), plan))
    return {
        name: float(np.mean(np.asarray(codes) != np.asarray(theirs[name])))
        for name, codes in ours.items()
    }
