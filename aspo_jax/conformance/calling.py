"""Anyone's ``f(logp, old_logp, advantage, mask) -> loss`` as one function of NumPy arrays."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import itertools
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from aspo_jax.errors import UserError
from aspo_jax.imports import NotFound, load_callable, raised_at

Framework = Literal["jax", "torch"]
EXPECTED = "f(logp, old_logp, advantage, mask) -> loss, a scalar or [B, T] values"
REMEDY = "wrap it in a function that has this signature and name the wrapper with --adapter"


class Batch(NamedTuple):
    """Tokens to ask a loss about; NumPy, float64 but for the mask.

    advantage_BT: per token, masked ones included, as a trainer broadcasts them.
    """

    logp_BT: NDArray
    old_logp_BT: NDArray
    advantage_BT: NDArray
    is_response_BT: NDArray
    entropy_BT: NDArray


EXAMPLE = Batch(  # two sequences of 3 and 1 tokens, with a hole and padding, on the old policy
    logp_BT=np.full((2, 5), -2.0),
    old_logp_BT=np.full((2, 5), -2.0),
    advantage_BT=np.ones((2, 5)),
    is_response_BT=np.array([[1, 0, 1, 1, 0], [1, 0, 0, 0, 0]], bool),
    entropy_BT=np.ones((2, 5)),
)


class Loss(NamedTuple):
    """A loss that can be asked.

    coefficient: the batch -> ``-dL/dlogp``, [B, T]; zeros where nothing depends on logp.
    is_mean_ours: it gives values per token, so that the masked mean over them is not its own.
    takes_entropy: whether it is given ``entropy``.
    how: what was found out about calling it, for the report.
    """

    coefficient: Callable[[Batch], NDArray]
    framework: Framework
    is_mean_ours: bool
    takes_entropy: bool
    how: str


def open_loss(name: str, *, adapter: str | None = None, framework: Framework | None = None) -> Loss:
    """The loss behind ``package.module:function``, called once to see how.

    adapter: ``module:function``, is given what is named and returns a loss. Without one a function
    that has no required arguments is a factory: what it returns is asked.

    Raises:
        UserError: there is none, or it cannot be called; the message says what was found.
    """
    function = _load(name, "the loss")
    if adapter:
        function = _made(adapter, functools.partial(_load(adapter, "--adapter"), function))
    elif _has_no_required(function):
        function = _made(name, function)
    return as_loss(name, function, framework)


def as_loss(name: str, function: Any, framework: Framework | None = None) -> Loss:
    """A loss of a function, or of an `Objective` of this package; name: for messages.

    Raises:
        UserError: it cannot be called as a loss.
    """
    if _is_objective(function):
        return _objective_loss(name, function)
    takes_entropy = _checked_signature(name, function)
    frameworks: list[Framework] = [framework] if framework else _frameworks(function)
    errors: dict[str, Exception] = {}
    for asked in frameworks:
        tried = _try(name, function, asked, takes_entropy)
        if isinstance(tried, Loss):
            return tried
        errors[asked] = tried
    raised = "; ".join(f"{raised_at(e)} on {asked} arrays [2, 5]" for asked, e in errors.items())
    which = "; --framework says which arrays it takes" if len(errors) > 1 else ""
    raise UserError(f"{name} raised {raised}; expected {EXPECTED}; {REMEDY}{which}")


def _load(name: str, what: str) -> Callable[..., Any]:
    try:
        return load_callable(name)
    except NotFound as problem:
        raise UserError(f"{what} {name!r}: {problem}") from problem


def _made(name: str, factory: Callable[[], Any]) -> Any:
    """What a factory or an adapter makes, which must be an `Objective` or can be called."""
    try:
        made = factory()
    except Exception as error:
        raise UserError(f"{name} raised {raised_at(error)}; expected a loss of it") from error
    if not (callable(made) or _is_objective(made)):
        raise UserError(f"{name} returned {made!r:.80}; expected an Objective, or {EXPECTED}")
    return made


def _is_objective(made: Any) -> bool:
    """Whether it is an `Objective`, without importing JAX for what is none."""
    return type(made).__module__ == "aspo_jax.losses.objective"


def _has_no_required(function: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    return all(p.default is not p.empty or p.kind is p.VAR_KEYWORD for p in parameters)


def _checked_signature(name: str, function: Callable[..., Any]) -> bool:
    """Whether it takes ``entropy``; UserError if it cannot take four arrays in our order."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return False
    takes_entropy = "entropy" in signature.parameters
    given = {"entropy": None} if takes_entropy else {}
    try:
        bound = signature.bind(1, 2, 3, 4, **given)
    except TypeError as error:
        raise UserError(
            f"{name}{signature} cannot be called with four arrays ({error}); "
            f"expected {EXPECTED}; {REMEDY}"
        ) from error
    first, second, *_ = [*bound.arguments, "", ""]
    if "old" in first.lower() and "old" not in second.lower():
        raise UserError(
            f"{name} takes {first!r} before {second!r}; expected the current log-probabilities "
            f"first; {REMEDY}"
        )
    return takes_entropy


# --- which framework --------------------------------------------------------------------------


def _frameworks(function: Any) -> list[Framework]:
    """What the function is written with: one framework, or both where it cannot be told.

    Torch is not imported to find out: what is not loaded is not what a loaded function uses.
    """
    for values in _surroundings(function):
        found = {_root(value) for value in values} & {"jax", "torch"}
        if len(found) == 1:
            return ["torch" if "torch" in found else "jax"]
    return ["jax", "torch"] if "torch" in sys.modules else ["jax"]


def _surroundings(function: Any) -> Iterator[list[Any]]:
    """What a function sees, nearest first: what it uses, its module, functions it closes over."""
    while isinstance(function, functools.partial):
        function = function.func
    function = inspect.unwrap(function)
    if not inspect.isfunction(function):
        function = getattr(function, "__func__", vars(type(function)).get("__call__"))
    if not inspect.isfunction(function):
        return
    used, scope = set(_names(function.__code__)), function.__globals__
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    yield [*cells, *(value for name, value in scope.items() if name in used)]
    yield [*scope.values()]
    for cell in cells:
        if callable(cell):
            yield from _surroundings(cell)


def _names(code: types.CodeType) -> Iterator[str]:
    """Global names that a function uses, its inner functions included."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _root(value: Any) -> str:
    """The package that a module, class or function is of."""
    name = getattr(value, "__name__" if isinstance(value, types.ModuleType) else "__module__", "")
    return name.partition(".")[0] if isinstance(name, str) else ""


# --- calling it -------------------------------------------------------------------------------


def _try(
    name: str, function: Callable[..., Any], framework: Framework, entropy: bool
) -> Loss | Exception:
    """The loss, if it takes `EXAMPLE` with a mask of numbers or of booleans; else its error.

    JAX functions are compiled; one that looks at values, with a Python ``if``, is run as it is.
    """
    gradients = {"jax": _jax_gradient, "torch": _torch_gradient}[framework]
    errors: list[Exception] = []
    for mask, compiled in itertools.product(("float64", "bool"), (True, False)):
        if framework == "torch" and compiled:
            continue
        is_ours: list[bool] = []
        gradient = gradients(_scalar(name, function, entropy, is_ours), mask, compiled)
        try:
            gradient(EXAMPLE)
        except UserError:
            raise
        except Exception as error:
            errors.append(error)
            continue
        how = f"{framework}, float64, mask of type {mask}"
        how += f" ({raised_at(errors[0])} with float64)" if mask == "bool" else ""
        return Loss(gradient, framework, is_ours[0], entropy, how)
    return errors[0]


def _scalar(
    name: str, function: Callable[..., Any], entropy: bool, is_ours: list[bool]
) -> Callable[..., Any]:
    """The loss as a scalar; says in ``is_ours`` whether the mean had to be taken here."""

    def scalar(logp, old_logp, advantage, mask, entropy_BT):
        extra = {"entropy": entropy_BT} if entropy else {}
        result = function(logp, old_logp, advantage, mask, **extra)
        loss: Any = result[0] if isinstance(result, tuple | list) and result else result
        if not hasattr(loss, "shape"):
            raise UserError(
                f"{name} returned {loss!r:.80}, which has no gradient; "
                "expected the array or tensor of the loss, alone or first of a tuple"
            )
        shape, tokens = tuple(loss.shape), tuple(logp.shape)
        if shape not in ((), tokens):
            raise UserError(
                f"{name} returned shape {shape} for arrays {tokens}; expected a scalar or values "
                f"per token; the advantage it is given is per token, too; {REMEDY}"
            )
        is_ours.append(shape == tokens)
        return (loss * mask).sum() / mask.sum() if shape == tokens else loss

    return scalar


def _jax_gradient(
    scalar: Callable[..., Any], mask: str, is_compiled: bool
) -> Callable[[Batch], NDArray]:
    """Minus the gradient in float64 on the CPU, whatever the settings of the process."""
    import jax
    import jax.numpy as jnp

    gradient = jax.grad(scalar)
    gradient = jax.jit(gradient) if is_compiled else gradient

    def coefficient(batch: Batch) -> NDArray:
        with _float64_on_cpu(jax):
            arrays = [x.astype(dtype) for x, dtype in _typed(batch, mask)]
            return -np.asarray(gradient(*(arrays if is_compiled else map(jnp.asarray, arrays))))

    return coefficient


@contextlib.contextmanager
def _float64_on_cpu(jax: Any) -> Iterator[None]:
    try:
        cpu = jax.devices("cpu")[0]
    except RuntimeError as error:
        raise UserError(
            f"JAX has no CPU here ({error}); leave JAX_PLATFORMS out, or put cpu in it"
        ) from error
    with jax.enable_x64(True), jax.default_device(cpu):
        yield


def _torch_gradient(
    scalar: Callable[..., Any], mask: str, is_compiled: bool
) -> Callable[[Batch], NDArray]:
    """Minus the gradient in float64, by autograd."""
    try:
        torch: Any = importlib.import_module("torch")
    except ImportError as error:
        raise UserError(f"--framework torch needs torch ({error}): pip install torch") from error

    def coefficient(batch: Batch) -> NDArray:
        arrays = [torch.tensor(x, dtype=getattr(torch, t)) for x, t in _typed(batch, mask)]
        logp = arrays[0].requires_grad_()
        loss = scalar(*arrays)
        if loss.requires_grad:
            loss.backward()
        return np.zeros(logp.shape) if logp.grad is None else -logp.grad.numpy()

    return coefficient


def _typed(batch: Batch, mask: str) -> Iterator[tuple[NDArray, str]]:
    for field, x in zip(batch._fields, batch, strict=True):
        yield x, mask if field == "is_response_BT" else "float64"


# --- one of our own objectives ----------------------------------------------------------------


def _objective_loss(name: str, objective: Any) -> Loss:
    """An `Objective`: how tokens are averaged is not its own. Its other fields are the old's."""
    import jax.numpy as jnp

    from aspo_jax.losses import Tokens, policy_loss, reads, token_mean

    def scalar(logp, old_logp, advantage, mask, entropy):
        tokens = Tokens(
            logp,
            old_logp,
            advantage,
            mask,
            position_BT=jnp.cumsum(mask, -1) - 1,
            group_id_BT=jnp.zeros(mask.shape, "int32"),
            entropy_BT=entropy,
            old_entropy_BT=entropy,
            sampler_logp_BT=old_logp,
            ref_logp_BT=old_logp,
            teacher_logp_BT=old_logp,
        )
        return policy_loss(objective, tokens, aggregate=token_mean)[0]

    coefficient = _jax_gradient(scalar, "bool", True)
    try:
        coefficient(EXAMPLE)
    except ValueError as error:
        raise UserError(f"the Objective of {name} raised {raised_at(error)}") from error
    return Loss(
        coefficient,
        "jax",
        is_mean_ours=True,
        takes_entropy=reads(objective, "entropy_BT"),
        how="an Objective of this package; reference, teacher and sampler are the old policy",
    )
