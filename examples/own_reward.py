"""A reward of one's own, and prompts from a Python generator.

The reward runs in processes that can be killed, which import it by the name of its module.
"""

from aspo_jax.data import generated
from aspo_jax.library import configure, start
from aspo_jax.parts import parts
from aspo_jax.train import train


def short(prompt, completion, answer):
    """1 for an answer of at most so many letters, less for a longer one."""
    return min(1.0, answer / max(len(completion), 1))


def questions():
    for number in range(1, 10):
        yield {"prompt": f"{number} 9:{9 - number}", "answer": 4, "kind": "custom"}


if __name__ == "__main__":
    config = configure("countdown_tiny", "Reward.functions=['own_reward:short']")
    own = parts(config, start(config))
    step = config.train.prompts_per_step
    prompts = generated(
        questions, tokenizer=own.policy.tokenizer, prompts_per_step=step, max_prompt_tokens=8
    )
    train(config, own._replace(prompts=prompts))
