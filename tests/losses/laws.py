"""All laws by name. A rule joins every test of the losses by being listed in one of these files."""

import law_bounded
import law_corrections
import law_coupled
import law_distill
import law_grouped
import law_position
import law_ppo
import law_prefix
import law_regression
import law_sequence
import law_smooth
import law_trust

FAMILIES = (
    law_bounded,
    law_corrections,
    law_coupled,
    law_distill,
    law_grouped,
    law_position,
    law_ppo,
    law_prefix,
    law_regression,
    law_sequence,
    law_smooth,
    law_trust,
)
LAWS = {name: law for family in FAMILIES for name, law in family.LAWS.items()}
assert len(LAWS) == sum(len(family.LAWS) for family in FAMILIES), "two laws share a name"
