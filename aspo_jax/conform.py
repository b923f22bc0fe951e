"""Say which policy objective a loss is, of any package, in JAX or torch: ASPO, or what else.

    python -m aspo_jax.conform my_rules:aspo_loss
    python -m aspo_jax.conform aspo_jax.losses:cispo --expect cispo
    python -m aspo_jax.conform package.core:policy_loss --adapter my_adapters:package --json

The loss is ``f(logp, old_logp, advantage, mask) -> loss``, with arrays [B, T] and a scalar or
values [B, T]; ``entropy`` is given to one that takes it. An adapter is a function that is given
what is named and returns such a loss. A function without required arguments is called first: one
of this package's objectives is named by its factory.

Exit status: 0 it is ASPO, of the paper or of the released code, or what --expect names, and none
of the defects was found; 1 it is not; 2 it could not be called.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence

from aspo_jax.conformance.calling import open_loss
from aspo_jax.conformance.probes import Measured, measure
from aspo_jax.conformance.report import as_json, as_text
from aspo_jax.conformance.verdict import ASPO, DEFECTS, NAMES, Verdict, judge, suffixes
from aspo_jax.errors import CommandParser, nearest, run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Probe the loss that the command line names; returns the exit status."""
    parser = CommandParser("conform", __doc__)
    parser.add_argument("loss", metavar="PACKAGE.MODULE:FUNCTION", help="the loss to ask")
    parser.add_argument("--framework", choices=("jax", "torch"), help="else found from its module")
    parser.add_argument(
        "--adapter", metavar="MODULE:FUNCTION", help="makes a loss of what is named"
    )
    parser.add_argument(
        "--expect", metavar="NAME", help=f"the verdict that is right: {', '.join(NAMES)}"
    )
    parser.add_argument(
        "--allow", action="append", default=[], choices=DEFECTS, help="a defect to forgive"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    a = parser.parse_args(argv)
    if a.expect is not None and a.expect not in NAMES:
        parser.error(f"--expect {a.expect!r}{nearest(a.expect, NAMES)}: one of {', '.join(NAMES)}")
    # All is computed on the CPU: an accelerator may be busy. Read when jax is imported.
    os.environ["JAX_PLATFORMS"] = "cpu"
    return run_command(lambda: _conform(a))


def _conform(a: argparse.Namespace) -> int:
    loss = open_loss(a.loss, adapter=a.adapter, framework=a.framework)
    measured = measure(loss)
    verdict = judge(measured)
    status = _status(verdict, measured, a.expect, a.allow)
    if a.json:
        found = as_json(a.loss, loss, measured, verdict)
        print(json.dumps({**found, "exit_status": status}, indent=2))
        return status
    print(as_text(a.loss, loss, measured, verdict))
    return status


def _status(
    verdict: Verdict, measured: Measured, expected: str | None, allowed: Sequence[str]
) -> int:
    """0 for a right name without a defect that is not allowed."""
    is_right = verdict.names[0] in ASPO if expected is None else expected in verdict.names
    defects = [d for d in DEFECTS if any(s.startswith(d) for s in suffixes(measured))]
    return 0 if is_right and set(defects) <= set(allowed) else 1


if __name__ == "__main__":
    sys.exit(main())
