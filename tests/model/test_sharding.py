"""The rules table: every array has a place on the mesh, and a clash is an error."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from toy import on, random_params, toy_mesh, toy_model

from aspo_jax.model import RULES, batch_sharding, partition_spec
from aspo_jax.model.sharding import MESH_AXES


def is_spec(x):
    return isinstance(x, PartitionSpec)


@pytest.mark.parametrize("tie", [True, False])
def test_specs_are_shaped_as_the_params(tie):
    model = toy_model(tie_embeddings=tie)
    params = jax.eval_shape(model.init, jax.random.key(0))
    specs = model.partition_specs()
    assert jax.tree.structure(specs, is_leaf=is_spec) == jax.tree.structure(params)
    leaves = jax.tree.leaves(specs, is_leaf=is_spec), jax.tree.leaves(params)
    for spec, leaf in zip(*leaves, strict=True):
        assert len(spec) == leaf.ndim


def test_every_rule_lands_on_the_mesh():
    for rule in RULES.values():
        names = (rule,) if isinstance(rule, str) else rule or ()
        assert set(names) <= set(MESH_AXES)


def test_translation():
    assert partition_spec(("layers", "embed", "heads", "head_dim")) == PartitionSpec(
        None, "fsdp", "tensor", None
    )
    assert partition_spec(("batch", None)) == PartitionSpec(("data", "fsdp"), None)


@pytest.mark.parametrize(
    "axes, clash",
    [(("heads", "mlp"), "'heads' and 'mlp'"), (("batch", "embed"), "'batch' and 'embed'")],
)
def test_two_logical_axes_on_one_mesh_axis(axes, clash):
    with pytest.raises(ValueError, match=f"logical axes {clash} of .* both land on mesh axis"):
        partition_spec(axes)


def test_unknown_logical_axis():
    with pytest.raises(ValueError, match="logical axis 'width' is not in the rules table"):
        partition_spec(("embed", "width"))


def test_weights_and_rows_are_split_over_the_devices_and_mean_the_same():
    model = toy_model()
    params = random_params(model)
    token = np.random.RandomState(0).randint(24, size=(4, 8))
    args = (token, np.tile(np.arange(8), (4, 1)), np.ones((4, 8), np.int32))
    mesh = toy_mesh(fsdp=2, tensor=2)
    placed = on(mesh, model, params)

    def part(x):
        return x.addressable_shards[0].data.size / x.size

    assert part(placed["embed"]) == part(placed["layers"]["up"]["kernel"]) == 1 / 4
    assert part(placed["layers"]["k"]["bias"]) == 1 / 2
    assert part(placed["norm"]) == 1
    rows = batch_sharding(mesh)
    assert part(jax.device_put(args[0], rows)) == 1 / 2
    assert batch_sharding(mesh, leading=2).spec == PartitionSpec(None, None, ("data", "fsdp"))

    apply = jax.jit(lambda *xs: model.apply(*xs)[0])
    sharded = apply(placed, *(jax.device_put(x, rows) for x in args))
    np.testing.assert_allclose(sharded, apply(params, *args), atol=1e-5)
