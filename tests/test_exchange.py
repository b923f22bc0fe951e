"""What chips exchange in a scheduled module, and what of it arithmetic hides."""

from __future__ import annotations

import math
import textwrap

import pytest

from aspo_jax.planning.exchange import Exchange, exchanges, hidden_share
from aspo_jax.planning.hlo import parse, steps
from aspo_jax.planning.topology import parse_topology

H100, V5E = parse_topology("h100:8"), parse_topology("v5e:4x4")
BF16, F32 = 2, 4
# Arithmetic of a product [N, 1024] x [1024, 1024], and an exchange of as much on H100.
FLOP = 2 * 1024 * 1024


def _read(body: str, topology=H100) -> list[Exchange]:
    module = parse(f"HloModule m, is_scheduled=true\n\n{textwrap.dedent(body)}")
    return exchanges(module, steps(module), topology)


GATHER = """\
ENTRY %main (w: bf16[128,8192], a: bf16[ROWS,1024], b: bf16[1024,1024]) -> bf16[1024,8192] {
  %w = bf16[128,8192] parameter(0)
  %a = bf16[ROWS,1024] parameter(1)
  %b = bf16[1024,1024] parameter(2)
  %begin = (bf16[128,8192], bf16[1024,8192]) all-gather-start(%w), replica_groups=GROUPS
  BETWEEN
  ROOT %end = bf16[1024,8192] all-gather-done(%begin)
}
"""
DOT = "%d = bf16[ROWS,1024] dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}"


def _gather(between: str = DOT, rows: int = 1024, groups: str = "[1,8]<=[8]") -> Exchange:
    text = GATHER.replace("BETWEEN", between).replace("GROUPS", groups)
    (found,) = _read(text.replace("ROWS", str(rows)))
    return found


def test_a_gather_takes_the_shares_of_the_others():
    found = _gather()
    assert (found.kind, found.element, found.is_begun_early) == ("all-gather", "bf16", True)
    assert found.bytes == 7 * 128 * 8192 * BF16
    assert found.seconds == found.bytes / H100.chip.links


def test_arithmetic_between_begin_and_end_hides_its_time_and_no_more():
    few, none = _gather(rows=1024), _gather(between="")
    of_rows = 1024 * FLOP / H100.chip.flops
    assert none.exposed == none.seconds
    assert few.exposed == pytest.approx(few.seconds - of_rows) and few.exposed > 0
    assert hidden_share([few]) == pytest.approx(of_rows / few.seconds)
    many = _gather(rows=2**17)
    assert many.exposed == 0 and hidden_share([many]) == 1


@pytest.mark.parametrize(
    "groups, others",
    [
        ("[1,8]<=[8]", 7),
        ("[2,4]<=[8]", 3),
        ("{{0,1},{2,3},{4,5},{6,7}}", 1),
        ("mesh['data'=2,'fsdp'=4] {'fsdp'}", 3),
        ("mesh['data'=2,'fsdp'=4] {'data','fsdp'}", 7),
        ("{}", 7),
    ],
)
def test_how_many_exchange_among_themselves(groups, others):
    assert _gather(groups=groups).bytes == others * 128 * 8192 * BF16


def test_an_exchange_that_is_not_begun_early_is_waited_for():
    kinds = {"all-reduce": 2 * 7 / 8, "reduce-scatter": 7 / 8, "all-to-all": 7 / 8}
    for kind, taken in kinds.items():
        (found,) = _read(f"""\
        ENTRY %main (x: f32[1024]) -> f32[1024] {{
          %x = f32[1024] parameter(0)
          ROOT %r = f32[1024] {kind}(%x), replica_groups=[1,8]<=[8], to_apply=%add
        }}
        """)
        assert found.bytes == taken * 1024 * F32 and not found.is_begun_early
        assert found.exposed == found.seconds and hidden_share([found]) == 0


def test_two_exchanges_follow_each_other_on_the_links():
    """The second waits for the first, so that the same arithmetic does not hide both."""
    first, second = _read("""\
    ENTRY %main (w: bf16[128,8192]) -> bf16[1024,8192] {
      %w = bf16[128,8192] parameter(0)
      %b1 = (bf16[128,8192], bf16[1024,8192]) all-gather-start(%w), replica_groups={}
      %b2 = (bf16[128,8192], bf16[1024,8192]) all-gather-start(%w), replica_groups={}
      %e1 = bf16[1024,8192] all-gather-done(%b1)
      ROOT %e2 = bf16[1024,8192] all-gather-done(%b2)
    }
    """)
    assert first.exposed == pytest.approx(first.seconds)
    assert second.exposed == pytest.approx(second.seconds)


ASYNC = """\
%rs (p: f32[1024]) -> f32[128] {
  %p = f32[1024] parameter(0)
  ROOT %r = f32[128] reduce-scatter(%p), replica_groups=[1,8]<=[8], dimensions={0}, to_apply=%add
}

ENTRY %main (x: f32[1024]) -> f32[128] {
  %x = f32[1024] parameter(0)
  %begin = ((f32[1024]), f32[128], u32[]) async-start(%x), calls=%rs
  %more = ((f32[1024]), f32[128], u32[]) async-update(%begin), calls=%rs
  ROOT %end = f32[128] async-done(%more), calls=%rs
}
"""


def test_an_exchange_in_a_computation_of_its_own():
    (found,) = _read(ASYNC)
    assert (found.kind, found.bytes) == ("reduce-scatter", 7 / 8 * 1024 * F32)
    assert found.is_begun_early and found.exposed == found.seconds


RING = """\
%body (t: (s32[], bf16[1024,1024], bf16[1024,1024])) -> (s32[], bf16[1024,1024], bf16[1024,1024]) {
  %t = (s32[], bf16[1024,1024], bf16[1024,1024]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = bf16[1024,1024] get-tuple-element(%t), index=1
  %w = bf16[1024,1024] get-tuple-element(%t), index=2
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %begin = (bf16[1024,1024], bf16[1024,1024], u32[], u32[]) collective-permute-start(%w)
  %y = bf16[1024,1024] dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %end = bf16[1024,1024] collective-permute-done(%begin)
  ROOT %out = (s32[], bf16[1024,1024], bf16[1024,1024]) tuple(%next, %y, %end)
}

%condition (u: (s32[], bf16[1024,1024], bf16[1024,1024])) -> pred[] {
  %u = (s32[], bf16[1024,1024], bf16[1024,1024]) parameter(0)
  %j = s32[] get-tuple-element(%u), index=0
  %n = s32[] constant(15)
  ROOT %less = pred[] compare(%j, %n), direction=LT
}

ENTRY %main (v: f32[2048,1024], z: bf16[1024,1024]) -> f32[2048,1024] {
  %v = f32[2048,1024] parameter(0)
  %z = bf16[1024,1024] parameter(1)
  %begin.1 = f32[2048,1024] all-reduce-start(%v), replica_groups={}
  %zero = s32[] constant(0)
  %carry = (s32[], bf16[1024,1024], bf16[1024,1024]) tuple(%zero, %z, %z)
  %loop = (s32[], bf16[], bf16[]) while(%carry), condition=%condition, body=%body
  ROOT %end.1 = f32[2048,1024] all-reduce-done(%begin.1)
}
"""


def test_a_ring_counts_as_often_as_it_turns_and_its_time_hides_what_is_around_it():
    """A neighbour of a torus is behind one of four links; the loop's turns all pass."""
    ring, around = _read(RING, V5E)
    size, product = 1024 * 1024 * BF16, 1024 * FLOP / V5E.chip.flops
    assert (ring.times, ring.bytes) == (15, size)
    assert ring.seconds == size / (V5E.chip.links / 4)
    assert ring.exposed == pytest.approx(ring.seconds - product)
    assert around.seconds == pytest.approx(2 * 15 / 16 * 2 * size * 2 / V5E.chip.links)
    assert around.exposed == pytest.approx(max(around.seconds - 15 * ring.seconds, 0))


FUSIONS = """\
%starting (p: bf16[96,1024]) -> (bf16[96,1024], bf16[1536,1024], u32[]) {
  %p = bf16[96,1024] parameter(0)
  %g = bf16[1536,1024] all-gather(%p), channel_id=7, replica_groups={}, dimensions={0}
  ROOT %s = (bf16[], bf16[1536,1024]) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.1 (q: bf16[96,1024], a: bf16[ROWS,1024], b: bf16[1024,1024]) -> bf16[] {
  %q = bf16[96,1024] parameter(0)
  %a = bf16[ROWS,1024] parameter(1)
  %b = bf16[1024,1024] parameter(2)
  %h = bf16[1536,1024] all-gather(%q), channel_id=7, replica_groups={}, dimensions={0}
  ROOT %d = bf16[ROWS,1024] dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%ending (r: bf16[96,1024]) -> bf16[1536,1024] {
  %r = bf16[96,1024] parameter(0)
  %k = bf16[1536,1024] all-gather(%r), channel_id=7, replica_groups={}, dimensions={0}
  ROOT %e = bf16[1536,1024] custom-call(%r, %k), custom_call_target="AsyncCollectiveDone"
}

%summing (x: f32[1024]) -> f32[1024] {
  %x = f32[1024] parameter(0)
  ROOT %y = f32[1024] all-reduce(%x), channel_id=8, replica_groups={}, to_apply=%add
}

ENTRY %main (w: bf16[96,1024], c: bf16[ROWS,1024], m: bf16[1024,1024]) -> bf16[1536,1024] {
  %w = bf16[96,1024] parameter(0)
  %c = bf16[ROWS,1024] parameter(1)
  %m = bf16[1024,1024] parameter(2)
  %f = f32[1024] parameter(3)
  %f1 = (bf16[96,1024], bf16[1536,1024], u32[]) fusion(%w), kind=kCustom, calls=%starting
  %f2 = bf16[ROWS,1024] fusion(%w, %c, %m), kind=kOutput, calls=%async_collective_fusion.1
  %f3 = bf16[1536,1024] fusion(%w), kind=kCustom, calls=%ending
  %f4 = f32[1024] fusion(%f), kind=kCustom, calls=%summing
  ROOT %out = bf16[1536,1024] copy(%f3)
}
"""


def test_a_tpus_products_carry_a_gather_on_that_other_fusions_begin_and_end():
    gather, summed = _read(FUSIONS.replace("ROWS", "64"), V5E)
    assert (gather.kind, gather.bytes) == ("all-gather", 15 * 96 * 1024 * BF16)
    assert gather.exposed == pytest.approx(gather.seconds - 64 * FLOP / V5E.chip.flops)
    assert gather.is_begun_early and _read(FUSIONS.replace("ROWS", "65536"), V5E)[0].exposed == 0
    assert summed.kind == "all-reduce" and summed.exposed == pytest.approx(summed.seconds)
    assert not summed.is_begun_early


def test_what_is_never_awaited_in_the_text_counts_as_waited_for():
    text = GATHER.replace("BETWEEN", DOT).replace("GROUPS", "{}").replace("ROWS", "131072")
    (found,) = _read(text.replace("%end = bf16[1024,8192] all-gather-done", "%end = f32[] copy"))
    assert found.exposed == found.seconds


def test_a_program_of_one_chip_exchanges_nothing():
    assert _read(GATHER.replace("BETWEEN", "").replace("all-gather-", "copy-")) == []
    assert math.isnan(hidden_share([]))
