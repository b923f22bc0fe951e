"""An objective of one's own, trained on the embedded task.

The config names it by its module, so `export`, `check` and `plan` of the run find it too.
"""

from aspo_jax.library import configure
from aspo_jax.losses import Coefficient, Objective, mean_over, ratio
from aspo_jax.train import train


def mine(*, cap: float = 2.0) -> Objective:
    """Every token weighs 1/r, at most the cap: the flip of ASPO without its mask.

    cap: largest weight.
    """

    def coefficient(tokens, state, stats):
        weight_BT = (1 / ratio(tokens)).clip(max=cap)
        at_cap = mean_over(weight_BT >= cap, tokens.is_response_BT)
        return Coefficient(weight_BT, 0 * weight_BT, {"at_cap": at_cap})

    return Objective(coefficient)


if __name__ == "__main__":
    train(configure("countdown_tiny", "Objective.name=own_objective:mine", "mine.cap=1.5"))
