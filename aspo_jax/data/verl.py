"""Rows as verl has them, and what is trained from it: Archer, DAPO, DeepScaleR.

{"data_source": "math_dapo",
 "prompt": [{"role": "user", "content": "..."}],
 "reward_model": {"style": "rule", "ground_truth": "34"},
 "extra_info": {"index": "9a9b6eb4-a1cb-49d1-8c1e-62eaf2f74079"}}
"""

from __future__ import annotations

from aspo_jax.data.rows import Fields

# What data sources are graded as, by the names that verl's and Archer's own scorers know. The
# first pattern that matches counts.
GRADERS = {
    "openai/gsm8k": "math",
    "gsm8k": "math",
    "lighteval/MATH": "math",
    "DigitalLearningGmbH/MATH-lighteval": "math",
    "HuggingFaceH4/MATH-500": "math",
    "math": "math",
    "math500": "math",
    "math_dapo*": "math",
    "aime*": "math",
    "amc*": "math",
    "numina_*": "math",
    "code": "code",
    "codecontests": "code",
    "codeforces": "code",
    "apps": "code",
    "taco": "code",
    "livecodebench*": "code",
    "humanevalplus": "code",
}

FIELDS = Fields(
    id="extra_info.index",
    prompt="prompt",
    answer="reward_model.ground_truth",
    kind="data_source",
    graders=GRADERS,
    are_ids_loose=True,  # files of several sources count each from 0
)
