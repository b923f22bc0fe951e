"""Bytes and FLOP of compiled programs: small ones of this CPU, and lines of other compilers."""

from __future__ import annotations

import textwrap

import jax
import jax.numpy as jnp
import pytest

from aspo_jax.planning.hlo import Item, Module, flat, parse, steps

F32 = 4


def _module(function, *shapes: tuple[int, ...]) -> Module:
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return _compiled(jax.jit(function).lower(*arguments))


def _compiled(lowered: jax.stages.Lowered) -> Module:
    return parse(lowered.compile().as_text() or "")


def items(*arguments, **more) -> list[Item]:
    """All that `steps` finds, inner ones too."""
    return list(flat(steps(*arguments, **more)))


def _flops(found: list[Item]) -> float:
    return sum(item.times * item.flops for item in found)


def _bytes(found: list[Item]) -> float:
    return sum(item.bytes for item in found)


def test_a_product_moves_its_operands_and_result():
    found = items(_module(jnp.dot, (32, 48), (48, 64)))
    assert _flops(found) == 2 * 32 * 48 * 64
    assert _bytes(found) == F32 * (32 * 48 + 48 * 64 + 32 * 64)


def test_a_scan_counts_as_often_as_it_runs():
    def layers(x, weights):
        return jax.lax.scan(lambda x, weight: (x @ weight, None), x, weights)[0]

    found = items(_module(layers, (32, 48), (7, 48, 48)))
    assert _flops(found) == 7 * 2 * 32 * 48 * 48
    # Each layer is read once, or read, written and read again where it is sliced out first; the
    # seven layers are never read as a whole.
    weights, activations = F32 * 7 * 48 * 48, F32 * 7 * 2 * 32 * 48
    assert weights + activations <= _bytes(found) <= 3.2 * (weights + activations)


def test_a_loop_in_a_loop_multiplies():
    def outer(x, weight):
        def inner(x, _):
            return jax.lax.scan(lambda x, _: (x @ weight, None), x, length=3)[0], None

        return jax.lax.scan(inner, x, length=5)[0]

    found = items(_module(outer, (32, 48), (48, 48)))
    assert _flops(found) == 15 * 2 * 32 * 48 * 48


def test_a_fusion_moves_what_crosses_its_boundary_once():
    found = items(_module(lambda x: jnp.tanh(x) * 2 + jnp.exp(x) - x, (128, 128)))
    assert _bytes(found) == F32 * 2 * 128 * 128 and len(found) == 1


def test_what_a_loop_carries_is_not_a_copy():
    """A pool of a million numbers, of which each of 8 trips writes 64."""

    def write(pool, row):
        def step(i, pool):
            return jax.lax.dynamic_update_slice(pool, row + i, (i, 0))

        return jax.lax.fori_loop(0, 8, step, pool)

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((16384, 64), (1, 64))]
    found = items(_compiled(jax.jit(write, donate_argnums=0).lower(*shapes)))
    assert 8 * F32 * 64 <= _bytes(found) < F32 * 16384


def test_loops_whose_trips_only_a_run_knows():
    def step(x, weight, count):
        return jax.lax.fori_loop(0, count, lambda _, x: x @ weight, x)

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((32, 48), (48, 48))]
    count = jax.ShapeDtypeStruct((), jnp.int32)
    module = _compiled(jax.jit(step).lower(*shapes, count))
    once = 2 * 32 * 48 * 48
    assert _flops(items(module)) == once
    assert _flops(items(module, (9.0,))) == 9 * once


def test_of_a_conditional_the_costlier_branch():
    def either(is_wide, x, weight):
        return jax.lax.cond(is_wide, lambda: x @ weight @ weight, lambda: x)

    is_wide = jax.ShapeDtypeStruct((), jnp.bool_)
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((32, 48), (48, 48))]
    module = _compiled(jax.jit(either).lower(is_wide, *shapes))
    assert _flops(items(module)) == 2 * 2 * 32 * 48 * 48


# --- what only other compilers write ----------------------------------------------------------


def _written(body: str) -> Module:
    return parse(f"HloModule m\n\n{textwrap.dedent(body)}")


PRODUCT = """\
ENTRY %main (a: LEFT, w: RIGHT) -> OUT {
  %a = LEFT parameter(0)
  %w = RIGHT parameter(1)
  ROOT %c = OUT convolution(%a, %w), window={WINDOW}, dim_labels=LABELS
}
"""


def _product(left: str, right: str, out: str, window: str, labels: str) -> list[Item]:
    words = {"LEFT": left, "RIGHT": right, "OUT": out, "WINDOW": window, "LABELS": labels}
    text = PRODUCT
    for name, value in words.items():
        text = text.replace(name, value)
    return items(_written(text))


def test_products_of_a_tpu_are_convolutions():
    """To heads of their own; the result lies in the chip's fast memory."""
    found = _product(
        "bf16[128,1536,1]{1,0,2:T(8,128)(2,1)}",
        "bf16[1536,12,128]{2,0,1:T(8,128)(2,1)}",
        "bf16[128,12,128]{0,2,1:T(8,128)(2,1)S(1)}",
        "size=12 pad=11_11 rhs_reversal=1",
        "bf0_i0o->b0f",
    )
    assert _flops(found) == 2 * 128 * 1536 * 12 * 128
    assert _bytes(found) == 2 * (128 * 1536 + 1536 * 12 * 128)


def test_a_batch_of_products_of_a_tpu():
    """Its batch axes are windows of which one place of each meets no padding."""
    found = _product(
        *("bf16[2,32,6,128]{3,2,1,0}", "bf16[2,32,512,128]{3,2,1,0}", "f32[2,32,6,512]{3,2,1,0}"),
        *("size=2x32 stride=1x31 lhs_dilate=2x32", "01bf_01oi->01bf"),
    )
    assert _flops(found) == 2 * 2 * 32 * 6 * 128 * 512


SCAN = """\
%body (t: (s32[], f32[4,64])) -> (s32[], f32[4,64]) {
  %t = (s32[]{:T(128)}, f32[4,64]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = f32[4,64]{1,0} get-tuple-element(%t), index=1
  %one = s32[] constant(1)
  %more = s32[] constant(MORE)
  %once = s32[]{:T(128)S(6)} add(%i, %one)
  %next = s32[]{:T(128)S(6)} add(%once, %more)
  %y = f32[4,64]{1,0} negate(%x)
  ROOT %out = (s32[], f32[4,64]{1,0}) tuple(%next, %y)
}

%condition (u: (s32[], f32[4,64])) -> pred[] {
  %u = (s32[], f32[4,64]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%u), index=0
  %n = s32[] constant(28)
  ROOT %less = pred[] compare(%j, %n), direction=LT
}

ENTRY %main (x: f32[4,64]) -> f32[4,64] {
  %x.1 = f32[4,64]{1,0} parameter(0)
  %start = s32[] constant(START)
  %again = s32[] copy(%start)
  %carry = (s32[], f32[4,64]{1,0}) tuple(%again, %x.1)
  %loop = (s32[], f32[4,64]{1,0}) while(%carry), condition=%condition, body=%body
  ROOT %r = f32[4,64]{1,0} get-tuple-element(%loop), index=1
}
"""


@pytest.mark.parametrize("start, more, trips", [(0, 0, 28), (3, 0, 25), (3, 1, 13)])
def test_trips_follow_from_the_condition_and_the_step(start, more, trips):
    """A loop that is unrolled in part counts in larger steps."""
    found = items(_written(SCAN.replace("START", str(start)).replace("MORE", str(more))))
    times = {item.instruction.name: item.times for item in found}
    assert times["y"] == trips


def test_a_start_moves_and_a_done_does_not():
    found = items(
        _written("""\
        ENTRY %main (x: f32[1024]) -> f32[1024] {
          %x = f32[1024]{0} parameter(0)
          %start = (f32[1024]{0:S(1)}, f32[1024]{0}, u32[]{:S(2)}) copy-start(%x)
          ROOT %done = f32[1024]{0:S(1)} copy-done(%start)
        }
        """)
    )
    assert _bytes(found) == F32 * 1024


FUSED = """\
%inside (p: f32[28,64,64], i: s32[], a: f32[4,64]) -> f32[4,64] {
  %p = f32[28,64,64]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = f32[1,64,64]{2,1,0} dynamic-slice(%p, %i, %zero, %zero), dynamic_slice_sizes={1,64,64}
  %w = f32[64,64]{1,0} bitcast(%slice)
  %a = f32[4,64]{1,0} parameter(2)
  ROOT %d = f32[4,64]{1,0} dot(%a, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (q: f32[28,64,64], j: s32[], b: f32[4,64]) -> f32[4,64] {
  %q = f32[28,64,64]{2,1,0} parameter(0)
  %j = s32[] parameter(1)
  %b = f32[4,64]{1,0} parameter(2)
  ROOT %f = f32[4,64]{1,0} fusion(%q, %j, %b), kind=kOutput, calls=%inside
}
"""


def test_a_fusion_that_slices_reads_the_slice():
    (found,) = items(_written(FUSED))
    assert found.read == F32 * (64 * 64 + 1 + 4 * 64) and found.written == F32 * 4 * 64
    assert found.flops == 2 * 4 * 64 * 64


KERNEL = """\
ENTRY %main (x: f32[8,128]) -> f32[8,128] {
  %x = f32[8,128]{1,0} parameter(0)
  ROOT %kernel.1 = f32[8,128]{1,0} custom-call(%x), custom_call_target="tpu_custom_call"OPTIONS
}
"""


def test_a_kernel_does_what_it_declares_or_what_is_said_of_it():
    bare = _written(KERNEL.replace("OPTIONS", ""))
    (found,) = items(bare)
    assert (found.flops, found.bytes) == (0, F32 * 2 * 8 * 128)
    (found,) = items(bare, kernel=lambda each, arrays: (5.0, arrays[0].bytes))
    assert (found.flops, found.bytes) == (5, F32 * 8 * 128)
    cost = '"cost_estimate":{"flops":"77","transcendentals":"0","bytes_accessed":"66"}'
    options = ', backend_config={"custom_call_config":{' + cost + "}}"
    (found,) = items(_written(KERNEL.replace("OPTIONS", options)))
    assert (found.flops, found.bytes) == (77, 66)
