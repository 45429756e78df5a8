"""A run's folder: resolved config, provenance, metrics."""

from __future__ import annotations

import json
import math
import platform
import secrets
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from ..data.cache.cache import Cache
from ..data.cache.storage.files import require_folder, write_text_durably
from ..data.errors import ConfigError, DrafterError
from ..stages.drafter.checkpoint import WEIGHTS
from ..stages.holdout import RUN_CONFIG
from ..stages.train.checkpoints import find_drafter
from ..stages.trained_on import KEY, PROVENANCE, UNKNOWN, training_record
from .config import VpdConfig, config_yaml, load_config

METRICS = "metrics.jsonl"
SECTIONS = ("drafter", "train")
FREE_SETTINGS = frozenset(
    f"train.{name}"
    for name in (
        "attention",
        "compile",
        "eval_limit",
        "keep",
        "log_every",
        "non_finite",
        "project",
        "save_every",
        "sharding",
        "tokens_per_pass",
        "trackers",
    )
)
"""Settings that a resumed run may change: apart from rounding, they do not change what is computed."""
PACKAGES = ("vpd", "torch", "transformers", "accelerate", "zarr", "pyarrow", "safetensors")


class RunFolder:
    """The folder of a training run, new or resumed."""

    def __init__(self, folder: Path, config: VpdConfig, cache: Cache):
        """Opens the folder; `start` writes to it.

        Raises:
            ConfigError: the folder holds a run with other settings or from another state of the cache, or a drafter.
        """
        require_folder(folder)
        if (folder / WEIGHTS).is_file():
            raise ConfigError(
                f"expected a new folder or a run at {folder}, found a drafter ({WEIGHTS}). Choose another --out; to "
                f"start from that drafter, add --init {folder}."
            )
        self.folder = folder
        self._config, self._cache = config, cache
        self.run_id = secrets.token_hex(4)
        self._trained_on: list[dict[str, Any]] | None = None
        if (folder / RUN_CONFIG).is_file():
            recorded = self._recorded()
            self._check_same_run(config, cache, recorded)
            self.run_id = recorded.get("run_id", self.run_id)
            self._trained_on = recorded.get(KEY)

    def start(self, step: int) -> None:
        """Writes provenance and settings, and drops the metrics after `step`, which will be computed again."""
        # The config comes last, since a folder that has one is continued.
        origin = {"run_id": self.run_id, **provenance(self._cache), KEY: self._trained_on or self._record()}
        write_text_durably(self.folder / PROVENANCE, json.dumps(origin, indent=2) + "\n")
        write_text_durably(self.folder / RUN_CONFIG, config_yaml(self._config, SECTIONS))
        path = self.folder / METRICS
        lines = path.read_text().splitlines() if path.is_file() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        write_text_durably(path, "".join(f"{line}\n" for line in kept))

    def settings(self) -> dict[str, Any]:
        """The run's settings by section."""
        return {name: getattr(self._config, name).model_dump() for name in SECTIONS}

    def log(self, metrics: dict[str, Any]) -> None:
        """Adds a line to the run's metrics."""
        with open(self.folder / METRICS, "a") as file:
            file.write(json.dumps({name: finite_or_none(value) for name, value in metrics.items()}) + "\n")

    def _record(self) -> list[dict[str, Any]]:
        """What the run is trained on, the drafter that it starts from included."""
        train = self._config.train
        try:
            init = None if train.init is None else find_drafter(train.init)
        except DrafterError:  # The run is continued, and that drafter has gone.
            return [*training_record(self._cache, train.holdout, None), {UNKNOWN: str(train.init)}]
        return training_record(self._cache, train.holdout, init)

    def _recorded(self) -> dict[str, Any]:
        path = self.folder / PROVENANCE
        try:
            return dict(json.loads(path.read_text()))
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(
                f"{self.folder} can't be continued: expected a run's provenance in {path} ({error!r}). "
                "Restore it, or use another --out."
            ) from None

    def _check_same_run(self, config: VpdConfig, cache: Cache, recorded: dict[str, Any]) -> None:
        before = load_config(self.folder / RUN_CONFIG, {})
        different = [
            f"{key}: the run has {then}, now {now}"
            for key, then, now in _pairs(before, config)
            if then != now and key not in FREE_SETTINGS
        ]
        if (found := recorded.get("cache_fingerprint")) != cache.fingerprint:
            different.append(f"cache: the run was started from {found}, the cache is now {cache.fingerprint}")
        if different:
            raise ConfigError(
                f"{self.folder} holds a run with other settings, so it can't be continued. {'; '.join(different)}. "
                "Use the same settings, or another --out."
            )


def finite_or_none(value: Any) -> Any:
    """The value, or None for NaN and infinity, which JSON lacks."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def provenance(cache: Cache) -> dict[str, Any]:
    """Command, cache, target and versions that a run was made with."""
    return {
        "command": sys.argv,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "cache": cache.place,
        "cache_fingerprint": cache.fingerprint,
        "num_sequences": len(cache),
        "num_tokens": cache.num_tokens,
        "target": cache.manifest.target,
        "target_fingerprint": cache.manifest.target_fingerprint,
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in PACKAGES},
    }


def _pairs(recorded: VpdConfig, config: VpdConfig) -> list[tuple[str, Any, Any]]:
    """(dotted key, recorded value, present value) of every setting of a run."""
    return [
        (f"{section}.{name}", getattr(getattr(recorded, section), name), getattr(getattr(config, section), name))
        for section in SECTIONS
        for name in type(getattr(config, section)).model_fields
    ]
