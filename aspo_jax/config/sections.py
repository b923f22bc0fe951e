"""The sections of a config and the Config they make: frozen, strictly typed, born valid."""

import dataclasses
import re
import shutil
import sys
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import annotated_types
import pydantic
from pydantic import ConfigDict, Field

from aspo_jax.config.gin import diff_text
from aspo_jax.shell import join


def setting(default: Any, unit: str, meaning: str, *, factory: str = "", **bounds: Any) -> Any:
    """A field with its unit, meaning and bounds (gt, ge, lt, le); ``...`` = no default.

    factory: the kind of factories that it names; "": none.
    """
    extra: Any = {"unit": unit, "factory": factory}
    return Field(default, description=meaning, json_schema_extra=extra, **bounds)


Natural = Annotated[int, annotated_types.Ge(0)]  # an item of a list

_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
_Section = typing.TypeVar("_Section")


@typing.dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(setting,))
def section(cls: type[_Section]) -> type[_Section]:
    """Make a class a frozen, strictly typed group of settings."""
    make = pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=_STRICT)
    return typing.cast(type[_Section], make(cls))


@section
class Run:
    """The run as a whole."""

    seed: int = setting(0, "", "seed of the weights, the warm start, the data and sampling", ge=0)
    folder: str | None = setting(
        None, "path", "where the run is kept; None: runs/<config>-<objective>-seed<seed>"
    )
    accept_changes: bool = setting(False, "", "resume although the config differs from the run's")
    export_dtype: Literal["bfloat16", "float32"] = setting(
        "float32",
        "",
        "type of the weights in the final model folder; bfloat16 is half as large and can round "
        "away what was learned: the run says how much",
    )


@section
class Data:
    """Where the prompts come from: one source, or a mixture of labelled ones.

    ``Data.mixture = ('a', 'b')`` mixes two, set as ``Data.a.source``, ``Data.b.source`` and so on;
    what a label leaves out is as Data says.
    """

    source: str = setting(
        ...,
        "",
        "'countdown': puzzles made from the seed; 'files': prompts of one's own;"
        " 'reasoning_gym:TASK'; or anyone's 'package.module:factory'",
        factory="source",
    )
    mixture: tuple[str, ...] = setting((), "", "labels of the sources that are mixed; (): no mix")
    weight: float = setting(
        1.0, "", "how often a source of a mixture is drawn, to the others", gt=0
    )
    train_path: str | None = setting(
        None,
        "path",
        "training prompts (source 'files'): a file, a folder, a pattern, or"
        " 'hub:OWNER/NAME/SUBSET/SPLIT'",
    )
    eval_path: str | None = setting(None, "path", "held-out prompts, as Data.train_path")
    layout: Literal["plain", "verl"] = setting(
        "plain",
        "",
        "which fields the next ones name where they are None; 'verl': prompt,"
        " reward_model.ground_truth, extra_info.index, and the grader that data_source implies",
    )
    id: str | None = setting(
        None, "field", "a row's name; rows without it are numbered; None: 'id', or by the layout"
    )
    prompt: str | None = setting(
        None,
        "field",
        "the question, a text or a chat; None: 'prompt' or 'messages', or by the layout",
    )
    answer: str | None = setting(
        None,
        "field",
        "what the grader needs; a dot leads inside: 'reward_model.ground_truth'; '*': the whole"
        " record; None: 'answer', or by the layout",
    )
    answer_pattern: str | None = setting(
        None, "", "regular expression; its first group in the answer is taken: '#### (.*)'"
    )
    grader: str | None = setting(
        None, "", "judges every row; None: the row's field 'kind' says, or by the layout"
    )
    template: str | None = setting(
        None, "", "the user's message: '{prompt}' is the question, '{other}' another field"
    )
    system: str | None = setting(None, "", "a message of the system before the question")
    overlap_words: int = setting(
        0,
        "words",
        "leave out training rows whose question shares so many words in a row with a held-out one"
        " (a shorter one: all its words); 0 = off",
        ge=0,
    )
    bad_rows: Literal["stop", "skip"] = setting(
        "stop", "", "rows that cannot be used: an error at the start, or left out and counted"
    )
    too_long: Literal["stop", "skip"] = setting(
        "stop", "", "prompts above Sampler.max_prompt_tokens: an error, or left out and counted"
    )


@section
class Countdown:
    """The embedded puzzle: reach the target with every number used once."""

    numbers: int = setting(4, "numbers", "numbers in a puzzle", ge=2, le=16)
    low: int = setting(1, "", "smallest number drawn", ge=1, le=999_999)
    high: int = setting(9, "", "largest number drawn", ge=1, le=999_999)
    operations: str = setting("+-", "", "operations allowed, out of + - *")
    max_intermediate: int = setting(99, "", "largest intermediate result", ge=1)


@section
class Model:
    """The policy: a Hugging Face folder or name, or a new Qwen2 model of the sizes given."""

    path: str | None = setting(
        None,
        "path",
        "Hugging Face folder, or owner/name[@revision] on its hub; None: new model + warm start",
    )
    hidden_size: int | None = setting(None, "features", "width of the residual stream", ge=1)
    layers: int | None = setting(None, "blocks", "transformer blocks", ge=1)
    heads: int | None = setting(None, "heads", "query heads", ge=1)
    kv_heads: int | None = setting(None, "heads", "key/value heads, a divisor of heads", ge=1)
    intermediate_size: int | None = setting(None, "features", "width of the SwiGLU layer", ge=1)
    rope_theta: float = setting(10000.0, "", "base of the rotary position embedding", gt=0)
    tie_embeddings: bool = setting(True, "", "one matrix for embedding and output")
    dtype: Literal["float32", "bfloat16"] = setting("float32", "", "type of the computation")
    remat: Literal["dots", "attention", "full"] = setting(
        "dots",
        "",
        "what the backward pass does not compute again: matrix products, attention, nothing",
    )
    attention: Literal["auto", "dense", "chunked", "splash", "pallas", "cudnn"] = setting(
        "auto", "", "attention of training and prefill; auto: what the hardware does best"
    )


@section
class Lora:
    """Low-rank adapters, trained beside the frozen weights of the policy (arXiv 2106.09685)."""

    rank: int | None = setting(
        None, "features", "rank of the adapters; None: all weights are trained", ge=1
    )
    alpha: float = setting(
        32.0, "", "the low-rank product is multiplied with alpha / rank before it is added", gt=0
    )
    targets: Literal["attention", "mlp", "all"] = setting(
        "all", "", "which matrices of the layers have adapters: never embedding and output head"
    )
    is_rank_stabilised: bool = setting(False, "", "divide alpha by the root of the rank instead")
    weights: Literal["int8", "bfloat16", "float32"] | None = setting(
        None,
        "",
        "type of the frozen weights in memory; int8: of their matrices, rounded, embeddings and"
        " norms stay bfloat16; None: Model.dtype",
    )
    is_merged: bool = setting(
        True,
        "",
        "sample from the sums of matrices and adapters, a copy of the weights; False: from the"
        " frozen weights with adapters beside them, no copy where type and layout allow it",
    )
    path: str | None = setting(
        None,
        "path",
        "folder of an adapter to start from, as the peft package writes it; None: a new one, under"
        " which the policy is the frozen model",
    )


@section
class Teacher:
    """Another model whose log-probabilities rules may read, such as `distill`; it is not trained.

    Of any family and size, but with the tokens of the policy.
    """

    path: str | None = setting(
        None, "path", "as Model.path; needed where a rule reads a teacher, refused where none does"
    )
    dtype: Literal["bfloat16", "float32"] = setting(
        "bfloat16", "", "type of its weights in memory; it computes in Model.dtype"
    )
    advantage: float = setting(
        0.0,
        "per nat",
        "what log pi_teacher - log pi_old is multiplied with and added to each token's advantage,"
        " before Objective.name sees it (`with_teacher`); 0: it is not",
        ge=0,
    )


@section
class WarmStart:
    """Supervised training on worked examples before a new model meets the reward."""

    batch_size: int = setting(64, "examples", "worked examples per step", ge=1)
    learning_rate: float = setting(
        5e-3, "", "peak learning rate of AdamW, falling linearly to 0 at max_steps", gt=0
    )
    warmup_steps: int = setting(20, "steps", "linear learning-rate warm-up", ge=0)
    b2: float = setting(0.98, "", "decay of the squared-gradient average", ge=0, lt=1)
    weight_decay: float = setting(0.01, "", "decoupled weight decay", ge=0)
    clip_norm: float = setting(1.0, "", "largest global gradient norm", gt=0)
    target: float = setting(0.30, "share", "stop at this held-out avg@k", gt=0, le=1)
    eval_every: int = setting(100, "steps", "steps between looks at the target", ge=1)
    max_steps: int = setting(1000, "steps", "give up after this many steps", ge=1)
    cache: str = setting("~/.cache/aspo_jax/warm_start", "path", "finished warm starts")


@section
class Sampler:
    """How completions are drawn: by this process, or by an engine that is a server (engine).

    An engine is there already (addresses), or the run starts it (command).
    """

    temperature: float = setting(1.0, "", "sampling temperature in training", gt=0)
    top_k: int = setting(0, "tokens", "only 0 = off: biases training, see Evaluate.top_k", ge=0)
    top_p: float = setting(
        1.0, "share", "only 1 = off: biases training, see Evaluate.top_p", gt=0, le=1
    )
    max_prompt_tokens: int = setting(..., "tokens", "longest prompt", ge=1)
    max_response_tokens: int = setting(..., "tokens", "longest response", ge=1)
    slots: int = setting(..., "sequences", "sequences decoded at once", ge=1)
    stop_ids: tuple[Natural, ...] = setting((), "", "ids that end a response beside the model's")
    stop_strings: tuple[str, ...] = setting((), "", "texts that end a response")
    page: int = setting(64, "tokens", "positions in a page of the key-value cache", ge=1)
    cache_tokens: int | None = setting(
        None,
        "tokens",
        "positions in all pages; None: every slot at full length. With fewer, sequences that find "
        "no page are drawn again later",
        ge=1,
    )
    cache_type: Literal["int8"] | None = setting(
        None, "", "type of the cached keys and values; None: Model.dtype"
    )
    paged_kernel: bool = setting(
        True,
        "",
        "on a GPU, decode with a kernel that reads pages where they lie; False: gather them",
    )
    max_gap: float = setting(
        0.1,
        "nats",
        "stop when the sampler's log-probabilities are on average this far from the trainer's",
        gt=0,
    )
    max_token_gap: float = setting(
        1.0,
        "nats",
        "with Train.old_logp = 'sampler': stop too when a single token of an iteration's first"
        " minibatch is this far",
        gt=0,
    )
    nonfinite: Literal["stop", "drop"] = setting(
        "stop", "", "samples that ended in a distribution that is not finite: stop, or go without"
    )
    engine: Literal["vllm", "sglang", "aspo_jax"] | None = setting(
        None, "", "kind of server that training and evaluation draw from; None: this process draws"
    )
    addresses: tuple[str, ...] = setting(
        (), "", "where the engines are, such as 'http://127.0.0.1:8000'; groups are spread over all"
    )
    command: str | None = setting(
        None,
        "",
        "starts an engine on this machine, which ends with the run; '{model}' and '{port}' stand"
        " for the folder of its weights and its port; no shell reads it",
    )
    served_model: str = setting("policy", "", "the name that the engines serve the policy by")
    weights_folder: str | None = setting(
        None,
        "path",
        "where weights for the engines are written, on a file system that they share; None: the"
        " machine's memory, /dev/shm",
    )
    weights_dtype: Literal["float32", "bfloat16"] | None = setting(
        None, "", "type of those weights; None: Model.dtype"
    )
    request_timeout_s: float = setting(
        1800.0, "seconds", "time allowed for a group's answers, the engine's queue included", gt=0
    )
    engine_start_s: float = setting(
        1800.0, "seconds", "time allowed for an engine to become ready", gt=0
    )


@section
class Reward:
    """How completions are judged."""

    workers: int = setting(1, "processes", "grading processes", ge=1, le=4096)
    timeout_s: float = setting(
        5.0, "seconds", "time allowed per answer and judge (not programs)", gt=0, le=86_400
    )
    grade_truncated: bool = setting(
        False, "", "mathematics: a text that was cut off may be judged by what stands last in it"
    )
    functions: tuple[str, ...] = setting(
        (), "", "functions of one's own, 'package.module:function', added to the grader's reward"
    )
    weights: tuple[float, ...] = setting(
        (), "", "what the reward of each function is multiplied with; none: 1"
    )
    sandbox: Literal["auto", "namespaces", "landlock", "rlimits"] = setting(
        "auto", "", "for programs; auto: the safest that holds; rlimits stops accidents only"
    )
    test_timeout_s: float = setting(
        6.0, "seconds", "time allowed per test of a program", gt=0, le=86_400
    )
    test_memory_mib: int = setting(1024, "MiB", "memory of a program under test", ge=64, le=2**20)
    program_timeout_s: float = setting(
        60.0, "seconds", "time allowed for all tests of a program", gt=0, le=86_400
    )
    max_tests: int = setting(0, "tests", "tests drawn per program; 0 = all", ge=0)
    max_failures: float = setting(
        0.05, "share", "stop if the graders of more samples of a step fail", ge=0, le=1
    )
    shapes: tuple[str, ...] = setting(
        (), "", "shape factories, applied after the ramp", factory="shape"
    )
    overlong_buffer: int = setting(0, "tokens", "length of the overlong ramp; 0 = off", ge=0)
    overlong_factor: float = setting(1.0, "reward", "penalty at the end of the ramp", ge=0)


@section
class Objective:
    """What is maximised. A factory's own arguments are a section of its name.

    Each factory is one of ours or anyone's, 'package.module:factory'. One that is used twice gets a
    label: 'kl_penalty' and 'kl_penalty.b' read the sections kl_penalty and kl_penalty.b.
    """

    name: str = setting(..., "", "loss rule, an objective factory", factory="objective")
    penalties: tuple[str, ...] = setting(
        (), "", "objective factories chained behind the rule", factory="objective"
    )
    advantage: str = setting("group_zscore", "", "an advantage factory", factory="advantage")
    aggregate: str = setting("sequence_mean", "", "an aggregate factory", factory="aggregate")
    entropy_bonus: float = setting(0.0, "per nat", "weight of the entropy bonus", ge=0)
    scope: Literal["minibatch", "microbatch"] = setting(
        "minibatch",
        "",
        "where a rule coupled over its tokens takes its statistics: of the whole minibatch, by a "
        "forward pass more, or of each micro-batch, as published code does",
    )


@section
class Optim:
    """The optimizer and its learning rate; b1, b2, eps, weight_decay and decay are adamw's."""

    name: str = setting("adamw", "", "an optimizer factory", factory="optimizer")
    learning_rate: float = setting(..., "", "learning rate after the warm-up", gt=0)
    warmup_updates: int = setting(0, "updates", "linear learning-rate warm-up", ge=0)
    warmup_iterations: int = setting(
        0,
        "iterations",
        "warm-up stepped once per iteration, from rate 0 in the first (the official run's)",
        ge=0,
    )
    schedule: Literal["constant", "linear"] = setting(
        "constant", "", "after the warm-up: stay, or fall linearly to 0 at the end of the run"
    )
    b1: float = setting(0.9, "", "decay of the gradient average", ge=0, lt=1)
    b2: float = setting(0.999, "", "decay of the squared-gradient average", ge=0, lt=1)
    eps: float = setting(1e-8, "", "added to the root of the squared-gradient average", gt=0)
    weight_decay: float = setting(0.0, "", "decoupled weight decay", ge=0)
    decay: Literal["all", "matrices"] = setting(
        "all", "", "what decays: every parameter (the official run's), or neither norms nor biases"
    )
    clip_norm: float = setting(1.0, "", "largest global gradient norm", gt=0)
    offload: bool = setting(
        False,
        "",
        "keep the optimizer's state (AdamW's moments, 8 bytes a parameter) in the host's memory;"
        " each update reads and writes all of it over the bus between host and accelerator",
    )


@section
class Train:
    """The sizes of an iteration, always global."""

    iterations: int = setting(..., "iterations", "length of the run", ge=1)
    prompts_per_step: int = setting(..., "prompts", "prompts sampled per iteration", ge=1)
    samples_per_prompt: int = setting(..., "samples", "completions per prompt, a group", ge=1)
    prompts_per_minibatch: int = setting(..., "prompts", "prompts per optimizer update", ge=1)
    refill_rounds: int = setting(
        0,
        "rounds",
        "dynamic sampling: while groups with a signal are missing, draw prompts_per_step prompts "
        "more, so many times at most; 0: train on the groups that have one",
        ge=0,
    )
    epochs: int = setting(1, "epochs", "passes over an iteration's samples", ge=1)
    row_tokens: int = setting(..., "tokens", "length of a training row", ge=1)
    pack: bool = setting(True, "", "several sequences may share a row")
    rows_per_microbatch: int = setting(..., "rows", "rows in one forward and backward pass", ge=1)
    head_chunk: int = setting(1024, "tokens", "most tokens per chunk of the output layer", ge=1)
    old_logp: Literal["score", "sampler"] = setting(
        "score",
        "",
        "old log-probabilities: 'score': a forward pass of the trainer's, the first ratio is"
        " exactly 1; 'sampler': what the sampler reported, no pass, while the first update of each"
        " iteration finds them within Sampler.max_gap and Sampler.max_token_gap",
    )
    record: int = setting(
        0,
        "iterations",
        "keep the whole rollout of every so many iterations in rollouts/, for aspo_jax.replay; 0:"
        " of none",
        ge=0,
    )


@section
class Evaluate:
    """Held-out evaluation, always before and after the run."""

    every: int = setting(0, "iterations", "evaluate this often; 0: before and after only", ge=0)
    prompts: int = setting(128, "prompts", "held-out prompts", ge=1)
    samples: int = setting(16, "samples", "completions per prompt: the k of avg@k", ge=1)
    seed: int = setting(1, "", "seed of the paired sampling keys", ge=0)
    temperature: float = setting(
        1.0, "", "sampling temperature in evaluation; 0: always the likeliest token", ge=0
    )
    top_k: int = setting(0, "tokens", "draw from the k likeliest; 0 = off", ge=0)
    top_p: float = setting(1.0, "share", "draw from the likeliest mass p; 1 = off", gt=0, le=1)
    min_p: float = setting(
        0.0, "share", "draw from tokens this share as likely as the likeliest; 0 = off", ge=0, le=1
    )
    suites: tuple[str, ...] = setting(
        (),
        "",
        "more held-out sets: packaged suites or .gin files (docs/evaluation.md), each set with its"
        " own sampling and at most Evaluate.prompts prompts",
    )
    data_folder: str = setting("data", "path", "where the files of the suites are")


@section
class Checkpoint:
    """Saving the run."""

    every: int = setting(10, "iterations", "save this often", ge=1)
    keep: int = setting(2, "checkpoints", "newest checkpoints kept", ge=1)


@section
class Metrics:
    """What is recorded."""

    tensorboard: bool = setting(True, "", "write TensorBoard event files too")
    writers: tuple[str, ...] = setting(
        (), "", "writer factories that get every row of the log too", factory="writer"
    )
    profile_iterations: tuple[Natural, ...] = setting((), "iterations", "iterations to profile")
    transcripts: int = setting(8, "samples", "completions written out per iteration", ge=0)


@section
class Runtime:
    """The device mesh, one size per axis; -1 = all devices left over. And the processes."""

    data: int = setting(-1, "devices", "replicas of the batch axis", ge=-1)
    fsdp: int = setting(1, "devices", "shards of parameters and batch", ge=-1)
    tensor: int = setting(1, "devices", "shards of heads and features", ge=-1)
    context: int = setting(1, "devices", "reserved for shards of one sequence; only 1 as yet", ge=1)
    coordinator: str | None = setting(
        None, "host:port", "where process 0 listens; None: as the environment says, or alone"
    )
    num_processes: int | None = setting(None, "processes", "processes of the run", ge=1)
    process_id: int | None = setting(None, "", "number of this process, from 0", ge=0)
    compilation_cache: str | None = setting(
        "~/.cache/aspo_jax/xla", "path", "compiled programs; None = off"
    )


OF_ENGINES = (  # settings of Sampler that say nothing to a sampler in this process
    *("engine", "addresses", "command", "served_model", "weights_folder", "weights_dtype"),
    *("request_timeout_s", "engine_start_s"),
)
SECTIONS: dict[str, type[Any]] = {
    cls.__name__: cls
    for cls in (
        *(Run, Data, Countdown, Model, Lora, Teacher, WarmStart, Sampler, Reward, Objective),
        *(Optim, Train, Evaluate, Checkpoint, Metrics, Runtime),
    )
}


class Origin(typing.NamedTuple):
    """Where a model's files are, and its commit on the hub; None: it is a folder of one's own."""

    folder: str
    commit: str | None = None


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings of a run.

    Not part of its identity: ``name``, the config file's stem; ``source``, how the command line
    named that file ("": the default's); ``settings``, its ``--set``; ``origin`` and
    ``teacher_origin``, what `aspo_jax.origin` found of ``Model.path`` and ``Teacher.path``.
    """

    run: Run
    data: Data
    countdown: Countdown
    model: Model
    lora: Lora
    teacher: Teacher
    warm_start: WarmStart
    sampler: Sampler
    reward: Reward
    objective: Objective
    optim: Optim
    train: Train
    evaluate: Evaluate
    checkpoint: Checkpoint
    metrics: Metrics
    runtime: Runtime
    factories: Mapping[str, Mapping[str, Any]]  # factory -> the keyword arguments that were set
    mixture: Mapping[str, Data]  # label -> a source of the mixture; empty without one
    name: str = dataclasses.field(compare=False)
    source: str = dataclasses.field(default="", compare=False)
    settings: tuple[str, ...] = dataclasses.field(default=(), compare=False)
    origin: Origin | None = dataclasses.field(default=None, compare=False)
    teacher_origin: Origin | None = dataclasses.field(default=None, compare=False)

    @property
    def model_folder(self) -> str | None:
        """The folder of the policy's files; None: a new model. Names of the hub: once located."""
        return self.origin.folder if self.origin else self.model.path

    @property
    def teacher_folder(self) -> str | None:
        """The folder of the teacher's files; None: no teacher. Names of the hub: once located."""
        return self.teacher_origin.folder if self.teacher_origin else self.teacher.path

    @property
    def frozen_dtype(self) -> str:
        """Type of the weights that adapters are trained beside."""
        return self.lora.weights or self.model.dtype

    @property
    def lora_shape(self) -> dict[str, Any]:
        """The settings of ``Lora`` that say what an adapter is, and beside what."""
        names = ("rank", "alpha", "targets", "is_rank_stabilised")
        return {n: getattr(self.lora, n) for n in names} | {"weights": self.frozen_dtype}

    @property
    def run_folder(self) -> str:
        """Where the run is kept."""
        default = f"runs/{self.name}-{section_of(self.objective.name)}-seed{self.run.seed}"
        return self.run.folder or default

    def policy_source(self) -> str:
        """``Model.path``, and the commit that it means where that is known."""
        return _source(self.model.path, self.origin)

    def teacher_source(self) -> str:
        """``Teacher.path``, and the commit that it means where that is known."""
        return _source(self.teacher.path, self.teacher_origin)

    def command(self, module: str, *settings: str, without: str = "") -> str:
        """The shell command that runs ``aspo_jax.MODULE`` with this config and more settings.

        without: settings that begin so are left out; "": none.
        """
        replaced = {setting.partition("=")[0] for setting in settings}
        kept = [s for s in self.settings if s.partition("=")[0].strip() not in replaced]
        kept = [s for s in kept if not without or not s.startswith(without)]
        named = ["--config", self.source] if self.source else []
        return command(module, *named, *(w for s in (*kept, *settings) for w in ("--set", s)))

    def bindings(self) -> dict[str, Any]:
        """Every setting by its gin name, in a fixed order."""
        values = {}
        for name in SECTIONS:
            values |= {
                f"{name}.{field}": value
                for field, value in vars(getattr(self, attribute(name))).items()
                if not field.startswith("__")
            }
        for label, part in self.mixture.items():
            values |= {
                f"Data.{label}.{field}": value
                for field, value in vars(part).items()
                if value != getattr(self.data, field)
            }
        for name in sorted(self.factories):
            values |= {f"{name}.{key}": v for key, v in sorted(self.factories[name].items())}
        return values

    def text(self) -> str:
        """The resolved config as gin text; `parse_config` reads it back to an equal Config."""
        lines, previous = [], ""
        for key, value in self.bindings().items():
            current = key.rpartition(".")[0]
            if previous and current != previous:
                lines.append("")
            lines.append(f"{key} = {value!r}")
            previous = current
        return "\n".join(lines) + "\n"

    def diff(self, old: str) -> str:
        """What changed since the config text ``old``, which may lack newer settings."""
        known = {
            f"{name}.{field}": info for name in SECTIONS for field, info in fields(name).items()
        }
        defaults = {key: info.default for key, info in known.items() if not info.is_required()}
        return diff_text(old, self.text(), defaults)

    def derived(
        self, train_rows: int | None = None, held_out_rows: int | None = None
    ) -> list[tuple[str, str]]:
        """The start-up table: what the sizes amount to.

        train_rows, held_out_rows: rows of the data files, where they have been read.
        """
        train, sampler, saved = self.train, self.sampler, self.checkpoint
        group, rows, tokens = train.samples_per_prompt, train.rows_per_microbatch, train.row_tokens
        minibatches = train.prompts_per_step // train.prompts_per_minibatch
        updates = minibatches * train.epochs
        every = self.evaluate.every
        every = f"every {every} iterations" if every else "before and after"
        rule = " + ".join((self.objective.name, *self.objective.penalties))
        return [
            ("prompts", self._prompts(train_rows)),
            ("policy", self._policy()),
            *([("adapters", self._adapters())] if self.lora.rank else []),
            *([("teacher", self.teacher_source())] if self.teacher.path else []),
            ("objective", f"{rule}, {self.objective.advantage}, {self.objective.aggregate}"),
            ("iterations", f"{train.iterations:,} ({train.iterations * updates:,} updates)"),
            ("sequences per step", _product(train.prompts_per_step, group)),
            *self._refill(),
            ("updates per step", f"{minibatches} minibatches x {train.epochs} epochs = {updates}"),
            ("sequences per update", _product(train.prompts_per_minibatch, group)),
            (
                "sampling",
                f"{sampler.slots:,} at once, prompt <= {sampler.max_prompt_tokens:,}"
                f" + response <= {sampler.max_response_tokens:,} tokens",
            ),
            ("micro-batch", f"{rows:,} rows x {tokens:,} tokens = {rows * tokens:,}"),
            ("evaluation", f"{self._evaluation(held_out_rows)}, {every}"),
            ("checkpoints", f"every {saved.every} iterations, newest {saved.keep} kept"),
        ]

    def _refill(self) -> list[tuple[str, str]]:
        train = self.train
        if not train.refill_rounds:
            return []
        times, one = 1 + train.refill_rounds, train.prompts_per_step * train.samples_per_prompt
        rounds = f"up to {train.refill_rounds} more rounds of {train.prompts_per_step:,} prompts"
        most = f"at most {times} x {one:,} = {times * one:,} sequences"
        return [("refill", f"{rounds}: {most}")]

    @property
    def sources(self) -> Sequence[Data]:
        """Where the prompts come from, one by one."""
        return list(self.mixture.values()) or [self.data]

    @property
    def is_countdown(self) -> bool:
        """Whether every prompt is one of the embedded puzzles."""
        return all(data.source == "countdown" for data in self.sources)

    def _prompts(self, rows: int | None) -> str:
        if not self.is_countdown:
            names = " + ".join(
                str(data.train_path) if data.source == "files" else data.source
                for data in self.sources
            )
            return names if rows is None else f"{names}, {rows:,} rows"
        puzzle = self.countdown
        operations = " ".join(puzzle.operations)
        return f"Countdown, {puzzle.numbers} numbers {puzzle.low}-{puzzle.high}, {operations}"

    def _evaluation(self, rows: int | None) -> str:
        asked = self.evaluate.prompts
        sizes = _product(asked if rows is None else min(asked, rows), self.evaluate.samples)
        if rows is None or rows == asked:
            return sizes
        if rows > asked:
            return (
                f"{sizes}, the first {asked:,} of {rows:,} rows (Evaluate.prompts = {rows} for all)"
            )
        return f"{sizes}, all rows of the file (Evaluate.prompts = {asked} asks for more)"

    def _adapters(self) -> str:
        lora, start = self.lora, f", from {self.lora.path}" if self.lora.path else ""
        kind = "rank-stabilised, " if lora.is_rank_stabilised else ""
        where = "attention and mlp" if lora.targets == "all" else lora.targets
        return (
            f"rank {lora.rank}, alpha {lora.alpha:g}, {kind}in {where}, beside frozen weights in "
            f"{self.frozen_dtype}{start}"
        )

    def _policy(self) -> str:
        if self.model.path:
            return self.policy_source()
        m = self.model
        return (
            f"new Qwen2: width {m.hidden_size}, {m.layers} layers, {m.heads}/{m.kv_heads} heads,"
            f" SwiGLU {m.intermediate_size}, warm-started to avg@k {self.warm_start.target}"
        )


def _source(path: str | None, origin: Origin | None) -> str:
    return f"{path}, commit {origin.commit[:12]}" if origin and origin.commit else str(path)


def _product(prompts: int, samples: int) -> str:
    return f"{prompts:,} prompts x {samples} samples = {prompts * samples:,}"


def command(module: str, *words: str) -> str:
    """The shell command that runs ``aspo_jax.MODULE`` with the interpreter of this process."""
    here = python = Path(sys.executable)
    if shutil.which("python") == sys.executable:
        python = Path("python")
    elif here.is_relative_to(Path.cwd()):
        python = here.relative_to(Path.cwd())
    return join([str(python), "-m", f"aspo_jax.{module}", *words])


def section_of(factory: str) -> str:
    """Where the arguments of a factory are set: my_rules:mine.b -> mine.b"""
    return factory.rpartition(":")[2]


def attribute(name: str) -> str:
    """WarmStart -> warm_start."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


def fields(name: str) -> dict[str, Any]:
    """The settings of a section, or of a labelled one such as Data.a."""
    section, _, label = name.partition(".")
    found = typing.cast(Any, SECTIONS[section]).__pydantic_fields__
    return {n: info for n, info in found.items() if not label or n != "mixture"}
