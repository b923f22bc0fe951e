"""The update: a pure, jitted `train_step(state, minibatch) -> (state, report)`.

The gradient of a mini-batch is accumulated over its micro-batches with denominators counted over
the whole mini-batch, so it does not depend on how the rows were split, packed or placed.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from aspo_jax import losses
from aspo_jax.agreement import gap_metrics
from aspo_jax.compiler import Options, update_options
from aspo_jax.errors import UserError
from aspo_jax.head import Head, logp_and_entropy, square_mass
from aspo_jax.model import Lora, Model, batch_sharding, trained_part
from aspo_jax.model.sharding import HOST, placed
from aspo_jax.optimizers import Offloaded
from aspo_jax.structs import (
    Max,
    Mean,
    Metric,
    Metrics,
    Minibatch,
    OldPolicy,
    Rows,
    Tokens,
    TrainState,
    empty_metrics,
    merge_metrics,
)

LARGEST_COPIED = 2**20  # elements of a state array that every device may hold whole: 4 MiB


class PlacementError(UserError):
    """A part of the training state has no place on the devices."""


class Goal(NamedTuple):
    """What an update maximises: the policy objective, its aggregation, and the entropy term."""

    objective: losses.Objective
    aggregate: losses.Aggregate
    entropy_bonus: float = 0.0


class Teacher(NamedTuple):
    """Another network that scores the rows, with the policy's tokens; its weights are apart."""

    model: Model
    head: Head


class Gate(NamedTuple):
    """How far, in nats, the sampler's log-probabilities may be from the trainer's to be used.

    mean: over response tokens. largest: of any of them.
    """

    mean: float
    largest: float


class Learner(NamedTuple):
    """The jitted functions of the update.

    state: shapes and shardings of the TrainState, whose params are what is trained.
    init: trained weights -> TrainState. Donates them.
    old_policy: (params, ref_params or None, minibatch, teacher_params or None) -> OldPolicy of the
        minibatch's rows.
    step: (state, minibatch, frozen weights or None, is_first=True) -> (state, report). Donates the
        state alone. is_first: nothing was updated since the minibatch was sampled; only a learner
        with a `Gate` asks.
    place: minibatch on the host -> on the devices, rows over the data axes. With several processes
        each passes its own rows of every micro-batch, as many as the others, and the same count.
    options: with which ``step`` is compiled.
    """

    state: TrainState
    init: Callable[[Any], TrainState]
    old_policy: Callable[..., OldPolicy]
    step: Callable[..., tuple[TrainState, Metrics]]
    place: Callable[[Minibatch], Minibatch]
    options: Options

    def with_old(
        self, params: Any, reference: Any, minibatch: Minibatch, teacher: Any = None
    ) -> Minibatch:
        """A placed minibatch with what its update compares itself with."""
        old = self.old_policy(params, reference, minibatch, teacher)
        return dataclasses.replace(minibatch, old=old)


def build_learner(
    model: Model,
    head: Head,
    goal: Goal,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    teacher: Teacher | None = None,
    lora: Lora | None = None,
    gate: Gate | None = None,
) -> Learner:
    """Jit the update for a mesh; shardings are the model's and the batch's, none is guessed.

    optimizer: an `aspo_jax.optimizers.Offloaded` one has its large state in the host's memory.
    teacher: whose log-probabilities the goal reads; None: it reads none.
    lora: the adapters that are trained, beside frozen weights; None: all weights are.
    gate: the old log-probabilities are the sampler's, where they are within it; None: they are
        computed.

    Raises:
        PlacementError: a large array of the optimizer's or the objective's state is no parameter's,
            and there are several devices; or there is nothing to keep in the host's memory.
    """
    trained = trained_part(model, lora)
    weights = trained.shardings(mesh)
    replicated = NamedSharding(mesh, PartitionSpec())

    def init(params) -> TrainState:
        step = jnp.zeros((), jnp.int32)
        return TrainState(params, optimizer.init(params), goal.objective.init(), step)

    abstract = jax.eval_shape(init, jax.eval_shape(trained.init, jax.random.key(0)))
    state_shardings = _state_shardings(abstract, weights, replicated)
    if isinstance(optimizer, Offloaded):
        state_shardings = _offloaded(abstract, state_shardings)
    step = make_train_step(model, head, goal, optimizer, weights, trained.whole, gate)
    has_squares = losses.reads(goal.objective, "old_square_BT")
    options = update_options(mesh)
    return Learner(
        state=placed(abstract, state_shardings),
        init=jax.jit(init, donate_argnums=0, out_shardings=state_shardings),
        old_policy=make_old_policy(model, head, mesh, teacher, has_squares, gate is not None),
        step=jax.jit(
            step,
            donate_argnums=0,
            out_shardings=(state_shardings, replicated),
            compiler_options=options.known or None,
        ),
        place=functools.partial(place, mesh),
        options=options,
    )


def place(mesh: Mesh, minibatch: Minibatch) -> Minibatch:
    """A minibatch on the devices; see `Learner`."""
    rows, replicated = batch_sharding(mesh, leading=1), NamedSharding(mesh, PartitionSpec())

    def put(x):
        # The global shape is given since jax would otherwise take rows that differ between
        # processes for copies of each other where the mesh does not split them.
        if x.ndim < 3:
            return jax.make_array_from_process_local_data(replicated, x, x.shape)
        shape = (x.shape[0], x.shape[1] * jax.process_count(), *x.shape[2:])
        return jax.make_array_from_process_local_data(rows, x, shape)

    return jax.tree.map(put, minibatch)


def _state_shardings(abstract: TrainState, weights: Any, replicated: NamedSharding) -> TrainState:
    """Moments lie as their parameters do; everything else, which must be small, on every device."""
    of_parameter = _of_parameters(abstract.params, weights)

    def of(path, x) -> NamedSharding:
        if (sharding := of_parameter(path, x)) is not None:
            return sharding
        if x.size > LARGEST_COPIED and replicated.mesh.size > 1:
            raise PlacementError(
                f"TrainState{jax.tree_util.keystr(path)} has {x.size:,} elements {x.shape} and is "
                f"no parameter's, so that each of {replicated.mesh.size} devices would hold all of "
                f"it; expected at most {LARGEST_COPIED:,}. Use an optimizer or objective whose "
                "large state is shaped as the parameters are, or one device"
            )
        return replicated

    return jax.tree_util.tree_map_with_path(of, abstract)


def _offloaded(abstract: TrainState, shardings: TrainState) -> TrainState:
    """The shardings, with moments in the host's memory."""
    of_parameter = _of_parameters(abstract.params, shardings.params)

    def of(path, x, sharding: NamedSharding) -> NamedSharding:
        is_large = of_parameter(path, x) is not None
        return sharding.with_memory_kind(HOST) if is_large else sharding

    moved = jax.tree_util.tree_map_with_path(of, abstract.opt_state, shardings.opt_state)
    if moved == shardings.opt_state:
        raise PlacementError(
            "Optim.offload: the optimizer keeps no array that is shaped as a parameter, so that "
            "nothing would go to the host's memory; set it to False, or Optim.name to 'adamw'"
        )
    return dataclasses.replace(shardings, opt_state=moved)


def _of_parameters(params: Any, values: Any) -> Callable[[Any, Any], Any]:
    """(path, array) of a state -> the value of the parameter that it belongs to, None if to none.

    A moment has its parameter's shape and, in whatever holds it, its parameter's path.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    known = {
        (path, x.shape): value
        for (path, x), value in zip(leaves, jax.tree.leaves(values), strict=True)
    }

    def of(path, x) -> Any:
        places = (known.get((path[start:], x.shape)) for start in range(len(path)))
        return next((value for value in places if value is not None), None)

    return of


def _microbatch(tree: Any, m: Array) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, m, keepdims=False), tree)


def make_old_policy(
    model: Model,
    head: Head,
    mesh: Mesh,
    teacher: Teacher | None = None,
    has_squares: bool = False,
    is_sampled: bool = False,
) -> Callable[..., OldPolicy]:
    """(params, ref_params, minibatch, teacher_params) -> OldPolicy, jitted.

    By micro-batches as the update does. What has no weights has no log-probabilities.

    has_squares: with ``old_square_BT``.
    is_sampled: the policy's log-probabilities are the sampler's, and nothing else is known of it.
    """
    look = forward_with_squares if has_squares else forward

    def old_policy(params, ref_params, minibatch: Minibatch, teacher_params=None) -> OldPolicy:
        logp_MBT, entropy_MBT, square_MBT = minibatch.rows.sampler_logp_BT, None, []
        if not is_sampled:
            logp_MBT, entropy_MBT, *square_MBT = scored(model, head, params, minibatch, look)
        ref_MBT = None if ref_params is None else scored(model, head, ref_params, minibatch)[0]
        teacher_MBT = None
        if teacher is not None and teacher_params is not None:
            teacher_MBT = scored(*teacher, teacher_params, minibatch)[0]
        return OldPolicy(logp_MBT, entropy_MBT, ref_MBT, teacher_MBT, *square_MBT)

    return jax.jit(old_policy, out_shardings=batch_sharding(mesh, leading=1))


def forward(model: Model, head: Head, params: Any, rows: Rows) -> tuple[Array, ...]:
    """Log-probability and entropy of every response token of the rows, [B, T] each; else 0."""
    hidden_BTD, _ = model.apply(params, rows.input_BT, rows.position_BT, rows.sequence_id_BT)
    asked = rows.target_BT, rows.is_response_BT
    return logp_and_entropy(head, model.unembedding(params), hidden_BTD, *asked)


def forward_with_squares(model: Model, head: Head, params: Any, rows: Rows) -> tuple[Array, ...]:
    """`forward`, and the sum of the squared probabilities of each position."""
    hidden_BTD, _ = model.apply(params, rows.input_BT, rows.position_BT, rows.sequence_id_BT)
    weight_VD = model.unembedding(params)
    found = logp_and_entropy(head, weight_VD, hidden_BTD, rows.target_BT, rows.is_response_BT)
    return *found, square_mass(head, weight_VD, hidden_BTD, rows.is_response_BT)


def scored(
    model: Model,
    head: Head,
    params: Any,
    minibatch: Minibatch,
    look: Callable[..., tuple[Array, ...]] = forward,
) -> tuple[Array, ...]:
    """What is seen of every response token, [M, B, T] each; 0 elsewhere."""

    def seen(m):
        return look(model, head, params, _microbatch(minibatch.rows, m))

    def of_microbatch(m, found):
        return jax.tree.map(
            lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, m, 0), found, seen(m)
        )

    most = len(minibatch.rows.target_BT)
    zeros = jax.tree.map(lambda x: jnp.zeros((most, *x.shape), x.dtype), _zeros(seen))
    return jax.lax.fori_loop(0, minibatch.count, of_microbatch, zeros)


def tokens_of(rows: Rows, old: OldPolicy, logp_BT: Array, entropy_BT: Array) -> Tokens:
    """What the rules see of rows: of the old policy, and of one that has these log-probs."""
    return Tokens(
        logp_BT=logp_BT,
        old_logp_BT=old.old_logp_BT,
        advantage_BT=rows.advantage_BT,
        is_response_BT=rows.is_response_BT,
        sequence_id_BT=rows.sequence_id_BT,
        position_BT=rows.response_position_BT,
        group_id_BT=rows.group_id_BT,
        entropy_BT=entropy_BT,
        old_entropy_BT=old.old_entropy_BT,
        old_square_BT=old.old_square_BT,
        sampler_logp_BT=rows.sampler_logp_BT,
        ref_logp_BT=old.ref_logp_BT,
        teacher_logp_BT=old.teacher_logp_BT,
    )


_OF_FIRST = ("sampler_gap_mean", "sampler_gap_max", "sampler_gap_outside", "old_entropy")


def _make_loss(model: Model, head: Head, goal: Goal, gate: Gate | None):
    """(params, rows, old, totals, objective state, stats) -> (summand of the loss, metrics).

    With a gate, what is measured of the old policy are the metrics `_OF_FIRST`.
    """

    def loss(params, rows: Rows, old: OldPolicy, totals: losses.Totals, objective_state, stats):
        logp_BT, entropy_BT = forward(model, head, params, rows)
        tokens = tokens_of(rows, old, logp_BT, entropy_BT)
        value, metrics = losses.policy_loss(
            goal.objective,
            dataclasses.replace(tokens, entropy_BT=jax.lax.stop_gradient(entropy_BT)),
            aggregate=goal.aggregate,
            totals=totals,
            state=objective_state,
            stats=stats,
        )
        if goal.entropy_bonus:
            value += losses.entropy_bonus(
                tokens, scale=goal.entropy_bonus, aggregate=goal.aggregate, totals=totals
            )[0]
        old_BT = entropy_BT if old.old_entropy_BT is None else old.old_entropy_BT
        entropies = {"entropy": entropy_BT, "old_entropy": old_BT}
        means = {name: losses.mean_over(x, rows.is_response_BT) for name, x in entropies.items()}
        return value, {**metrics, **means, **(gap_metrics(rows, logp_BT) if gate else {})}

    return loss


def _make_gather(model: Model, head: Head, prepare: Callable[[Tokens, Any], Any]):
    """(params, objective state, minibatch) -> what a coupled rule must know of the whole of it.

    A forward pass by micro-batches comes first; the rule then sees all rows at once.
    """

    def gather(params, objective_state, minibatch: Minibatch):
        new = scored(model, head, params, minibatch)
        if minibatch.old is None:
            raise ValueError("a minibatch without its old policy; expected Learner.with_old's")
        tokens = tokens_of(minibatch.rows, minibatch.old, *new)
        is_real_M11 = jnp.arange(len(new[0]))[:, None, None] < minibatch.count
        tokens = dataclasses.replace(tokens, is_response_BT=tokens.is_response_BT & is_real_M11)
        # Rows before micro-batches: the axis that the devices share stays the outer one, and
        # flattening moves nothing between them.
        flat = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, x.shape[-1]), tokens)
        return prepare(losses.response_only(flat), objective_state)

    return gather


def _zeros(of_microbatch: Callable[[Any], Any]) -> Any:
    """Zeros shaped as the function's result."""
    shapes = jax.eval_shape(of_microbatch, 0)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def make_train_step(
    model: Model,
    head: Head,
    goal: Goal,
    optimizer: optax.GradientTransformation,
    weights: Any = None,
    whole: Callable[[Any, Any], Any] = lambda params, frozen: params,
    gate: Gate | None = None,
) -> Callable[..., tuple[TrainState, dict]]:
    """The pure update; see `Learner.step`.

    A non-finite gradient, an empty mini-batch or a first one beyond the gate leaves the state
    unchanged.

    weights: shardings of the trained weights, which the summed gradients share; None: one device.
    whole: (trained, frozen weights) -> the network's params; see `aspo_jax.model.trained_part`.
    """
    objective = goal.objective
    loss = _make_loss(model, head, goal, gate)
    gather = _make_gather(model, head, objective.prepare) if objective.prepare else None

    def train_step(
        state: TrainState, minibatch: Minibatch, frozen: Any = None, is_first: Any = True
    ):
        totals = losses.count_totals(minibatch.rows)
        stats = None
        if gather:
            stats = gather(whole(state.params, frozen), state.objective_state, minibatch)

        def of_microbatch(m, grads_ref):
            rows, old = _microbatch((minibatch.rows, minibatch.old), m)

            def of(params):
                params = whole(params, frozen)
                return loss(params, rows, old, totals, state.objective_state, stats)

            value, pull_back, metrics = jax.vjp(of, state.params, has_aux=True)
            pull_back.with_refs(grads_ref)(jnp.ones_like(value))
            return metrics

        zeros = jax.tree.map(jnp.zeros_like, state.params)
        no_metrics = _zeros(lambda m: of_microbatch(m, jax.tree.map(jax.new_ref, zeros)))
        grads_ref = jax.tree.map(jax.new_ref, _constrain(zeros, weights))

        def add(m, metrics):
            return merge_metrics(metrics, of_microbatch(m, grads_ref))

        metrics = jax.lax.fori_loop(0, minibatch.count, add, empty_metrics(no_metrics))
        grads = jax.tree.map(jax.freeze, grads_ref)
        norm = optax.tree.norm(grads)
        is_empty, is_finite = totals.tokens == 0, jnp.isfinite(norm)
        one, is_applied = jnp.ones(()), is_finite & ~is_empty
        if gate:
            is_refused = is_first & _is_beyond(gate, metrics)
            is_applied &= ~is_refused
            metrics = _of_first(metrics, is_first) | {
                "skipped_gap": Mean(one * is_refused, one * is_first)
            }
        if isinstance(optimizer, Offloaded):
            state = dataclasses.replace(state, opt_state=_fetched(state.opt_state, norm))
        new_state = _chosen(is_applied, apply(state, grads, stats), state)
        report = metrics | {
            "grad_norm": Mean(jnp.where(is_applied, norm, 0.0), one * is_applied),
            "grad_norm_max": Max(jnp.where(is_applied, norm, 0.0)),
            "skipped_nonfinite": Mean(one * ~is_finite, one),
            "skipped_empty": Mean(one * is_empty, one),
        }
        return new_state, report

    def apply(state: TrainState, grads, stats) -> TrainState:
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        objective_state = objective.update(state.objective_state, stats)
        params = optax.apply_updates(state.params, updates)
        return TrainState(params, opt_state, objective_state, state.step + 1)

    return train_step


def _fetched(opt_state: Any, norm: Array) -> Any:
    """The optimizer's state on the devices, no sooner than there is the gradient's norm.

    By a loop of one turn, which XLA does not know to be one: what a barrier alone holds back it
    fetches at the beginning, beside all that is kept for the backward pass.
    """

    def fetch(_, blank: Any) -> Any:
        return jax.device_put(opt_state, jax.memory.Space.Device)

    blank = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), opt_state)
    return jax.lax.fori_loop(0, _is_there(norm).astype(jnp.int32), fetch, blank)


def _is_beyond(gate: Gate, metrics: Metrics) -> Array:
    """Whether the sampler's log-probabilities are too far off; False where they are NaN."""
    mean, largest = cast(Mean, metrics["sampler_gap_mean"]), cast(Max, metrics["sampler_gap_max"])
    return (mean.total > gate.mean * mean.count) | (largest.value > gate.largest)


def _of_first(metrics: Metrics, is_first: Any) -> dict[str, Metric]:
    """The metrics, of which those of the old policy count nothing but in a first update."""
    measured = {name: metrics[name] for name in _OF_FIRST}
    choose = functools.partial(jnp.where, is_first)
    return {**metrics, **jax.tree.map(choose, measured, empty_metrics(measured))}


def _chosen(is_applied: Array, new: TrainState, old: TrainState) -> TrainState:
    """The new state or the old one, in place.

    A choice per element is fused into the optimizer; `cond` would copy the state. A moment waits
    for its parameter, which reads it: where XLA is not told of an order, it copies the moment
    first. Were it to wait for all parameters, the new moments of all would be there at once.
    """

    def choose(is_new: Array, new: Any, old: Any) -> Any:
        return jax.tree.map(lambda x, y: jnp.where(is_new, x, y), new, old)

    params = choose(is_applied, new.params, old.params)
    parameter_of = _of_parameters(params, params)

    def after(path, new: Array, old: Array) -> Array:
        parameter = parameter_of(path, new)
        is_new = is_applied if parameter is None else is_applied & _is_there(parameter)
        return jnp.where(is_new, new, old)

    rest = jax.tree_util.tree_map_with_path(
        after,
        (new.opt_state, new.objective_state, new.step),
        (old.opt_state, old.objective_state, old.step),
    )
    return TrainState(params, *rest)


def _is_there(x: Array) -> Array:
    """True, but not known to be before the array is: a bit that is always set beside its own."""
    first = x.ravel()[0].astype(jnp.float32)
    return jax.lax.bitcast_convert_type(first, jnp.int32) | 1 != 0


def _constrain(tree: Any, shardings: Any) -> Any:
    return tree if shardings is None else jax.lax.with_sharding_constraint(tree, shardings)
