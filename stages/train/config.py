"""Settings of training: the drafter, its training blocks and the run."""

from typing import Literal

from pydantic import Field, field_validator

from ..config import (
    BelowOne,
    BlockSize,
    Count,
    NonNegative,
    NonNegativeFloat,
    PositiveFloat,
    Ratio,
    Section,
    Share,
)


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
    mixture: dict[PlainSampler, PositiveFloat] = Field(default={"past-boundary": 0.7, "geometric": 0.3})
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
    trackers: list[Literal["tensorboard", "trackio", "wandb"]] = Field(default=[])
    """Where metrics go beside the run's metrics.jsonl."""
    project: str = "vpd"
    """What trackers keep the run under."""
    eval_limit: NonNegative = 0
    """Held-out sequences replayed at every checkpoint, as the eval section says, to find the best; >= 0, 0 = none."""
    init: str | None = None
    """A drafter to start from: a checkpoint's or run's folder, or a hub id; none = random weights."""
