"""How the first record is read, to be shown before anything runs and kept with the cache."""

from __future__ import annotations

from collections.abc import Sequence

from ...data.cache.manifest import FirstRecord
from ...data.chat import ChatFormat
from ...data.errors import PromptError
from ...data.prompts.records import BadRow, PromptSource
from ...data.runs import marked_runs
from .config import ExtractConfig
from .inputs import plan_thinking
from .plan import start_conversation
from .target import Target

MAX_RUNS, MAX_CHARACTERS = 12, 400
"""What is kept of a record: so many runs, and so much of each run's text."""
GAP = " [...] "

Runs = Sequence[tuple[str, bool]]


def read_first(
    prompts: PromptSource, chat: ChatFormat, target: Target, config: ExtractConfig
) -> tuple[FirstRecord | None, str]:
    """The first record that can be used, and all of its text; None if there is none in the first slice.

    The text is what the target reads: the whole conversation if the record holds the answers, else the first prompt.
    """
    thinking = plan_thinking(target, config)
    for record in prompts.read(prompts.slices()[0].rows):
        if isinstance(record, BadRow):  # planning the extraction reports the record
            continue
        try:
            request = start_conversation(record, chat, target, config, thinking).first_request()
        except PromptError:
            continue
        mask = request.supervised or [0] * len(request.prompt_ids)
        runs = marked_runs(
            lambda ids: str(target.tokenizer.decode(ids, clean_up_tokenization_spaces=False)), request.prompt_ids, mask
        )
        found = FirstRecord(
            source=record.source,
            row=record.row,
            used=record.facts.used,
            left_out=record.facts.left_out,
            rules=record.facts.rules,
            notes=describe_template(chat, target),
            runs=shorten(runs),
        )
        return found, "".join(text for text, _ in runs)
    return None, ""


def describe_template(chat: ChatFormat, target: Target) -> tuple[str, ...]:
    """What the template asks of the extraction beside its text."""
    notes: list[str] = []
    if chat.further_end_id is not None:
        token = target.tokenizer.convert_ids_to_tokens(chat.further_end_id)
        notes.append(
            f"The template ends an answer with {token}, which the target's files do not name as an end. Here {token} "
            "ends answers too."
        )
    if chat.date is not None:
        notes.append(f"The template reads the clock; it is given {chat.date.isoformat()}.")
    return tuple(notes)


def shorten(runs: Runs) -> tuple[tuple[str, bool], ...]:
    """The runs, without the middle of long texts and of long lists of runs."""
    if len(runs) > MAX_RUNS:
        half = MAX_RUNS // 2
        runs = [*runs[:half], (GAP, False), *runs[-half:]]
    half = MAX_CHARACTERS // 2
    return tuple(
        (text if len(text) <= MAX_CHARACTERS else f"{text[:half]}{GAP}{text[-half:]}", mark) for text, mark in runs
    )
