"""Settings of training: the drafter, its training blocks and the run."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from ..config import (
    BelowOne,
    BlockSize,
    Count,
    NonNegative,
    NonNegativeFloat,
    OneOf,
    PositiveFloat,
    Section,
    Share,
)
from .anchors import ANCHOR_SAMPLERS
from .prefix import PREFIX_SAMPLERS


class DrafterSection(Section):
    """`drafter`: shape of the drafter that is trained."""

    num_layers: Count = 5
    """Number of decoder layers; >= 1."""
    block_size: BlockSize = 16
    """Block positions, the anchor included (gamma); in 2..255."""
    mask_token_id: NonNegative | None = None
    """Id of the mask token; >= 0, none = that of `train.init`, else chosen from the tokenizer."""
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


PrefixSampler = Annotated[str, OneOf(PREFIX_SAMPLERS)]


class PrefixConfig(Section):
    """`train.prefix`: how many tokens after the anchor a training block shows."""

    sampler: PrefixSampler = "posterior"
    """The rule that draws prefix lengths."""
    beta: PositiveFloat = 0.9
    """Ratio of the geometric prior over prefix lengths (Eq. 6); > 0. Above 1, long prefixes are likelier."""
    k: Count = 4
    """Branches among which `topk` chooses; >= 1."""
    mixture: dict[PrefixSampler, PositiveFloat] = Field(default={"past-boundary": 0.7, "geometric": 0.3})
    """Weights of the samplers in `mixture`; each > 0, in proportion to their sum."""

    @field_validator("mixture")
    @classmethod
    def _check_mixture(cls, value: dict[str, float]) -> dict[str, float]:
        if not value:
            raise ValueError("the weight of at least one sampler")
        if "mixture" in value:
            raise ValueError("samplers other than mixture")
        return value


class AnchorConfig(Section):
    """`train.anchor`: at which tokens of a sequence training blocks start."""

    sampler: Annotated[str, OneOf(ANCHOR_SAMPLERS)] = "uniform"
    """The rule that chooses anchors."""
    failure_power: PositiveFloat = 1.0
    """`failure` gives an anchor the weight (accept length + 1)^-failure_power; > 0."""


class TrainConfig(Section):
    """`train`: one training run from a cache."""

    objective: Literal["dflash", "vp"] = "vp"
    """What is trained: a first drafter (dflash) or a VP-Drafter (vp)."""
    prefix: PrefixConfig = PrefixConfig()
    """Prefix lengths of the training blocks; only the vp objective reads them."""
    anchor: AnchorConfig = AnchorConfig()
    """Anchors of the training blocks."""
    first_drafter: str | None = None
    """Folder or hub id of the first drafter, or fingerprint of its drafts in the cache; none = the only one there."""
    num_anchors: Count = 512
    """Blocks drawn per sequence and visit; >= 1."""
    tau: PositiveFloat = 7.0
    """Decay length of the loss weights, in block positions (Eq. 7); > 0."""
    normalize: Literal["block", "batch"] = "block"
    """What the weighted loss is divided by: the weights of each block (the paper) or of the batch (public code)."""
    labels: Literal["recorded", "argmax"] = "recorded"
    """What a block must predict: the recorded tokens or the target's argmax."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw: AdamW for all weights; muon: Muon for the matrices and AdamW for the rest."""
    lr: PositiveFloat = 6e-4
    """Peak learning rate; > 0. Muon's steps are scaled so that AdamW's learning rates fit."""
    weight_decay: NonNegativeFloat = 0.0
    """Weight decay of the matrices; >= 0. Norms have none."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.95)
    """Decay rates of AdamW's two moments; each in [0, 1)."""
    ema: BelowOne = 0.0
    """Decay of a moving average of the weights, which checkpoints hold in place of the weights; in [0, 1), 0 = off."""
    clip: PositiveFloat = 1.0
    """Largest gradient norm; > 0."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Course of the learning rate after warm-up."""
    warmup: Share = 0.04
    """Share of all steps in which the learning rate rises; in [0, 1]."""
    epochs: PositiveFloat = 6.0
    """How often every training sequence is visited; > 0."""
    max_steps: Count | None = None
    """Number of optimizer steps; >= 1, none = as many as `epochs` takes."""
    batch_tokens: Count = 32768
    """Context tokens per optimizer step, over all processes; >= 1. A step takes whole sequences."""
    tokens_per_pass: Count = 65536
    """Context tokens and block positions of one forward pass, which bounds memory; >= 1.

    A sequence that has more takes a pass of its own.
    """
    max_len: Count = 3072
    """Tokens of a sequence that are read, from its start; >= 1."""
    holdout: BelowOne = 0.05
    """Share of sequences held out from training, chosen by a hash of their ids; in [0, 1)."""
    seed: NonNegative = 0
    """Seed of initial weights, order, anchors and prefix lengths; >= 0."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the forward pass computes in; auto = bfloat16 on a GPU that has it. Weights are float32."""
    attention: Literal["auto", "eager", "structured", "flex"] = "auto"
    """How blocks attend; the results are equal. auto = flex on a GPU, structured elsewhere.

    flex: PyTorch's flex attention. structured: a few blocks at a time. eager: a dense mask, the reference.
    """
    compile: bool = False
    """Compile the drafter's layers; needs flex or eager attention."""
    sharding: Literal["none", "fsdp2"] = "none"
    """What each of several processes holds: the whole drafter and optimizer (none), or a shard of them (fsdp2)."""
    non_finite: Literal["stop", "skip"] = "stop"
    """What happens if a step's loss or gradient is not finite: the run ends, or the step is skipped and counted."""
    num_sampled_tokens: NonNegative = 0
    """Tokens drawn for a sampled softmax, per step; >= 0, 0 = the softmax runs over the whole vocabulary.

    With n > 0 the softmax runs over the tokens that occur in the cache and n others. These n are drawn anew each
    step and weighted so that they stand for all others. On a CPU the head takes most of a step, so this saves time.
    """
    log_every: Count = 10
    """Optimizer steps between log lines; >= 1."""
    save_every: Count = 500
    """Optimizer steps between checkpoints; >= 1."""
    keep: Count = 2
    """Number of latest checkpoints that are kept, beside the one of best alpha; >= 1."""
    trackers: list[Literal["tensorboard", "trackio", "wandb"]] = Field(default=[])
    """Where metrics go beside the run's metrics.jsonl."""
    project: str = "vpd"
    """Name of the project in the trackers."""
    eval_limit: NonNegative = 0
    """Held-out sequences that are replayed at every checkpoint, with the eval settings; >= 0, 0 = none."""
    init: str | None = None
    """Drafter to start from: a checkpoint's or run's folder, or a hub id; none = random weights."""
