"""An extraction, from its arguments to a cache: the same steps in every worker."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import click
import torch

from ..data.cache.cache import Cache, remove_unused
from ..data.cache.manifest import MANIFEST_NAME, CacheManifest
from ..data.cache.storage.places import open_storage
from ..stages.draft.first_draft import FirstDrafting
from ..stages.extract.config import ExtractConfig
from ..stages.extract.engine import Engine
from ..stages.extract.engines import make_engine
from ..stages.extract.fingerprint import FILE_HASHES
from ..stages.extract.inputs import make_chat, plan_prompts, with_template_end
from ..stages.extract.manifest import open_cache, plan_layers, plan_manifest
from ..stages.extract.plan import ExtractPlan, plan_extraction
from ..stages.extract.probe import probe
from ..stages.extract.run import extract
from ..stages.extract.sink import ExtractReport
from ..stages.extract.target import Target, load_target

SECONDS_BETWEEN_DRAFTINGS = 5.0
OPENING_SHARE = 0.05
"""Largest share of its time in which drafting beside the engine opens the cache, which lists all parts."""


@dataclass(frozen=True, slots=True)
class ExtractJob:
    """What `vpd extract` was asked for."""

    target: str
    prompts: tuple[str, ...]
    out: str
    settings: ExtractConfig


@dataclass(frozen=True, slots=True)
class Prepared:
    """A job whose target is found and whose records are checked, before anything is written."""

    job: ExtractJob
    target: Target
    layer_ids: tuple[int, ...]
    manifest: CacheManifest
    plan: ExtractPlan


def prepare(job: ExtractJob) -> Prepared:
    """Finds the target, reads the prompts and plans the work.

    Raises:
        VpdError: the target, the prompts or the cache can't be used as the job asks.
    """
    settings = job.settings
    prompts = plan_prompts(job.prompts, settings)
    target = load_target(job.target, settings.adapter, trust_remote_code=settings.trusts_target_code)
    layer_ids, chat = plan_layers(target, settings), make_chat(target, settings, job.out)
    target = with_template_end(target, chat)
    FILE_HASHES.load(open_storage(job.out))
    manifest = plan_manifest(target, layer_ids, chat, prompts, settings)
    plan = plan_extraction(job.out, manifest, prompts, chat, target, settings)
    return Prepared(job, target, layer_ids, manifest, plan)


def can_draft_beside(is_engine_elsewhere: bool) -> bool:
    """Whether drafting does not take the engine's processors: the engine runs in other processes, or on a GPU.

    On the same cores the two slow each other by more than drafting takes afterwards.
    """
    return is_engine_elsewhere or torch.accelerator.is_available()


@contextmanager
def drafting_beside(place: str, drafting: FirstDrafting, must_stop: Callable[[], bool]) -> Iterator[None]:
    """Drafts over the committed parts in a thread, while the `with` block extracts.

    After an error the thread tries again. The first error is shown; an error that lasts is raised by the drafting
    that follows the extraction.
    """
    over = threading.Event()

    def draft_on() -> None:
        was_shown = False
        pause = SECONDS_BETWEEN_DRAFTINGS
        while not over.wait(pause):
            began = time.monotonic()
            try:
                if open_storage(place).exists(MANIFEST_NAME):
                    cache = Cache.open(place, allow_empty=True)
                    pause = max(SECONDS_BETWEEN_DRAFTINGS, (time.monotonic() - began) / OPENING_SHARE)
                    drafting.run(cache, must_stop=must_stop)
            except Exception as error:
                if not was_shown:
                    click.echo(
                        f"vpd: first drafts beside the engine failed and will be tried again: {error!r}", err=True
                    )
                was_shown = True

    thread = threading.Thread(target=draft_on, name="vpd-draft", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def work_on(
    prepared: Prepared,
    on_sequence: Callable[[int, str], None] = lambda num_tokens, note: None,
    must_stop: Callable[[], bool] = lambda: False,
    on_start: Callable[[], None] = lambda: None,
) -> ExtractReport:
    """One worker's part of the job, or the whole job if there are no other workers.

    Args:
        on_sequence: called after each sequence with its number of tokens, and a note.
        must_stop: once this is true, the worker commits what is finished and ends.
        on_start: called once the engine runs and gives the right states.
    """
    settings = prepared.job.settings
    storage = open_storage(prepared.job.out)
    is_new = not storage.exists(MANIFEST_NAME)

    def start_engine() -> Engine:
        engine = make_engine(prepared.target, prepared.layer_ids, settings)
        try:
            probe(engine, prepared.target, prepared.layer_ids, storage)
        except BaseException:
            engine.close()
            raise
        on_start()
        return engine

    try:
        cache = open_cache(prepared.job.out, prepared.manifest, prepared.target)
        return extract(start_engine, cache, prepared.plan, settings, on_sequence, must_stop)
    except BaseException:
        if is_new:  # else a corrected target would be another one than that of the cache
            remove_unused(storage)
        raise
