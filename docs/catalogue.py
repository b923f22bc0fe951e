"""What is published under which name, and what it is here: the data of `objectives.md`.

Equations, sources, meanings of arguments and confidence are in the docstrings of the factories;
here stands what no factory knows: whose name means which of them, with which settings, and what
others call the arguments.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Published(NamedTuple):
    """A published rule.

    name: as its paper or the frameworks call it.
    paper: arXiv number, or whose code it is.
    lines: the settings that make it; what is left out is the default.
    theirs: their hyper-parameters -> ours.
    note: what else is part of it, or differs.
    kind: what it is.
    """

    name: str
    paper: str
    lines: tuple[str, ...]
    theirs: Mapping[str, str] = {}
    note: str = ""
    kind: str = "objective"


def rule(name: str, *more: str) -> tuple[str, ...]:
    """The lines of an objective, and more."""
    return (f"Objective.name = '{name}'", *more)


def behind(name: str, *more: str) -> tuple[str, ...]:
    """The lines of what is chained behind any rule, and more."""
    return (f"Objective.penalties = ('{name}',)", *more)


def advantage(name: str, *more: str) -> tuple[str, ...]:
    """The lines of an advantage, and more."""
    return (f"Objective.advantage = '{name}'", *more)


ZSCORE, CENTRED = advantage("group_zscore")[0], advantage("group_mean")[0]
TOKENS = "Objective.aggregate = 'token_mean'"
SEQUENCES = "Objective.aggregate = 'sequence_mean'"
SUMS = "Objective.aggregate = 'sequence_sum'"
FIXED = ("Objective.aggregate = 'fixed_length'", "fixed_length.length = 3000")
VERL_CLIP = {"clip_ratio_low": "clip_low", "clip_ratio_high": "clip_high"}
TRL_CLIP = {"epsilon": "clip_low", "epsilon_high": "clip_high"}
CLIP = VERL_CLIP | TRL_CLIP

POLICY: tuple[Published, ...] = (
    Published("ASPO", "2510.06062", rule("aspo", SEQUENCES, *behind("kl_penalty"))),
    Published(
        "ASPO, released code",
        "2510.06062",
        rule("archer2", SEQUENCES, *behind("low_entropy_kl")),
        note="Archer2.0",
    ),
    Published("Archer", "2507.15778", rule("archer", TOKENS)),
    Published("PPO clip", "1707.06347", rule("ppo_clip", TOKENS), CLIP),
    Published(
        "dual-clip PPO",
        "1912.09729",
        rule("ppo_clip", TOKENS, "ppo_clip.dual_clip = 'hard'"),
        CLIP | {"clip_ratio_c (verl)": "dual_cap", "delta (TRL)": "dual_cap"},
    ),
    Published("GRPO", "2402.03300", rule("grpo", ZSCORE, SEQUENCES), CLIP),
    Published("GRPO without IS", "2510.06062 §4.2", rule("grpo_without_is", SEQUENCES)),
    Published(
        "GRPO with response-mean IS", "2510.06062 §5.3", rule("positive_response_mean", SEQUENCES)
    ),
    Published(
        "DAPO",
        "2503.14476",
        rule("dapo", TOKENS, "Train.refill_rounds = 9"),
        CLIP | {"clip_ratio_c": "dual_cap", "max_num_gen_batches": "Train.refill_rounds, plus 1"},
        "refill is part of it, and Reward.overlong_buffer = 4096, of 20,480",
    ),
    Published(
        "Dr. GRPO",
        "2503.20783",
        rule("grpo", CENTRED, *FIXED),
        {"generate_max_length": "fixed_length.length"},
    ),
    Published(
        "2-GRPO",
        "2510.00977",
        rule("grpo", ZSCORE, SEQUENCES, "Train.samples_per_prompt = 2"),
        {"num_generations": "Train.samples_per_prompt"},
        "right and wrong get +-0.707; +-1 with group_zscore.ddof = 0",
    ),
    Published("REINFORCE", "", rule("reinforce", TOKENS)),
    Published(
        "GPG",
        "2504.02546",
        rule("reinforce", CENTRED, SEQUENCES),
        note="its alpha, all groups over those with a signal, is in the denominators here",
    ),
    Published("RLOO", "2402.14740", rule("reinforce", *advantage("leave_one_out"), SUMS)),
    Published(
        "RLOO-N",
        "SkyRL fork",
        rule("reinforce", *advantage("leave_one_out"), "leave_one_out.min_valid = 2", SUMS),
    ),
    Published(
        "CISPO",
        "2506.13585",
        rule("cispo", TOKENS),
        {"epsilon_high (TRL, ms-swift)": "ratio_max", "1 + eps_clip_high (slime)": "ratio_max"},
    ),
    Published("GSPO, GSPO-token", "2507.18071", rule("gspo", SEQUENCES), CLIP),
    Published(
        "GSPO with per-token advantages",
        "2507.18071",
        rule("gspo", SEQUENCES, "gspo.coupled = True"),
    ),
    Published(
        "LUSPO",
        "2602.05261",
        rule("gspo", SUMS, "gspo.clip_low = 2e-3", "gspo.clip_high = 2.5e-3"),
        TRL_CLIP,
        "a response's gradient is its length times GSPO's: another learning rate",
    ),
    Published(
        "SAPO",
        "2511.20347",
        rule("sapo", SEQUENCES),
        {"tau_pos": "tau_positive", "tau_neg": "tau_negative"},
    ),
    Published("GMPO", "2507.20673", rule("gmpo", SEQUENCES), CLIP),
    Published(
        "DPPO, total variation",
        "2602.04879",
        rule("dppo_tv", SUMS),
        {"clip_ratio_low (verl)": "delta_low", "clip_ratio_high (verl)": "delta_high"},
        "verl: anchor 'old', cap 20; SkyRL, prime-rl: cap None",
    ),
    Published("DPPO, KL", "2602.04879", rule("dppo_kl", SUMS), {"clip_ratio (verl)": "delta"}),
    Published(
        "prime-rl ipo",
        "prime-rl",
        rule("dppo_tv", "dppo_tv.cap = None", "dppo_tv.sides = 'both'")
        + ("dppo_tv.delta_low = 0.1", "dppo_tv.delta_high = 0.1"),
    ),
    Published("DIS", "2602.15763", rule("dis", TOKENS), {"eps_clip_low": "clip_low"}),
    Published("CPPO, prefix budget", "2606.10968", rule("cppo", TOKENS), {"B": "delta_b"}),
    Published("DRPO", "2606.09821", rule("drpo", CENTRED, *FIXED), {"e": "epsilon"}),
    Published("SPO", "2606.09821", rule("drpo", "drpo.is_mu_weighted = False", CENTRED)),
    Published(
        "optimal token baseline",
        "2602.07078",
        rule("otb", CENTRED, TOKENS),
        note="one more pass over the vocabulary in scoring",
    ),
    Published(
        "DCPO",
        "2509.02333",
        rule("dcpo", *advantage("prompt_smooth"), TOKENS),
        {"max(c, 10)": "ratio_max"},
        "README 0.16 and 0.20; scripts 0.20 and 0.28",
    ),
    Published(
        "CTPO-LA",
        "2605.07331",
        rule("ctpo", TOKENS),
        {"la_clip_low": "clip_low", "la_clip_high": "clip_high", "clip_ratio_la_power": "power"},
    ),
    Published(
        "CTPO-LA, geometric mean",
        "2605.07331",
        rule("ctpo", TOKENS, "ctpo.prefix = 'mean'", "ctpo.power = -0.5"),
    ),
    Published(
        "BAPO",
        "2510.18927",
        rule("bapo", TOKENS),
        note="the three published sets are `BAPO_PUBLISHED`; another BAPO is 2602.20722",
    ),
    Published("GPPO, Klear-Reasoner", "2508.07629", rule("gppo", *behind("nll_bonus"), TOKENS)),
    Published(
        "CE-GPPO",
        "2509.20712",
        rule("ce_gppo", *behind("nll_bonus"), TOKENS),
        {"beta1": "beta_low", "beta2": "beta_high"},
        "7 B: beta_low 0.75",
    ),
    Published("HAPO", "2509.16591", rule("hapo", *advantage("token_group_zscore"), TOKENS)),
    Published("P3O, Trust the Batch", "2605.12380", rule("p3o", TOKENS)),
    Published("Clip-Cov", "2505.22617", rule("clip_cov", TOKENS), {"clip_cov_ratio": "share"}),
    Published(
        "KL-Cov",
        "2505.22617",
        rule("kl_cov", TOKENS),
        {"kl_cov_ratio": "share", "ppo_kl_coef": "beta"},
    ),
    Published("R2VPO", "2601.03320", rule("r2vpo", TOKENS), {"lambda": "lam"}),
    Published(
        "REC-OneSide-IS",
        "2509.24203",
        rule("rec", "rec.clip_mode = 'one_side'", "rec.weight = 'ratio'", CENTRED),
        note="equal to `ppo_clip`",
    ),
    Published(
        "REC-OneSide-NoIS",
        "2509.24203",
        rule("rec", "rec.clip_mode = 'one_side'", CENTRED),
        note="equal to `grpo_without_is`",
    ),
    Published(
        "REC-TwoSide-IS",
        "2509.24203",
        rule("rec", "rec.clip_mode = 'two_side'", "rec.weight = 'ratio'", CENTRED),
    ),
    Published("REC-Ring-NoIS", "2509.24203", rule("rec", "rec.clip_mode = 'ring'", CENTRED)),
    Published("RED-Weight", "2509.24203", rule("rec", "rec.weight = 'advantage'", CENTRED)),
    Published("OPMD, Trinity", "2505.17826", rule("opmd", CENTRED)),
    Published("OPMD, Kimi k1.5", "2501.12599", rule("kimi_opmd", CENTRED)),
    Published("DRO", "2405.19107", rule("kimi_opmd", CENTRED), {"beta (verl)": "tau"}),
    Published("AsymRE", "2506.20520", rule("asymre", CENTRED)),
    Published(
        "GBPO, BPO",
        "2604.18578",
        rule("gbpo", ZSCORE, *behind("kl_penalty"), TOKENS),
        {"T": "temperature"},
        "scripts: widths 0.3, temperature 1e-4",
    ),
    Published(
        "CoPG",
        "2406.19185",
        rule("copg", "copg.beta = 0.1", *advantage("leave_one_out"), SUMS),
        note="beta is not published; 0.1 is an example",
    ),
    Published(
        "PPO-EWMA, proximal policy = old policy",
        "2110.00641",
        rule("minirl", "minirl.cap = 100.0"),
        {"C": "cap"},
        "an average of policies is not kept",
    ),
    Published("UP", "2607.06987", rule("up", SEQUENCES)),
    Published("RIPO", "2607.10169", rule("ripo", TOKENS)),
    Published(
        "VESPO",
        "2602.10693",
        rule("vespo", TOKENS),
        {"vespo_k_pos (TRL)": "k_positive", "vespo_lambda_pos (TRL)": "lam_positive"}
        | {"vespo_k_neg (TRL)": "k_negative", "vespo_lambda_neg (TRL)": "lam_negative"},
    ),
    Published(
        "FIPO",
        "2603.19835",
        rule("fipo", TOKENS),
        {"delta": "dual_cap", "fipo_decay_rate": "half_life", "fipo_clip_range": "influence_max"}
        | {"fipo_safety_threshold": "safety_ratio"},
    ),
    Published("REAL", "2602.05630", rule("real", SEQUENCES)),
    Published("delightful policy gradient", "2603.14608", rule("delightful", TOKENS)),
    Published("MHPO", "2603.16929", rule("mhpo", SEQUENCES)),
    Published("DHPO", "2601.05607", rule("dhpo", SEQUENCES)),
    Published(
        "DISPO",
        "2602.00983",
        rule("dispo", TOKENS)
        + ("dispo.clip_low_positive = 0.2", "dispo.clip_high_positive = 0.28")
        + ("dispo.clip_low_negative = 0.9", "dispo.clip_high_negative = 9.0"),
        note="the four widths are not published; these are an example",
    ),
    Published("MinPRO", "2601.22718", rule("minpro", TOKENS)),
    Published("FiberPO", "2603.08239", rule("fiberpo", SEQUENCES)),
    Published(
        "APC-Obj",
        "2603.08239",
        rule("apc", "apc.delta = 0.2", SEQUENCES),
        note="delta is not published; 0.2 is an example",
    ),
    Published(
        "Reg-GRPO",
        "2506.07464",
        rule("reg_grpo", "reg_grpo.sigma_floor = 0.05", ZSCORE, SUMS),
        note="no floor is published; 0.05 is an example",
    ),
    Published("MiniRL", "2512.01374", rule("minirl", CENTRED, SUMS), {"C": "cap"}),
)

CHAINED: tuple[Published, ...] = (
    Published("KL to a reference, k3", "2402.03300", behind("kl_penalty"), kind="penalty"),
    Published(
        "unbiased KL",
        "2512.02556",
        behind("kl_penalty", "kl_penalty.estimator = 'k3_is'"),
        {"use_bias_correction_kl (TRL)": "estimator", "--use-unbiased-kl (slime)": "estimator"},
        "TRL's default with beta > 0; clamp 10 is slime's",
        kind="penalty",
    ),
    Published("split KL", "2510.06062, code", behind("low_entropy_kl"), kind="penalty"),
    Published("NLL of right answers", "2508.07629", behind("nll_bonus"), kind="penalty"),
    Published(
        "on-policy distillation",
        "tinker-cookbook",
        rule("distill", *advantage("none"), "Teacher.path = 'Qwen/Qwen3-8B'")
        + ("distill.anchor = 'sampler'", "distill.ratio = 'sampler'", SUMS),
        note="alone",
        kind="penalty",
    ),
    Published(
        "on-policy distillation with a reward",
        "prime-rl",
        behind("distill", "Teacher.path = 'Qwen/Qwen3-8B'"),
        kind="penalty",
    ),
    Published(
        "TIS",
        "verl, slime, OpenRLHF, NeMo-RL",
        behind("tis"),
        {"rollout_is_threshold": "ratio_max", "tis_clip": "ratio_max"},
        kind="correction",
    ),
    Published(
        "TIS, sequence",
        "verl, SkyRL",
        behind("tis", "tis.level = 'sequence'"),
        note="SkyRL: ratio_max 5",
        kind="correction",
    ),
    Published("MIS", "TRL, ms-swift token_mask", behind("mis"), kind="correction"),
    Published("IcePop", "NeMo-RL, verl, slime", behind("icepop"), kind="correction"),
    Published(
        "sequence mask",
        "TRL",
        behind("sequence_mask"),
        {"vllm_importance_sampling_cap": "ratio_max"},
        kind="correction",
    ),
    Published("seq-mask-TIS", "NeMo-RL, OpenRLHF", behind("seq_mask_tis"), kind="correction"),
    Published(
        "geometric rejection",
        "verl seq_mean_k1, SkyRL",
        behind("geometric_rejection"),
        note="verl's bounds are those of 1 / rho",
        kind="correction",
    ),
    Published("k3 rejection", "verl seq_mean_k3", behind("k3_rejection"), kind="correction"),
    Published("outlier veto", "SkyRL, slime", behind("outlier_veto"), kind="correction"),
    Published(
        "decoupled PPO",
        "AReaL",
        rule("ppo_clip", *behind("mis", "mis.high = 5.0")),
        note="proximal policy = old policy",
        kind="correction",
    ),
    Published(
        "OPSM",
        "2512.02556",
        behind("opsm", "opsm.delta = 0.5"),
        {"off_policy_mask_threshold (TRL)": "delta"},
        "slime: 1e-4",
        kind="predicate",
    ),
)

ADVANTAGE: tuple[Published, ...] = (
    Published("GRPO's", "2402.03300", advantage("group_zscore"), kind="advantage"),
    Published("Dr. GRPO's", "2503.20783", advantage("group_mean"), kind="advantage"),
    Published("RLOO's", "2402.14740", advantage("leave_one_out"), kind="advantage"),
    Published("MaxRL", "2602.02710", advantage("maxrl"), kind="advantage"),
    Published("OPO", "2505.23585", advantage("opo"), kind="advantage"),
    Published("GDPO", "2601.05242", advantage("gdpo"), kind="advantage"),
    Published("GRPO-passk", "2503.19595", advantage("grpo_passk"), kind="advantage"),
    Published("pass@k, analytic", "RUCAIBox Passk_Training", advantage("passk"), kind="advantage"),
    Published(
        "Lite-PPO",
        "2508.08221",
        advantage("batch_zscore"),
        {"scale_rewards = 'batch' (TRL)": "batch_zscore"},
        kind="advantage",
    ),
    Published("HAPO's", "2509.16591", advantage("token_group_zscore"), kind="advantage"),
    Published("DCPO's", "2509.02333", advantage("prompt_smooth"), kind="advantage"),
    Published("AsymRE's", "2506.20520", advantage("shifted_mean"), kind="advantage"),
)

REWARD: tuple[Published, ...] = (
    Published(
        "GRPO-lambda", "2505.18086", ("Reward.shapes = ('grpo_lambda',)",), kind="reward shape"
    ),
    Published(
        "Train Long, Think Short",
        "2508.08940",
        ("Reward.shapes = ('curriculum_budget',)",),
        kind="reward shape",
    ),
)

LEFT_OUT: Mapping[str, str] = {
    "SSPO (2511.04256)": "splitter, bounds and entropy map of its sentences were not found",
    "PPO-EWMA with an average of policies (2110.00641), its revision (2605.12070)": "needs one"
    " more copy of the weights and a scoring pass before every update; the revision is unread",
    "ECHO (prime-rl)": "a loss on tool messages, which no sample here has yet",
    "ReMax (2310.10505)": "needs a greedy sample beside each group",
    "RED-Drop (2509.24203)": "drops samples at random before the advantage",
    "log-linear proximal policy (AReaL, 2512.06547)": "needs a version of the weights per token;"
    " with the lag of one that there is it is PPO on the sampler's probabilities",
    "S-PPO, ST-PPO (2511.20718), Turn-PPO, A2TGPO (2605.06200)": "a second backward pass; turns",
    "POPE (2601.18779), Knapsack RL (2509.25849)": "sampling: solutions as prefixes, groups of"
    " different sizes",
    "Adaptive layerwise perturbation (2603.19470)": "noise inside the model",
    "CHRPO (2602.08324), MicroCoder-GRPO (2603.07777)": "numbers that were not published",
    "rDPO, RPO, POWER-DL": "offline preferences: pairs and no rollouts",
    "Flow-DPPO, GRPO-Guard and other rules of diffusion models": "no tokens",
    "DPPO's predictive top-k": "needs k log-probabilities of the sampler per token",
}

INTRODUCTION = """\
Every rule here is a token coefficient, `c = w A + b` ([the equation](index.md#the-equation)): a
factory of `aspo_jax.losses`, whose name in a config is `Objective.name` or one of
`Objective.penalties`, and whose arguments are the section of that name. `r` is the importance ratio
`pi / pi_old`, `mu` the policy that sampled, `rho = pi_old / mu`. Pictures of all weights:
[Atlas](atlas.md); two rules side by side, with sliders: [weights.html](weights.html). Which rule a
loss of yours is: [Conformance](conformance.md). One of your own: [Your own
objective](own_objective.md). What recorded rollouts would have given under another rule:
`python -m aspo_jax.replay RUN --objective NAME`.

`clip_low` and `clip_high` are widths around 1, `ratio_min` and `ratio_max` absolute bounds, `cap` a
largest weight. A predicate sets w to 0 and leaves the token in the denominators. Confidence says
what was read: *high*, the authors' code; *medium*, ports that agree; *low*, no more than an
abstract. Experimental rules say what is unverified."""

KINDS: Mapping[str, str] = {
    "objective": "`Objective.name`, or `Objective.penalties` for what is chained behind it.",
    "advantage": "`Objective.advantage`: of a sample with reward R among those of its prompt.",
    "aggregate": "`Objective.aggregate`: how tokens are averaged.",
}

MEASURED = """\
## What they do here

The default task, every rule of a seed from one warm start; after 80 iterations, means over seeds
and their standard errors:

| | seeds | avg@16 | pass@16 | distinct right of 16 | entropy, late |
|---|---:|---:|---:|---:|---:|
| ASPO | 5 | 0.782 +- 0.02 | 0.977 +- 0.007 | 2.60 +- 0.2 | 0.080 +- 0.009 |
| DAPO | 5 | 0.773 +- 0.04 | 0.961 +- 0.007 | 2.37 +- 0.2 | 0.074 +- 0.010 |
| GRPO without IS | 5 | 0.765 +- 0.03 | 0.977 +- 0.006 | 2.41 +- 0.1 | 0.077 +- 0.008 |
| GRPO | 3 | 0.785 +- 0.02 | 0.958 +- 0.010 | 2.21 +- 0.1 | 0.071 +- 0.006 |
| CISPO | 3 | 0.775 +- 0.02 | 0.964 +- 0.009 | 2.07 +- 0.06 | 0.063 +- 0.004 |
| GSPO | 3 | 0.758 +- 0.03 | 0.992 +- 0.005 | 3.21 +- 0.08 | 0.097 +- 0.003 |

No rule scores higher than another beyond the noise of seeds. CISPO keeps the least variety and GSPO
the most. Of what the paper claims of ASPO, three things are seen at this scale: DAPO moves farther
from the old policy within a step, right answers have the larger mean ratio in it, and with many
updates for each rollout the gradient spikes where ASPO has no soft caps. The rest cannot be told
from noise; no claim is seen the other way.

![Held-out score, entropy, clip share and KL, mean and range over seeds](claims.png)

![Eight epochs over each rollout: gradient norm, surrogate, held-out score](claims_stress.png)

A real model shows more. Qwen2.5-Coder-0.5B-Instruct on GSM8K, 38 iterations on one H100, one seed:
at the same training reward ASPO keeps its entropy, DAPO's halves and its responses become shorter.

![Training reward, entropy and length of responses on GSM8K, three rules](gsm8k_objectives.png)

Each claim with its interval, more rules, and how all was measured: `benchmarks/RESULTS.md`."""
