"""Settings of the stages, one section each.

One field is the YAML key, the command-line flag and the documentation at once.
"""

from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

from ..data.cache.codecs import CodecName


def from_percentage(value: Any) -> Any:
    """`0.5%` as 0.005; anything else as it is."""
    if not (isinstance(value, str) and value.endswith("%")):
        return value
    try:
        return float(value[:-1]) / 100
    except ValueError:
        return value


Count = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
BlockSize = Annotated[int, Field(ge=2, le=255)]
Branches = Annotated[int, Field(ge=0, le=64)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Share = Annotated[float, BeforeValidator(from_percentage), Field(ge=0, le=1)]
Ratio = Annotated[float, Field(gt=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Base of all sections: frozen, and an unknown key is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=False, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_for_number(cls, value: Any, info: ValidationInfo) -> Any:
        types = plain_types(cls.model_fields[str(info.field_name)].annotation)
        values = value if isinstance(value, list | tuple) else [value]
        if bool not in types and any(isinstance(item, bool) for item in values):
            raise ValueError("a value other than true and false")
        return value


class ExtractConfig(Section):
    """`extract`: prompts through the target, its hidden states into the cache."""

    mode: Literal["generate", "given"] = "generate"
    """Whether the target answers the prompts, or the records already hold the answers."""
    engine: Literal["vllm", "transformers"] = "vllm"
    """What runs the target."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What the target computes in; auto = the target's own. States are always stored as bfloat16."""
    num_draft_layers: Count = 5
    """Number of context layers, chosen by DFlash's layer rule; >= 1."""
    layer_ids: Annotated[list[NonNegative], Field(min_length=1)] | None = None
    """Context layers, in place of the rule's; id i = output of 0-based target layer i; distinct, >= 0."""
    max_len: Count = 3072
    """Longest sequence, in tokens of prompt and response together; >= 1."""
    max_new_tokens: Count = 2048
    """Longest answer, in tokens per assistant turn; >= 1."""
    temperature: NonNegativeFloat = 0.0
    """Sampling temperature; >= 0. 0 = greedy, which replay needs."""
    top_p: Ratio = 1.0
    """Probability mass of the tokens sampled from; in (0, 1]."""
    top_k: NonNegative = 0
    """Number of tokens sampled from; >= 0, 0 = off."""
    seed: NonNegative = 0
    """Seed of sampling; >= 0."""
    chat_template: str | None = None
    """Jinja file of the chat template; none = the tokenizer's own."""
    template_args: dict[str, Any] = {}
    """Arguments of the chat template, such as `enable_thinking: false`."""
    adapter: str | None = None
    """Folder of a LoRA adapter of the target, in peft's form; none = the target as it is."""
    skip_bad: bool = False
    """Leave out records that can't be used, and count them, in place of stopping at the first."""
    limit: Count | None = None
    """Number of records to take, from the start or in the order of `shuffle_seed`; >= 1, none = all."""
    shuffle_seed: NonNegative | None = None
    """Seed of the records' order, so that `limit` takes a random share of them; >= 0, none = as they are read."""
    duplicates: Literal["auto", "keep", "drop"] = "auto"
    """Whether a record whose content came before counts; auto = with sampling alone, as its answer is another."""
    split: str = "train"
    """Split of data sets of the hub (`hf://NAME`)."""
    subset: str | None = None
    """Subset of those data sets; none = their only one."""
    columns: dict[str, str] = {}
    """What keys of a record are called in the data, such as `prompt: question, response: answer`."""
    thinking: Literal["keep", "mask", "drop"] = "keep"
    """What becomes of a reasoning model's thinking: trained on, not supervised, or left out of given answers."""
    thinking_marks: tuple[str, str] = ("<think>", "</think>")
    """The two tokens around it."""
    codec: CodecName = "raw"
    """How the hidden states are stored."""
    response_tokens: Count | None = None
    """Expected mean length of an answer, in tokens, to tell what will be written; >= 1, none = as long as may be."""
    fill_disk: bool = False
    """Start even if the disk may not hold what is going to be written."""
    part_mib: Count = 1024
    """Size of a part of the cache, in MiB; >= 1."""
    max_in_flight: Count = 256
    """Requests in the engine or waiting for the writer, which bounds memory; >= 1."""
    unit_records: Count = 256
    """Records of a work unit, which one worker does; >= 1."""
    lease_seconds: PositiveFloat = 120.0
    """Seconds without a sign of life after which a worker of another host counts as dead; > 0."""
    stop_seconds: PositiveFloat = 120.0
    """Seconds that sequences in the engine have to finish after a signal to stop; > 0."""
    max_quarantined: Share = 0.01
    """Share of the sequences that may go into quarantine before the run ends with an error; in [0, 1]."""
    audit: Share = 0.005
    """Share of the sequences that go through the engine once more after a run, to compare states; in [0, 1]."""
    engine_args: dict[str, Any] = {}
    """Arguments passed to the engine as they are."""

    @field_validator("layer_ids")
    @classmethod
    def _distinct(cls, value: list[int] | None) -> list[int] | None:
        if value is not None and len(set(value)) < len(value):
            raise ValueError("distinct layer ids")
        return value


class ReadConfig(Section):
    """`read`: how a cache is read."""

    verify: Literal["first-epoch", "always", "never"] = "first-epoch"
    """When checksums are verified as training reads; all else always verifies them."""
    num_threads: Count = 2
    """Threads that read ahead; >= 1."""
    num_buffers: Annotated[int, Field(ge=2)] = 4
    """Sequences in memory, the one in use included; >= 2."""
    local_parts: str | None = None
    """Folder that keeps parts of a remote cache on the local disk; none = every read is a request."""
    local_gib: PositiveFloat = 100.0
    """Size of that folder, in GiB, beyond which the parts not used for longest are removed; > 0."""


class EstimateConfig(Section):
    """`estimate`: what an extraction and a training run will take."""

    sample: Count | None = None
    """Number of records to tokenize, evenly chosen; the rest is taken to be alike; >= 1, none = all."""
    num_sequences: Count | None = None
    """Number of sequences that the records stand for; >= 1, none = one each."""
    tflops: PositiveFloat = 989.0
    """Peak of a training GPU in bf16, in TFLOPS; > 0. An H100 or H200 has 989."""
    utilisation: Ratio | None = None
    """Share of that peak which training reaches; in (0, 1], none = unknown. `make bench` measures it on a GPU."""
    tokens_per_second: PositiveFloat | None = None
    """Rate of the extraction; > 0, none = as piloted, else unknown."""
    pilot: NonNegative = 0
    """Number of records to extract for real, for the rate, the length of answers and the size of each codec; >= 0.

    With fewer than the engine runs at once, the rate comes out too low.
    """


class DraftConfig(Section):
    """`draft`: first drafts and their boundaries over an existing cache."""

    stride: Count = 1
    """Draft at every stride-th supervised anchor; >= 1."""
    anchors_per_pass: Count = 256
    """Blocks drafted in one forward pass; >= 1."""
    device: str = "auto"
    """Torch device; auto = a GPU where there is one."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """What the first drafter computes in; auto = bfloat16 on a GPU, float32 on a CPU."""


class DrafterSection(Section):
    """`drafter`: shape of the drafter that is trained."""

    num_layers: Count = 5
    """Number of decoder layers; >= 1."""
    block_size: BlockSize = 16
    """Block positions, the anchor included (gamma); in 2..255."""
    mask_token_id: NonNegative | None = None
    """Id of the mask token; >= 0, none = chosen from the first drafter or the tokenizer."""
    num_attention_heads: Count | None = None
    """Number of query heads; >= 1, none = the target's."""
    num_key_value_heads: Count | None = None
    """Number of key and value heads; >= 1, none = the target's."""
    head_dim: Count | None = None
    """Width of a head; >= 1, none = the target's."""
    intermediate_size: Count | None = None
    """Width of the MLP; >= 1, none = the target's."""
    rope_theta: PositiveFloat | None = None
    """Base of RoPE; > 0, none = the target's."""


PolicyName = Literal["paper", "exclude", "runner-up", "reranked"]
PlainSampler = Literal["geometric", "visible-geometric", "boundary", "past-boundary", "posterior", "topk"]


class PrefixConfig(Section):
    """`train.prefix`: how many tokens after the anchor a training block shows."""

    sampler: Literal[PlainSampler, "mixture"] = "posterior"
    """Where prefix lengths come from.

    geometric: Eq. 6 of arXiv 2606.04446 over 0..gamma-2; visible-geometric: the public code's rule, which never
    draws 0; boundary: the accept length L of the first draft at the anchor; past-boundary: L + 1; posterior: where
    the first drafter believes it fails; topk: the branches that decoding launches; mixture: several of these.
    """
    beta: Ratio = 0.9
    """Ratio of the geometric prior over prefix lengths (Eq. 6); in (0, 1]."""
    k: Count = 4
    """Branches among which `topk` chooses; >= 1."""
    mixture: dict[PlainSampler, PositiveFloat] = {"past-boundary": 0.7, "geometric": 0.3}
    """Weights of the samplers in `mixture`; each > 0, in proportion to their sum."""
    floor: Share = 0.0
    """Share of `mixture` that is spread evenly over all prefix lengths; in [0, 1]."""

    @field_validator("mixture")
    @classmethod
    def _some(cls, value: dict[str, float]) -> dict[str, float]:
        if not value:
            raise ValueError("the weight of at least one sampler")
        return value


class AnchorConfig(Section):
    """`train.anchor`: at which tokens of a sequence training blocks start."""

    sampler: Literal["uniform", "chain", "failure"] = "uniform"
    """uniform: all alike; chain: those that decoding with the first draft visits; failure: rather those where the
    first draft stops early."""
    uniform_share: BelowOne = 0.3
    """Share of `chain` anchors that are drawn from the others, uniformly; in [0, 1)."""
    failure_power: PositiveFloat = 1.0
    """`failure` weighs an anchor with (accept length + 1)^-failure_power; > 0."""


class TrainConfig(Section):
    """`train`: one training run from a cache."""

    objective: Literal["dflash", "vp"] = "vp"
    """What is trained: a first drafter (dflash) or a VP-Drafter (vp)."""
    prefix: PrefixConfig = PrefixConfig()
    """Prefix lengths of the training blocks; read by the vp objective alone."""
    anchor: AnchorConfig = AnchorConfig()
    """Anchors of the training blocks."""
    first_drafter: str | None = None
    """Folder or hub id of the first drafter, or fingerprint of its drafts in the cache; none = the only one there."""
    num_anchors: Count = 512
    """Blocks drawn per sequence and visit; >= 1."""
    tau: PositiveFloat = 7.0
    """Decay length of the loss weights, in block positions (Eq. 7); > 0."""
    normalise: Literal["block", "batch"] = "block"
    """What the weighted loss is divided by: each block's weights (the paper) or the batch's (public code)."""
    visible: Literal["recorded", "first-draft"] = "recorded"
    """Tokens of visible prefixes: the recorded ones, or the first draft's, which differ past the boundary."""
    labels: Literal["recorded", "argmax"] = "recorded"
    """What a block must predict: the recorded tokens or the target's argmax."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """AdamW for all weights, or Muon for the matrices and AdamW for the rest."""
    lr: PositiveFloat = 6e-4
    """Peak learning rate; > 0. Muon's steps are scaled to need the same as AdamW's."""
    weight_decay: NonNegativeFloat = 0.0
    """Weight decay of the matrices; >= 0. Norms have none."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.95)
    """Two decay rates of AdamW's moments; each in [0, 1)."""
    ema: BelowOne = 0.0
    """Decay of a moving average of the weights, which checkpoints then hold; in [0, 1), 0 = off."""
    clip: PositiveFloat = 1.0
    """Largest gradient norm; > 0."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Course of the learning rate after warm-up."""
    warmup: Share = 0.04
    """Share of all steps in which the learning rate rises; in [0, 1]."""
    epochs: PositiveFloat = 6.0
    """Visits to every training sequence; > 0."""
    max_steps: Count | None = None
    """Number of optimizer steps, in place of epochs; >= 1."""
    batch_tokens: Count = 32768
    """Context tokens per optimizer step, over all processes; >= 1. A step takes whole sequences."""
    tokens_per_pass: Count = 65536
    """Context tokens and block positions that one forward pass takes, which bounds memory; >= 1.

    A sequence that has more gets a pass of its own.
    """
    max_len: Count = 3072
    """Tokens of a sequence that are read, from its start; >= 1."""
    holdout: BelowOne = 0.05
    """Share of sequences kept from training, chosen by hash of their id; in [0, 1)."""
    seed: NonNegative = 0
    """Seed of initial weights, order, anchors and prefix lengths; >= 0."""
    precision: Literal["auto", "float32", "bf16"] = "auto"
    """What the forward pass computes in; auto = bf16 on a GPU that has it. Weights are float32."""
    attention: Literal["auto", "eager", "structured", "flex"] = "auto"
    """How blocks attend, with equal results: flex attention, small groups of blocks, or a dense mask.

    auto = flex on a GPU, structured elsewhere. eager is the reference.
    """
    compile: bool = False
    """Compile the drafter's layers; with flex attention, or eager."""
    sharding: Literal["none", "fsdp2"] = "none"
    """Whether several processes each hold all of the drafter and its optimizer, or a shard."""
    non_finite: Literal["stop", "skip"] = "stop"
    """What a step does whose loss or gradient is not finite: end the run, or change nothing and count."""
    num_sampled_tokens: NonNegative = 0
    """Other tokens per step in a sampled softmax; >= 0, 0 = the whole vocabulary.

    n > 0: the softmax runs over the tokens that occur in the cache plus n of the others, drawn anew each
    step, whose weight is scaled up to stand for all of them. On a CPU the head is most of a step.
    """
    log_every: Count = 10
    """Optimizer steps between log lines; >= 1."""
    save_every: Count = 500
    """Optimizer steps between checkpoints; >= 1."""
    keep: Count = 2
    """Number of latest checkpoints kept, beside the one of best alpha; >= 1."""
    trackers: list[Literal["tensorboard", "trackio", "wandb"]] = []
    """Where metrics go beside the run's metrics.jsonl."""
    project: str = "vpd"
    """What trackers keep the run under."""
    eval_limit: NonNegative = 0
    """Held-out sequences replayed at every checkpoint, as the eval section says, to find the best; >= 0, 0 = none."""
    init: str | None = None
    """A drafter to start from: a checkpoint's or run's folder, or a hub id; none = random weights."""


class EvalConfig(Section):
    """`eval`: acceptance length by replay of held-out sequences."""

    k: Branches = 4
    """Branches beside the first draft in each cycle; in 0..64."""
    policies: Annotated[list[PolicyName], Field(min_length=1)] = ["reranked"]
    """Branch policies; the first gives alpha, the others are listed beside it.

    paper: the k likeliest prefix lengths; exclude: the same, the first draft's next token ruled out; runner-up: the
    k likeliest pairs of prefix length and alternative token, which the second drafter then sees; reranked: the same,
    the alternatives from both drafters, which takes one more pass of the second.
    """
    max_k: Branches = 8
    """Alpha is also listed for every number of branches up to this (or up to k); in 0..64."""
    live_prompts: Count = 4
    """Held-out prompts that are decoded with the real target, where one is given; >= 1."""
    second_block_size: BlockSize | None = None
    """Block positions of the second draft; in 2..255, none = those of its drafter."""
    holdout: Share | None = None
    """Share of sequences held out; in [0, 1], none = as in the drafters' runs, else 0.05. 1 = all."""
    limit: Count | None = None
    """Number of held-out sequences; >= 1, none = all."""
    device: str = "auto"
    """Torch device; auto = a GPU where there is one."""


def plain_types(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, without `Annotated`: `Annotated[int, Ge(1)] | None` gives `(int, NoneType)`."""
    if get_origin(annotation) is Annotated:
        return plain_types(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return tuple(found for member in get_args(annotation) for found in plain_types(member))
    return (annotation,)
