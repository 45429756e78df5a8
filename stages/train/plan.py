"""From settings to a `Trainer`: the drafter's shape, the split of the sequences, first drafts, evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...data.cache.cache import Cache
from ...data.cache.drafts import FirstDrafts, list_drafts
from ...data.cache.index import SequenceIndex
from ...data.cache.manifest import CacheManifest
from ...data.errors import CacheNotFoundError, ConfigError, DrafterError
from ..config import ReadConfig
from ..drafter.checkpoint import check_fits, drafter_fingerprint, load_shape
from ..drafter.model import INIT_STD
from ..drafter.shape import DrafterShape
from ..drafter.target_pieces import TargetPieces, choose_mask_token, full_attention_theta, load_target_config
from ..evaluate.config import EvalConfig
from ..evaluate.plan import ReplayPlan, plan_replay, require_complete
from ..holdout import split_rows
from .checkpoints import find_drafter, list_checkpoints
from .config import DrafterSection, TrainConfig
from .samples import draft_readers, require_anchor
from .trainer import Evaluator, Trainer

DEFAULT_MAX_POSITIONS = 32768


def plan_shape(cache: Cache, section: DrafterSection, begun: Path | None = None) -> DrafterShape:
    """The drafter's shape: the target's, where the settings do not say otherwise.

    Args:
        begun: the checkpoint from which training goes on. Without a setting, the mask token is that of the checkpoint.

    Raises:
        DrafterError: the shape is impossible.
    """
    wanted = section.mask_token_id
    if wanted is None and begun is not None:
        wanted = load_shape(begun).mask_token_id
    mask_token_id = choose_mask_token(wanted, cache.target_folder, cache.manifest.vocab_size)
    return shape_for(cache.manifest, load_target_config(cache.target_folder), section, mask_token_id)


def shape_for(
    manifest: CacheManifest, target: dict[str, Any], section: DrafterSection, mask_token_id: int
) -> DrafterShape:
    """The drafter's shape for a cache of the target with this config."""

    def own_or_target(name: str) -> int:
        value = getattr(section, name) or target.get(name)
        if value is None:
            raise DrafterError(f"the target's config has no {name} to take over. Set drafter.{name}.")
        return int(value)

    num_heads = own_or_target("num_attention_heads")
    return DrafterShape(
        num_layers=section.num_layers,
        hidden_size=manifest.hidden_size,
        num_attention_heads=num_heads,
        num_key_value_heads=section.num_key_value_heads or target.get("num_key_value_heads", num_heads),
        head_dim=section.head_dim or target.get("head_dim") or manifest.hidden_size // num_heads,
        intermediate_size=own_or_target("intermediate_size"),
        rms_norm_eps=target.get("rms_norm_eps", 1e-6),
        rope_theta=section.rope_theta or full_attention_theta(target),
        max_position_embeddings=target.get("max_position_embeddings", DEFAULT_MAX_POSITIONS),
        vocab_size=manifest.vocab_size,
        block_size=section.block_size,
        mask_token_id=mask_token_id,
        target_layer_ids=manifest.layer_ids,
        num_target_layers=manifest.num_target_layers,
    )


def check_agrees(shape: DrafterShape, config: dict[str, Any], where: str) -> None:
    """Checks that a drafter's config asks for the drafter that is trained, where no setting says otherwise.

    Args:
        config: the result of `check_config`; a key that is absent asks for nothing.

    Raises:
        DrafterError: the config asks for another drafter; the message names all differences.
    """
    trained = {
        "hidden_size": shape.hidden_size,
        "vocab_size": shape.vocab_size,
        "num_target_layers": shape.num_target_layers,
        "rms_norm_eps": shape.rms_norm_eps,
        "max_position_embeddings": shape.max_position_embeddings,
        "initializer_range": INIT_STD,
        "attention_dropout": 0,
        "target_layer_ids": list(shape.target_layer_ids),
    }
    asked = config | {"target_layer_ids": (config.get("dflash_config") or {}).get("target_layer_ids")}
    different = [
        f"{name}: the file has {asked[name]!r:.80}, this run trains {value}"
        for name, value in trained.items()
        if asked.get(name) is not None and asked[name] != value
    ]
    if different:
        raise DrafterError(
            f"{where} asks for another drafter than this cache can train. {'; '.join(different)}. Use a cache of that "
            "target with these layers, or correct the file."
        )


def plan_first_drafts(cache: Cache, shape: DrafterShape, config: TrainConfig) -> FirstDrafts | None:
    """The first drafts that training reads; None if no sampler in use reads them.

    Raises:
        CacheNotFoundError: a sampler reads them, and the cache has none or lacks some of its parts'.
        ConfigError: they were made with another block size.
    """
    readers = draft_readers(config)
    if not readers:
        return None
    if not list_drafts(cache.storage):
        raise CacheNotFoundError(
            f"{', '.join(readers)}: expected first drafts in {cache.place}, found none. Make them with vpd draft "
            f"{cache.place} --first-drafter DIR, or choose --prefix-sampler geometric and --anchor-sampler uniform."
        )
    drafts = FirstDrafts.open(cache, first_drafter_fingerprint(cache, config))
    if drafts.block_size != shape.block_size:
        raise ConfigError(
            f"the first drafts {drafts.fingerprint} have block size {drafts.block_size}, drafter.block_size is "
            f"{shape.block_size}. Set drafter.block_size to {drafts.block_size}."
        )
    require_complete(drafts)
    return drafts


def make_trainer(
    cache: Cache,
    run: Path,
    section: DrafterSection,
    config: TrainConfig,
    read: ReadConfig | None = None,
    evaluation: EvalConfig | None = None,
    pieces: TargetPieces | None = None,
) -> Trainer:
    """Checks everything that can be checked before the first step, and resumes the run if it has checkpoints.

    Args:
        evaluation: how checkpoints are evaluated, if `train.eval_limit` asks for it.
        pieces: the target's pieces if another trainer has loaded them.
    """
    read = read or ReadConfig()
    shape = plan_shape(cache, section, begun_checkpoint(run, config))
    check_fits(shape, cache.manifest, run)
    training, held_out = split_rows(cache, config.holdout)
    drafts = plan_first_drafts(cache, shape, config)
    require_anchor(cache, training, config.max_len)
    evaluator = None
    if config.eval_limit:
        evaluator = plan_evaluator(cache, held_out, config, read, evaluation or EvalConfig())
    trainer = Trainer(cache, training, drafts, shape, config, run, read, evaluator, pieces)
    trainer.resume()
    return trainer


def begun_checkpoint(run: Path, config: TrainConfig) -> Path | None:
    """The run's latest checkpoint, else the drafter of `train.init`, else None.

    Raises:
        DrafterError: there is no drafter at `train.init`.
    """
    if checkpoints := list_checkpoints(run):
        return checkpoints[-1]
    return None if config.init is None else find_drafter(config.init)


def plan_evaluator(
    cache: Cache, held_out: SequenceIndex, config: TrainConfig, read: ReadConfig, evaluation: EvalConfig
) -> Evaluator:
    """Evaluates checkpoints by the acceptance length on held-out rows, a VP-Drafter's beside the cached first drafts.

    Raises:
        CacheNotFoundError: the cache lacks first drafts, or there is nothing to replay.
    """
    settings = evaluation.model_copy(update={"limit": config.eval_limit})
    plan = plan_run_replay(cache, held_out, config, settings, read)

    def alpha_of(checkpoint: Path) -> float:
        return plan.run(checkpoint).best_alpha

    without_effect = {"device", "live_prompts", "max_k", "gpu", "speed_target", "speed_context"}
    measure = settings.model_dump(mode="json", exclude=without_effect)
    first_drafts = plan.first.fingerprint if isinstance(plan.first, FirstDrafts) else None
    return Evaluator(alpha_of, measure | {"first_drafts": first_drafts})


def plan_run_replay(
    cache: Cache, held_out: SequenceIndex, config: TrainConfig, evaluation: EvalConfig, read: ReadConfig
) -> ReplayPlan:
    """The replay of a run's drafter: a VP-Drafter beside the cached first drafts, a first drafter alone.

    Raises:
        CacheNotFoundError: the cache lacks first drafts, or there is nothing to replay.
        DrafterError: the first drafts leave out anchors.
    """
    first = FirstDrafts.open(cache, first_drafter_fingerprint(cache, config)) if config.objective == "vp" else None
    return plan_replay(cache, held_out, first, evaluation, read, brief=True)


def first_drafter_fingerprint(cache: Cache, config: TrainConfig) -> str | None:
    """Fingerprint of the first drafter that the config names by its folder, hub id or fingerprint."""
    named = config.first_drafter
    if named is None or not ("/" in named or Path(named).is_dir()):
        return named
    return drafter_fingerprint(find_drafter(named), cache.target_folder)
