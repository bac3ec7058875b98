"""The sections of a configuration: every key with its default, type, range and description."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, WithJsonSchema, model_validator
from pydantic.functional_validators import AfterValidator, BeforeValidator

from stackwise_core.config.yaml import parse_value

GROWTH = "training.progressive"
Precision = Literal["full", "half", "bfloat16", "nvfp4", "qlora"]
"""How a stack trains and is stored; nvfp4 and qlora store its weights in 4 bits."""
Mode = Literal["append", "prepend", "insert"]
"""Where a new stack goes: below the head, above the embedding, or below the top stacks of the trunk."""
Objective = Literal["mlm", "clm", "custom"]
"""What is learnt: masked tokens, next tokens, or the targets of the batch."""
GrowthOperator = Literal["copy", "copy_zero", "random", "zero"]
CopiedFrom = Literal["neighbour", "top", "middle", "interleaved", "blend"]
Decay = Literal["cosine", "linear", "sqrt"]
"""How a learning rate falls; sqrt is 1 - sqrt(t), t from 0 to 1."""
Strategy = Literal["frozen", "qlora", "full"]
"""What of existing stacks trains: nothing, their adapters, everything."""
StreamDtype = Literal["bfloat16", "float16", "float32", "int8", "fp8"]
QUANTISED_STREAMS: tuple[StreamDtype, ...] = ("int8", "fp8")
"""Stream types that need channel statistics and a scale per token."""
QUANTISED: tuple[Precision, ...] = ("nvfp4", "qlora")
"""Precisions whose stored weights cannot train; only adapters on them can."""


def _checked(accepts: Callable[[Any], bool], expected: str) -> AfterValidator:
    def check(value: Any) -> Any:
        if not accepts(value):
            raise ValueError(expected)
        return value

    return AfterValidator(check)


def _is_function(value: Any) -> bool:
    return callable(value) or (isinstance(value, str) and value.count(":") == 1)


def _is_steps(value: Any) -> bool:
    return isinstance(value, list) and all(type(step) is int and step >= 0 for step in value)


def _with_integer_keys(value: Any) -> Any:
    """Return a mapping with keys such as "0" as integers: JSON has no other keys, so Prefect's parameters have none."""
    if not isinstance(value, dict):
        return value
    keys = [int(key) if isinstance(key, str) and key.removeprefix("-").isdecimal() else key for key in value]
    if twice := {key for key in keys if keys.count(key) > 1}:
        raise ValueError(f"{twice.pop()} stands there twice, as a number and as text")
    return dict(zip(keys, value.values(), strict=True))


def _are_sources(value: Any) -> Any:
    """Check what `data.source` is, and return it with the weights as floats; forms give a list as text."""
    if isinstance(value, str) and isinstance(listed := parse_value(value) if value[:1] == "[" else None, list):
        value = listed if len(listed) > 1 or any(isinstance(each, dict) for each in listed) else value  # else a glob
    if isinstance(value, str):
        if not value:
            raise ValueError("string should have at least 1 character")
        return value
    if not isinstance(value, list):
        raise ValueError("a path, a glob, stdlib or hf:owner/name is expected, or a list of them")
    if not value:
        raise ValueError("the list is empty; name at least one source")
    entries = [_source_entry(number, each) for number, each in enumerate(value)]
    names = [each if isinstance(each, str) else each["source"] for each in entries]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"{twice!r} stands there twice; name it once, with a weight")
    n_weights = sum(isinstance(each, dict) for each in entries)
    if n_weights not in (0, len(entries)):
        bare = next(each for each in entries if isinstance(each, str))
        raise ValueError(f"{bare!r} has no weight, and another source has one; give all of them weights, or none")
    return entries[0] if len(entries) == 1 and not n_weights else entries


def _source_entry(number: int, given: Any) -> Any:
    if isinstance(given, str) and given:
        return given
    if not isinstance(given, dict) or not isinstance(name := given.get("source"), str) or not name:
        raise ValueError(f"entry {number} is {given!r}; a source is expected, or {{source: ..., weight: ...}}")
    if unknown := next((key for key in given if key not in ("source", "weight")), None):
        raise ValueError(f"entry {number} has the key {unknown!r}; known are source and weight")
    weight = given.get("weight")
    if weight is None:
        return name
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
        raise ValueError(f"entry {number} ({name}) has the weight {weight!r}; a number above 0 is expected")
    return {"source": name, "weight": float(weight)}


Sources = Annotated[Any, AfterValidator(_are_sources), WithJsonSchema({"type": "string", "minLength": 1})]
TimeMapping = Annotated[
    Any,
    _checked(
        lambda value: _is_steps(value) or _is_function(value),
        "a list of time steps, or 'module:name' of a function, is expected",
    ),
    WithJsonSchema({"type": "array", "items": {"type": "integer", "minimum": 0}}),
]
StackTimeMapping = Annotated[
    Any,
    _checked(
        lambda value: value in ("linear", "exponential", "custom") or callable(value),
        "'linear', 'exponential' or 'custom' is expected",
    ),
    WithJsonSchema({"type": "string", "enum": ["linear", "exponential", "custom"]}),
]
CustomLoss = Annotated[
    Any,
    _checked(lambda value: value == "" or _is_function(value), "'module:name' of a function is expected, or nothing"),
    WithJsonSchema({"type": "string"}),
]


FIRST = (
    *("name", "source", "tokenizer", "seq_len", "d_model", "blocks_per_stack"),
    *("steps_per_stack", "batch_size", "learning_rate", "progressive", "target_stacks"),
)
"""The ten keys that people change first, and the section of the last: a form begins every section with its own."""


def _as_form(schema: dict[str, Any]) -> None:
    """Order the fields of Prefect's form, and call them what they are called in a file."""
    for number, (name, field) in enumerate(schema.get("properties", {}).items()):
        field["title"], field["position"] = name, FIRST.index(name) if name in FIRST else len(FIRST) + number


class Section(BaseModel):
    """A section of the configuration. Unknown keys and wrong types are errors, also on assignment."""

    model_config = ConfigDict(
        extra="forbid",
        validate_assignment=True,
        strict=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        validate_by_name=True,
        validate_by_alias=True,
        serialize_by_alias=True,
        json_schema_extra=_as_form,
    )


class RunConfig(Section):
    """What this run is called and the one seed that everything random derives from."""

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """Name of the run: letters, digits, '.', '_' and '-'. Changes no result."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seed of initialisation, masks and order."""


class DataConfig(Section):
    """The corpus and how it is cut into sequences."""

    source: Sources = "stdlib"
    """'stdlib' (the running Python's library), path or glob of text, jsonl, parquet, .bin files, or 'hf:owner/name'; or
    a list of them, each a name or {source, weight}: the share of the training sequences, by default that of its size.
    """
    tokenizer: str = Field(default="byte", min_length=1)
    """'byte' (256 bytes, [MASK], [PAD], [END]), or the path of a tokenizer.json."""
    end_token: str = ""
    """The token of the tokenizer.json that ends a document, such as <|end_of_text|>; empty takes the eos_token of the
    tokenizer_config.json beside it, else a known name."""
    documents: Literal["concat", "separate"] = "concat"
    """One after the other in a sequence, or kept apart: none sees another, and each begins at position 0, with the
    tokenizer's begin token if it has one."""
    token_type: Literal["auto", "uint16", "uint32"] = "auto"
    """Integers of a .bin; auto is what its header says, else uint16."""
    seq_len: int = Field(default=128, ge=8, le=131072)
    """Length of a sequence [tokens]."""
    max_sequences: int = Field(default=0, ge=0)
    """At most this many training sequences; 0 takes all."""
    sample: Literal["spread", "first"] = "spread"
    """Which of them: spread over the corpus, beside the same share of the validation sequences, or the first."""
    rows: Literal["shared", "fresh"] = "shared"
    """Every stage reads the training order from its beginning, or goes on where the one before stopped."""
    validation_fraction: float = Field(default=0.05, gt=0.0, lt=0.5)
    """Fraction of the corpus held out for validation."""


class RopeScaling(BaseModel, frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True):
    """How the rotary positions of a model were stretched to a longer context; the keys are those of transformers."""

    kind: Literal["none", "linear", "llama3", "yarn"] = "none"
    """Not at all, or every frequency is divided by the factor (linear), or only the low ones are (llama3, yarn)."""
    factor: float = Field(default=1.0, ge=1.0, le=1e6)
    """How much longer the context became."""
    original_max_position_embeddings: int = Field(default=8192, ge=1, le=2**31)
    """llama3, yarn: the context before [tokens]."""
    low_freq_factor: float = Field(default=1.0, gt=0.0)
    """llama3: a low frequency turns less often than this in that context."""
    high_freq_factor: float = Field(default=4.0, gt=0.0)
    """llama3: a high one, which stays, turns more often than this."""
    beta_fast: float = Field(default=32.0, gt=0.0)
    """yarn: a high frequency, which stays, turns more often than this in that context."""
    beta_slow: float = Field(default=1.0, gt=0.0)
    """yarn: a low one turns less often than this."""
    attention_factor: float = Field(default=0.0, ge=0.0)
    """yarn: multiplies cosines and sines; 0 means 0.1 ln(factor) + 1."""
    truncate: bool = True
    """yarn: begin and end the transition between the two at whole channels."""

    @model_validator(mode="after")
    def _has_a_transition(self) -> Self:
        if self.kind == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(f"low_freq_factor must be below high_freq_factor = {self.high_freq_factor}")
        if self.kind == "yarn" and self.beta_slow >= self.beta_fast:
            raise ValueError(f"beta_slow must be below beta_fast = {self.beta_fast}")
        return self


class ModelConfig(Section):
    """The shape of a block, shared by every stack (Llama: RMSNorm, RoPE, GQA, SwiGLU)."""

    vocab_size: Annotated[int, _checked(lambda value: value != 1, "0, or at least 2, is expected")] = Field(
        default=0, ge=0, le=2**24
    )
    """Rows of the embedding [tokens]; 0 means what the tokenizer has, rounded up to 64 (byte: 264)."""
    d_model: int = Field(default=128, ge=8, le=2**17)
    """Width of the residual stream [channels]."""
    n_heads: int = Field(default=4, ge=1)
    """Attention heads; d_model / n_heads must be even."""
    n_kv_heads: int = Field(default=0, ge=0)
    """Key and value heads (grouped-query attention); 0 means n_heads."""
    head_dim: int = Field(default=0, ge=0, le=2**14)
    """Channels of a head, an even number; 0 means d_model / n_heads."""
    qkv_bias: bool = False
    """Add biases to queries, keys and values, as Qwen2 does."""
    qk_norm: bool = False
    """Normalise every head of queries and keys before its rotation, as Qwen3 does."""
    norm_outputs: bool = False
    """Norms on the outputs of attention and feed-forward instead of their inputs, as in OLMo2; qk_norm then normalises
    all heads at once."""
    no_rope_interval: int = Field(default=0, ge=0, le=2**16)
    """In a stack that begins at random, each n-th block has no RoPE, as in SmolLM3; one that is a copy has it where
    the copied block has it. 0: all blocks have RoPE."""
    d_ff: int = Field(default=0, ge=0, le=2**20)
    """Inner width of the feed-forward [channels]; 0 means 8/3 d_model rounded up to 32."""
    blocks_per_stack: int = Field(default=2, ge=1, le=128)
    """Transformer blocks in a stack."""
    residual_scale: Literal["one", "depth"] = "one"
    """What attention and feed-forward are multiplied by before they are added to the stream: one, or 1 / sqrt(2 L) for
    the L blocks of the deepest rack, so that the stream of a deep rack grows no further than that of a shallow one."""
    residual_blocks: int = Field(default=0, ge=0, le=2**17)
    """The L of `residual_scale: depth`; 0 means the blocks of training.progressive.max_stacks stacks."""
    tie_embeddings: bool = True
    """Tie head and embedding in the first stage; afterwards the head is its own tensor."""
    rope_theta: float = Field(default=10000.0, gt=1.0)
    """Base of the rotary position frequencies."""
    rope_scaling: RopeScaling = Field(default_factory=RopeScaling)
    """How these were stretched to a longer context."""
    norm_eps: float = Field(default=1e-5, gt=0.0, lt=1e-1)
    """Epsilon inside RMSNorm."""
    attention: Literal["auto", "causal", "bidirectional"] = "auto"
    """Who sees whom; auto is bidirectional for mlm and causal otherwise."""
    from_: str = Field(default="", alias="from")
    """Folder of a saved rack, or the name of an imported run, that the run grows on; its shape then need not be given,
    nor the tokenizer of an imported one. Empty starts from nothing."""


class LoraOverride(Section):
    """Rank and alpha of one stack's adapter, for the variable strategy."""

    rank: int = Field(ge=1)
    """Rank of the adapter."""
    alpha: float = Field(gt=0.0)
    """Scale numerator: the adapter's output is multiplied by alpha / rank."""


class StackOverride(Section):
    """What one stack, in creation order, does differently; 0 or 'default' keeps the common value."""

    n_blocks: int = Field(default=0, ge=0, le=128)
    """Blocks in this stack; 0 means model.blocks_per_stack."""
    precision: Literal["default", "full", "half", "bfloat16", "nvfp4", "qlora"] = "default"
    """Precision of this stack."""
    mode: Literal["default", "append", "prepend", "insert"] = "default"
    """Where this stack is added."""
    tail_stacks: int = Field(default=0, ge=0, le=1024, exclude_if=lambda value: not value)
    """insert: the stacks above this one; 0 means training.progressive.tail_stacks."""
    steps: int = Field(default=0, ge=0)
    """Optimizer steps of this stack's stage; 0 means training.steps_per_stack."""


class ProgressiveConfig(Section):
    """How the rack grows."""

    enabled: bool = True
    """Grow stack by stack; false trains the target rack whole, in one joint stage."""
    max_stacks: int = Field(default=12, ge=1, le=1024)
    """The most stacks this rack may ever have; time-as-depth spreads its steps over them."""
    target_stacks: int = Field(default=3, ge=1, le=1024)
    """Stacks to reach now; raise it later to continue."""
    building_mode: Mode = "append"
    """Add new stacks at the end (append), between embeddings and trunk (prepend), or below the tail (insert)."""
    tail_stacks: int = Field(default=1, ge=1, le=1024)
    """insert: how many of the top stacks are the tail, which stays above the new stack; at most all."""
    tail_strategy: Strategy = "full"
    """insert: what of the tail trains with the new stack: nothing, adapters, or everything, also the head; of quantised
    stacks also then only the adapters."""
    trunk_strategy: Strategy = "frozen"
    """What of the existing stacks trains: nothing, their adapters (which qlora gives to those that have none),
    everything; after an insert, of those below the new one."""
    trunk_trainable_top: int = Field(default=0, ge=0)
    """With qlora: only the top n trunk stacks' adapters train; 0 means all."""
    train_head: bool = True
    """Train final norm and head with a stack that is appended, or inserted below a tail in full; false keeps those of
    the first stage or of the imported model, which spares a large vocabulary its gradients and moments."""
    new_stack_precision: Precision = "full"
    """Training and storage precision of a new stack."""
    cache_activations: bool = True
    """Cache the frozen trunk's output; false recomputes it. Changes time, not results."""
    training_objective: Objective = "mlm"
    """Masked, causal or custom targets."""
    qlora_enabled: bool = False
    """Give every stack a 'stack' adapter at creation."""
    qlora_rank: int = Field(default=16, ge=1)
    """Rank of the stack adapter."""
    qlora_alpha: float = Field(default=32.0, gt=0.0, le=1e6)
    """Alpha of the stack adapter."""
    qlora_strategy: Literal["simplified", "progressive", "variable"] = "simplified"
    """The same rank everywhere, by pattern, or per stack from qlora_configs."""
    qlora_rank_pattern: Literal["constant", "increasing", "decreasing", "linear"] = "constant"
    """Progressive strategy: rank over the creation index."""
    qlora_alpha_pattern: Literal["constant", "increasing", "decreasing", "linear"] = "constant"
    """Progressive strategy: alpha over the creation index."""
    qlora_configs: Annotated[dict[int, LoraOverride], BeforeValidator(_with_integer_keys)] = Field(default_factory=dict)
    """Variable strategy: {creation index: {rank, alpha}}."""
    progressive_qlora: bool = False
    """At growth, give every trunk stack without one a smaller 'progressive' adapter."""
    progressive_qlora_rank: int = Field(default=8, ge=1)
    """Rank of the progressive adapter."""
    progressive_qlora_alpha: float = Field(default=16.0, gt=0.0, le=1e6)
    """Alpha of the progressive adapter."""
    time_interpretation: Literal["none", "input", "depth"] = "none"
    """Diffusion time: none, an input, or the depth itself."""
    time_embedding_dim: int = Field(default=64, ge=2)
    """Width of the time embedding [channels]; projected if it differs from d_model."""
    time_encoding_type: Literal["sinusoidal", "learned"] = "sinusoidal"
    """How a time step is embedded."""
    stack_time_mapping: StackTimeMapping = "linear"
    """Which time step a stack of time-as-depth has; in the library also a function, as time_mapping."""
    stack_time_span: Literal["point", "interval"] = "point"
    """mlm: a stack trains at the mask ratio of its time step, or at all ratios that are nearer to its own than to those
    of its neighbours, and some beyond; each sequence draws one."""
    time_mapping: TimeMapping = Field(default_factory=list)
    """Custom mapping: the time step of each stack in creation order, or 'module:name'."""
    time_per_stack: int = Field(default=1, ge=1, le=2**20)
    """Linear mapping: time steps between neighbouring stacks."""
    num_time_steps: int = Field(default=0, ge=0, le=2**20)
    """Time steps in all; 0 means as many as mask_ratio_table has ratios, or else 1,000 with time as an input, and with
    depth max_stacks * time_per_stack, or what exponential steps need."""
    stacks: list[StackOverride] = Field(default_factory=list)
    """Per-stack overrides {n_blocks, precision, mode, tail_stacks, steps} in creation order; precision and mode are as
    new_stack_precision and building_mode."""


class TrainingConfig(Section):
    """Optimisation of one stage."""

    batch_size: int = Field(default=32, ge=1, le=2**24)
    """Sequences in one optimizer step; at most data.max_sequences."""
    accumulation_steps: int = Field(default=1, ge=1)
    """Parts a batch is computed in, one after the other; at most batch_size."""
    steps_per_stack: int = Field(default=200, ge=1, le=2**32)
    """Optimizer steps of a stage."""
    learning_rate: float = Field(default=2e-3, gt=0.0)
    """Peak learning rate of AdamW."""
    optimizer: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    """AdamW for everything; the same with the moments of large matrices in 8 bits; or Muon for the matrices of stacks
    that train in full, and AdamW for the rest."""
    muon_learning_rate: float = Field(default=0.0, ge=0.0)
    """Peak learning rate of Muon, whose steps are scaled to the size of AdamW's; 0 means learning_rate."""
    min_learning_rate: float = Field(default=2e-4, ge=0.0)
    """Learning rate at the end of the decay; at most the peak."""
    adapter_learning_rate: float = Field(default=1e-3, gt=0.0)
    """Peak learning rate of LoRA adapters."""
    warmup_steps: int = Field(default=20, ge=0)
    """Steps of linear warm-up, at the start of every stage or of the clock; at most those of the stage."""
    schedule: Literal["per_stage", "one_clock"] = "per_stage"
    """Every stage warms up and decays, or the run does so once: its rate stays at the peak until the joint anneal, or
    else until the end of the last stage."""
    decay: Decay = "cosine"
    """How the rate falls from the peak to min_learning_rate."""
    decay_steps: int = Field(default=0, ge=0)
    """With `schedule: one_clock`, in how many of the last steps the rate falls; 0 means all of the joint anneal, or
    else a fifth of the run's."""
    optimizer_state: Literal["reset", "keep"] = "reset"
    """Every stage begins with a fresh optimizer, or what trained in the stage right before keeps moments and step
    count."""
    new_state: Literal["zero", "copy"] = "zero"
    """With `optimizer_state: keep` a new stack begins with zeros, or a copy with the moments of its source, if that
    trained in the stage right before."""
    weight_decay: float = Field(default=0.1, ge=0.0)
    """AdamW weight decay of matrices; none on norms and embeddings."""
    beta1: float = Field(default=0.9, ge=0.0, lt=1.0)
    """AdamW first-moment decay."""
    beta2: float = Field(default=0.95, ge=0.0, lt=1.0)
    """AdamW second-moment decay."""
    gradient_clip: float = Field(default=1.0, ge=0.0)
    """Largest global gradient norm; 0 does not clip."""
    new_stack_init: Literal["auto", "copy", "copy_zero", "random", "zero"] = "auto"
    """Growth operator; auto is copy, or copy_zero on an imported model and below stacks and a head that stay."""
    new_stack_source: CopiedFrom = "neighbour"
    """What is copied: the stack below (else above), the top or middle stack, the neighbour with each of its blocks
    repeated in a row, or the mean of the stacks below and above."""
    new_stack_noise: float = Field(default=0.0, ge=0.0, le=1.0)
    """Share of random weights in a copy: (1 - noise) W + noise * random."""
    new_stack_output_scale: float = Field(default=1.0, ge=0.0, le=1.0)
    """Multiplies what each half of a block ends with; 0 is copy_zero, or zero if random. Where it is not 1, auto is a
    copy."""
    residual_warmup_steps: int = Field(default=0, ge=0)
    """Steps at the start of a stage in which what the new stack adds to the stream rises evenly from nothing to all of
    it; at most those of the stage. The first step has the loss of the trunk alone; the finished stack
    adds all of it."""
    joint_steps: int = Field(default=0, ge=0)
    """Steps of the joint anneal after the last stage."""
    joint_learning_rate: float = Field(default=1e-3, gt=0.0)
    """Peak learning rate of the joint anneal."""
    checkpoint_every: int = Field(default=50, ge=0)
    """Steps between checkpoints inside a stage; 0 makes none by steps. Changes no result."""
    checkpoint_minutes: float = Field(default=0.0, ge=0.0)
    """Minutes after a checkpoint when the next is made, whatever its step; 0 makes none by time. Changes no result."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass, keeping only those between blocks. Changes no result."""
    mask_ratio: float = Field(default=0.15, gt=0.0, le=1.0)
    """mlm without time: the probability that a position is masked."""
    mask_ratio_min: float = Field(default=0.15, gt=0.0, le=1.0)
    """Mask ratio of time step 0."""
    mask_ratio_max: float = Field(default=0.90, gt=0.0, le=1.0)
    """Mask ratio of the last time step."""
    mask_ratio_table: list[Annotated[float, Field(gt=0.0, le=1.0)]] = Field(default_factory=list)
    """Mask ratio of every time step; empty interpolates from min to max."""
    corruption: Literal["bert", "mask"] = "bert"
    """Masked inputs become [MASK] / random / kept at 80/10/10 %, or all [MASK]."""
    loss_weighting: Literal["mean", "elbo"] = "mean"
    """Mean over loss positions, or the diffusion bound's weights."""
    time_sampling: Literal["per_batch", "per_sequence", "stratified"] = "per_batch"
    """How time-as-input draws its steps."""
    shuffle_block: int = Field(default=0, ge=0, le=2**31)
    """0 shuffles all sequences; n keeps blocks of n together and mixes 16 at a time: for caches in an object store."""
    custom_loss: CustomLoss = ""
    """Custom objective: 'module:name' of loss(logits [P, V], targets [P]) -> [P], for P loss positions and a vocabulary
    of V tokens; empty means cross-entropy."""
    progressive: ProgressiveConfig = Field(default_factory=ProgressiveConfig)
    """How the rack grows."""


class CacheConfig(Section):
    """The store of trunk activations."""

    dtype: StreamDtype = "bfloat16"
    """Type of the stored stream, and of the frozen trunk's stream when it is live."""
    views: int = Field(default=0, ge=0, le=1024)
    """mlm: mask draws per sequence; 0 means 8. Without masks there is one."""
    max_gb: float = Field(default=50.0, gt=0.0)
    """Most bytes of one store [GiB]; more is refused before anything is written."""
    keep: Literal["last", "all"] = "last"
    """Keep only the newest boundary, or every one."""
    mode: Literal["always", "auto"] = "always"
    """Cache whatever may be cached, or only what pays."""
    fill_workers: int = Field(default=1, ge=1, le=1024)
    """Workers that fill one store together, each with hardware.threads of its own. Changes no result."""
    task_runner: Literal["threads", "processes", "dask", "ray"] = "threads"
    """What runs several fill_workers; dask and ray are extras, and reach other machines."""


class HardwareConfig(Section):
    """Where it runs. Recorded with every artifact, never part of an id."""

    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d{1,3})?)$")
    """'auto', 'cpu', 'cuda' or 'cuda:N'."""
    compile: bool = False
    """Run the blocks of the stacks that train through torch.compile; where it does not work, as they are."""
    deterministic: bool = True
    """With CUDA, use only kernels that give the same bits every time. False may be faster, but a run that is killed and
    resumed may then end with other bits. A CPU always gives the same bits."""
    nodes: int = Field(default=1, ge=1, le=1024)
    """Machines that train a stage together, each with `processes` of them: the run is on one, and `stackwise join` on
    the others."""
    processes: int = Field(default=1, ge=1)
    """Processes of each machine that train one stage together: each has a share of every batch, of the threads, and
    with CUDA a device of its own."""
    rendezvous: str = Field(default="", pattern=r"^$|^(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]{1,253}):[0-9]{1,5}$")
    """HOST:PORT of the first node, as the others reach it; needed with more than one."""
    shard: Literal["auto", "never", "always"] = "auto"
    """Whether each of several processes holds a share of what a stage trains, of its gradients and of the optimizer's
    state, or all of it: auto shares out joint training, and a growth stage that would not fit the device otherwise."""
    threads: int = Field(default=0, ge=0, le=1024)
    """CPU threads of torch; 0 means as many as this process may use."""
    tf32: bool = False
    """With CUDA, round what enters float32 matrix products to TF32, 10 bits of mantissa instead of 23: faster for
    stacks of precision full."""

    @property
    def ranks(self) -> int:
        """All processes that train a stage together."""
        return self.nodes * self.processes

    def shards(self, *, joint: bool) -> bool:
        """Return whether processes share out what a stage trains, however large it is."""
        return self.ranks > 1 and (self.shard == "always" or (self.shard == "auto" and joint))


class ValidationConfig(Section):
    """How a stage is judged."""

    max_sequences: int = Field(default=256, ge=1)
    """At most this many validation sequences."""
    sampled_rows: int = Field(default=16, ge=1, le=2**20)
    """Rows of a cache that are derived again from tokens and compared."""
    every: int = Field(default=0, ge=0, le=2**32)
    """Steps between validations inside a stage; 0 makes none before its end. They take time and change no result."""
    cooldown_steps: int = Field(default=0, ge=0, le=2**32)
    """one_clock: a stage that ends at the peak rate is also judged after this many further steps, in which the rate
    decays, and which are thrown away."""
    patience: int = Field(default=0, ge=0, le=2**32)
    """A stage ends when this many validations inside it, in a row, have brought no lower loss; 0 never ends one early.
    With one_clock the stage in which the rate decays has all its steps."""
    keep: Literal["last", "best"] = "last"
    """Keep the last weights of a stage, or those of the lowest loss among its validations; best also validates after
    the last step."""


TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio"]


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) and value[:1] != "[" else value


class TrackingConfig(Section):
    """Trackers of experiments that get the curves of a run while it trains; never part of an id."""

    to: Annotated[list[TrackerName], BeforeValidator(_as_list)] = Field(default_factory=list)
    """Where the curves of a run go as well; `tracking: wandb` is short for it. Changes no result."""
    project: str = Field(default="stackwise", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """The project (wandb, trackio), experiment (mlflow) or folder (tensorboard) that the run is in."""

    @model_validator(mode="before")
    @classmethod
    def _from_names(cls, value: Any) -> Any:
        return {"to": value} if isinstance(value, (str, list)) else value


class AdapterSpec(BaseModel, frozen=True, extra="forbid"):
    """A LoRA adapter, whose output is multiplied by alpha / rank. Enters ids unchanged."""

    rank: int
    """At most d_model, the widest that a layer can use; a narrower layer has the rank of its narrowest side."""
    alpha: float


@dataclass(frozen=True)
class StackSettings:
    """How one stack is built, and how long its stage trains."""

    n_blocks: int
    precision: Precision
    mode: Mode
    steps: int
    adapter: AdapterSpec | None
    """Its 'stack' adapter. A stack of precision qlora always has one, since NF4 alone could not train."""
    progressive: AdapterSpec | None = None
    """Its 'progressive' adapter, if it was adopted with one; others get theirs at growth."""
    imported: bool = False
    """Whether it is part of an imported model."""
    tail_stacks: int = 1
    """insert: the stacks that stay above it, if there are as many."""

    def above(self, n_stacks: int) -> int:
        """Return how many of the stacks that are there stay above this one."""
        if self.mode == "insert":
            return min(self.tail_stacks, n_stacks)
        return n_stacks if self.mode == "prepend" else 0


class ConfigSchema(Section):
    """All sections, with types and ranges but without the rules between fields: see `StackWiseConfig`."""

    run: RunConfig = Field(default_factory=RunConfig)
    """Name and seed."""
    data: DataConfig = Field(default_factory=DataConfig)
    """Corpus and sequences."""
    model: ModelConfig = Field(default_factory=ModelConfig)
    """Shape of the blocks."""
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    """Optimisation and growth."""
    cache: CacheConfig = Field(default_factory=CacheConfig)
    """Activation store."""
    hardware: HardwareConfig = Field(default_factory=HardwareConfig)
    """Device, threads, processes."""
    validation: ValidationConfig = Field(default_factory=ValidationConfig)
    """Validation loss and cache checks."""
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)
    """Curves in trackers of experiments."""
    _adopted: tuple[StackSettings, ...] = PrivateAttr(())

    @property
    def adopted(self) -> tuple[StackSettings, ...]:
        """The stacks of the rack that `model.from` names, once it has been read: the keys do not describe them."""
        return self._adopted

    def adopting(self, stacks: tuple[StackSettings, ...]) -> Self:
        """Return a copy whose first stacks are these."""
        copied = self.model_copy(deep=True)
        copied._adopted = stacks
        return copied
