"""The model card of an exported drafter: what it is, how good, how to serve it, and what it was made from.

The card says what the drafter's files, its run and a given evaluation say, and nothing about the machine. So one
drafter has one card.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

import yaml

from ...data.errors import DrafterError
from ..drafter.shape import DrafterShape
from ..evaluate.pair import FIRST, SECOND
from ..evaluate.ways import D2SD, FIRST_AS_SECOND
from .forms import CODE, Facts
from .record import Record

CARD = "README.md"
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
NAMES = {FIRST: "first drafter", SECOND: "VP-Drafter", None: "drafter"}
"""Training mode -> what the card calls the drafter."""
SECONDS = {None: "none", FIRST_AS_SECOND: "the first drafter", D2SD: "the VP-Drafter"}
"""Who drafts second in a result of `vpd eval` -> what the card calls the drafter."""


def model_card(form: str, shape: DrafterShape, facts: Facts, record: Record, report: dict[str, Any] | None) -> str:
    """The text of the card.

    Args:
        report: a result of `vpd eval`; None: there is none.

    Raises:
        DrafterError: what was recorded lacks something.
    """
    try:
        sections = list(card_sections(form, shape, facts, record, report))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DrafterError(
            f"expected a result of vpd eval and a run's records as vpd writes them, found something else in them: "
            f"{error!r}. Evaluate the checkpoint again, or leave out --report."
        ) from error
    return "\n\n".join(section for section in sections if section) + "\n"


def card_sections(
    form: str, shape: DrafterShape, facts: Facts, record: Record, report: dict[str, Any] | None
) -> Iterator[str]:
    """The parts of the card; an empty one is left out."""
    yield front_matter(form, facts)
    yield what_it_is(shape, facts)
    yield acceptance(record, report)
    yield serving(form, shape, facts)
    yield both_drafters(facts)
    yield loading(form, shape)
    yield recipe(record)
    yield data(record)


def front_matter(form: str, facts: Facts) -> str:
    """What hubs read."""
    found: dict[str, Any] = {"tags": ["speculative-decoding", "dflash", "draft-model"]}
    if facts.training_mode == SECOND:
        found["tags"] += ["d2sd", "vp-drafter"]
    if form == "speculators":
        found["tags"].append("speculators")
    if facts.target is not None and HUB_ID.fullmatch(facts.target):
        found["base_model"] = facts.target
    return f"---\n{yaml.safe_dump(found)}---"


def what_it_is(shape: DrafterShape, facts: Facts) -> str:
    target = target_name(facts)
    layers = ", ".join(map(str, shape.target_layer_ids))
    text = (
        f"# A {NAMES.get(facts.training_mode, 'drafter')} for {target}\n\n"
        f"A small model that helps {target} to write several tokens in one pass (speculative decoding). It proposes a "
        f"block of {shape.block_size - 1} tokens in one pass of its own; the target checks them in one pass. The "
        "target's greedy answers stay the same.\n\n"
        f"The architecture is that of DFlash (arXiv 2602.06036): {count(shape.num_layers, 'Qwen3-style layer')} of "
        f"width {shape.hidden_size}, block size {shape.block_size}, fed with the outputs of the target's layers "
        f"{layers} (counted from 0). The drafter has neither an embedding nor an LM head; it uses the target's. So it "
        f"works with this target alone. The mask token has the id {shape.mask_token_id}."
    )
    if facts.training_mode == SECOND:
        text += (
            "\n\nThis is the second drafter of D2SD (arXiv 2606.04446). A first drafter fills the block; the "
            "VP-Drafter then completes branches, each of which starts as the first draft and goes another way at one "
            "place."
        )
    return text


def acceptance(record: Record, report: dict[str, Any] | None) -> str:
    """Alpha, as it was measured; never guessed."""
    text = (
        "## Acceptance length\n\nalpha is the number of tokens that one pass of the target commits, the bonus token "
        "included; 1 is decoding without a drafter."
    )
    if report is not None:
        return f"{text}\n\n{alpha_table(report)}\n\n{measured_on(report)}"
    if record.result is not None:
        measure = ", ".join(f"{name} {shown(value)}" for name, value in sorted(record.result.measure.items()))
        return f"{text}\n\nIn the run this checkpoint had alpha {record.result.alpha:.3f} ({measure})."
    return f"{text}\n\nNobody has measured it for this checkpoint, or the result was not given to `vpd export`."


def alpha_table(report: dict[str, Any]) -> str:
    """Alpha and its 95 % interval: a row for each way of decoding, a column for each number N of verified nodes.

    Rows are the ways of the result's headline policy and number of branches.
    """
    rows = [
        row
        for row in report["by_nodes"]
        if row["nodes"] is not None
        and row["policy"] in (None, report["policy"])
        and (row["second"] is None or row["k"] == report["k"])
    ]
    columns = sorted({row["nodes"] for row in rows})
    ways: dict[tuple[str, str | None], dict[int, str]] = {}
    for row in rows:
        low, high = row["interval"]
        ways.setdefault((row["way"], row["second"]), {})[row["nodes"]] = f"{row['alpha']:.3f} [{low:.2f}, {high:.2f}]"
    head = ["way of decoding", "second drafter", *(f"N = {nodes}" for nodes in columns)]
    body = [
        [way, SECONDS.get(second, str(second)), *(found.get(nodes, "") for nodes in columns)]
        for (way, second), found in ways.items()
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body))


def measured_on(report: dict[str, Any]) -> str:
    """The conditions of a result."""
    branches = count(report["k"], "branch", "branches")
    lines = [
        "N is the number of tokens that the target verifies in a pass. Second drafters complete "
        f"{branches} (policy {report['policy']}). This is a replay of {report['num_tokens']} tokens of "
        f"{report['num_responses']} answers, with 95 % intervals over sequences."
    ]
    for drafter, found in sorted(report["trained_on"].items()):
        line = f"The {drafter} drafter was trained on {found['yes']} of these {sum(found.values())} sequences"
        lines.append(f"{line}; of {found['unknown']} nobody knows." if found["unknown"] else f"{line}.")
    return " ".join([*lines, *report["warnings"]])


def serving(form: str, shape: DrafterShape, facts: Facts) -> str:
    """The lines that serve the drafter; DRAFTER stands for the folder."""
    target = target_in_commands(facts)
    setting = json.dumps({"method": "dflash", "model": "DRAFTER", "num_speculative_tokens": shape.block_size - 1})
    commands = [f"vllm serve {target} --speculative-config '{setting}'"]
    if form == "dflash":
        commands.append(
            f"python -m sglang.launch_server --model-path {target} \\\n    --speculative-algorithm DFLASH "
            f"--speculative-draft-model-path DRAFTER --speculative-num-draft-tokens {shape.block_size}"
        )
    text = "## Serve it\n\nDRAFTER is this folder.\n\n" + "\n\n".join(f"```\n{command}\n```" for command in commands)
    if facts.training_mode == SECOND:
        text += (
            "\n\nServing engines decode with one drafter, as a chain. They run a VP-Drafter as if it were a first "
            "drafter, with the last token alone to begin with. Compare it with its first drafter before you do so."
        )
    return text


def both_drafters(facts: Facts) -> str:
    """How the pair is used; FIRST and SECOND stand for the other folder."""
    first, second = ("FIRST", "DRAFTER") if facts.training_mode == SECOND else ("DRAFTER", "SECOND")
    target = target_in_commands(facts)
    return (
        "## Decode with both drafters\n\nNo serving engine decodes with two drafters. vpd does, with a cache of the "
        f"target's states: by replay, and with `--target` also for real.\n\n```\nvpd eval CACHE --first-drafter {first}"
        f" --drafter {second} --target {target}\n```"
    )


def loading(form: str, shape: DrafterShape) -> str:
    if form == "speculators":
        code = 'from speculators import SpeculatorModel\n\ndrafter = SpeculatorModel.from_pretrained("DRAFTER")'
        return f"## Load it\n\n```python\n{code}\n```"
    code = (
        "from transformers import AutoModel\n\n"
        'drafter = AutoModel.from_pretrained("DRAFTER", trust_remote_code=True)\n'
        "states = drafter(noise_embedding, target_hidden)  # for the target's LM head"
    )
    width = len(shape.target_layer_ids) * shape.hidden_size
    return (
        f"## Load it\n\n```python\n{code}\n```\n\n`noise_embedding` [batch, {shape.block_size}, {shape.hidden_size}] "
        "is the target's embedding of the last token and of mask tokens, `target_hidden` [batch, tokens before the "
        f"last, {width}] holds the outputs of the target's layers side by side. `{CODE}` is all the code."
    )


def recipe(record: Record) -> str:
    """The run's settings."""
    if not record.settings:
        return "## Recipe\n\nNot known: the drafter lay in no run's folder."
    step = "" if record.step is None else f"Step {record.step} of a run with these settings:\n\n"
    settings = yaml.safe_dump(without_places(record.settings), sort_keys=False)
    return f"## Recipe\n\n{step}```yaml\n{settings}```"


def data(record: Record) -> str:
    """What the drafter was trained on, and with what."""
    if not record.provenance:
        return ""
    found = record.provenance
    lines = [f"- target: {shown(found.get('target'))}, fingerprint {found.get('target_fingerprint')}"]
    lines += dict.fromkeys(describe_caches(found.get("trained_on") or []))
    if "num_sequences" in found:
        lines.append(f"- size of the last cache: {found['num_sequences']} sequences, {found['num_tokens']} tokens")
    versions = ", ".join(f"{name} {version}" for name, version in sorted((found.get("versions") or {}).items()))
    return "## Data\n\n" + "\n".join([*lines, f"- made with: Python {found.get('python')}, {versions}"])


def describe_caches(records: list[dict[str, Any]]) -> Iterator[str]:
    """The caches of hidden states of the run, and of the drafters that the run began from."""
    for record in records:
        if "cache" in record:
            yield (
                f"- cache: {shown(record['cache'])}, fingerprint {record['cache_fingerprint']}, "
                f"{count(len(record['parts']), 'part')}; a share of {record['holdout']} of its sequences is held out"
            )
        else:
            yield f"- not known: what {', '.join(shown(value) for value in record.values())} was trained on"


def count(number: int, thing: str, things: str = "") -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {things or thing + 's'}"


def target_name(facts: Facts) -> str:
    return "its target" if facts.target is None else shown(facts.target)


def target_in_commands(facts: Facts) -> str:
    return "TARGET" if facts.target is None or facts.target.startswith("/") else facts.target


def without_places(value: Any) -> Any:
    """The settings, with the names alone of files and folders that have an absolute path."""
    if isinstance(value, dict):
        return {name: without_places(each) for name, each in value.items()}
    if isinstance(value, list):
        return [without_places(each) for each in value]
    return shown(value) if isinstance(value, str) else value


def shown(value: Any) -> str:
    """A value without the folders of an absolute path, which say something about a machine and nothing to a reader."""
    text = str(value)
    return PurePosixPath(text).name if text.startswith("/") else text
