"""The rules table: every array has a place on the mesh, and a clash is an error."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from toy import CONFIG, VOCAB, on, random_params, toy_mesh, toy_model

from aspo_jax.model import (
    RULES,
    batch_sharding,
    build_model,
    parameter_axes,
    partition_spec,
)
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


@pytest.mark.parametrize("is_stacked", [True, False])
@pytest.mark.parametrize("change", [{"tie_embeddings": False}, {"qk_norm": True}], ids=str)
def test_axes_tell_matrices_biases_and_scales_apart(change, is_stacked):
    config = dataclasses.replace(CONFIG, **change)
    model = build_model(config, is_stacked=is_stacked)
    params = jax.eval_shape(model.init, jax.random.key(0))
    axes = parameter_axes(config, is_stacked)
    assert model.axes() == axes
    sizes = {"vocab": VOCAB, "embed": 16, "heads": 4, "kv_heads": 2, "head_dim": 4, "mlp": 24}

    def check(path, x, names):
        kind = path[-1].key
        is_layered = is_stacked and path[0].key == "layers"
        assert names.count("layers") == is_layered and (names[0] == "layers") == is_layered
        assert ("embed" in names) == (kind in ("kernel", "embed", "head")), path
        assert ("norm" in names) == (kind in ("scale", "norm")), path
        if "norm" not in names:
            assert x.shape == tuple((sizes | {"layers": 2})[name] for name in names), path

    jax.tree_util.tree_map_with_path(check, params, axes)
    layer = axes["layers"] if is_stacked else axes["layers"][1]
    assert layer["o"]["kernel"][-3:] == ("heads", "head_dim", "embed")
    assert ("head" in axes) == (not config.tie_embeddings)


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
