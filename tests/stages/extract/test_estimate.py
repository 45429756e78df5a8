"""Estimates of an extraction, compared with real extractions; and the check of free space."""

import shutil
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny import EXTRACT, MULTI_TURN_ROW, PROMPTS, TEXT_ROW, as_flags, run_vpd, snapshot, vpd, write_jsonl
from vpd.data.cache.cache import Cache
from vpd.data.cache.codecs import CODECS
from vpd.data.cache.maintenance.transfer import recode
from vpd.data.cache.storage.places import open_storage
from vpd.data.errors import ExtractionError
from vpd.pipeline.commands.estimate import describe_hours
from vpd.stages.extract.config import ExtractConfig
from vpd.stages.extract.conversations import FinishedSequence
from vpd.stages.extract.engine import Completion, EngineRequest
from vpd.stages.extract.engines import make_engine
from vpd.stages.extract.estimate import (
    Lengths,
    cache_bytes,
    choose_evenly,
    expected_lengths,
    measure_share,
    run_pilot,
)
from vpd.stages.extract.inputs import make_chat, plan_prompts
from vpd.stages.extract.manifest import plan_layers, plan_manifest
from vpd.stages.extract.plan import ExtractPlan, plan_extraction, sample_rows
from vpd.stages.extract.target import load_target
from vpd.stages.extract.units import WorkUnit

ANSWERED = [
    {"prompt": "name a dog", "response": "the lazy dog"},
    {"prompt": "name a fox", "response": "the quick brown fox jumps over the lazy dog. " * 8},
    {"text": "the quick brown fox"},
    {"messages": [{"role": role, "content": "fox"} for role in ("user", "assistant", "user", "assistant")]},
]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "new" / "cache"


def make_plan(llama: Path, prompts: Path, out: Path, **changes: Any) -> tuple[ExtractPlan, Any, Any]:
    """The plan, the manifest, and a call that starts the engine."""
    config = ExtractConfig(**EXTRACT | changes)
    target, records = load_target(str(llama)), plan_prompts([prompts], config)
    layers, chat = plan_layers(target, config), make_chat(target, config)
    manifest = plan_manifest(target, layers, chat, records, config)
    plan = plan_extraction(out, manifest, records, chat, target, config)
    return plan, manifest, lambda: make_engine(target, layers, config)


# Tokens


def test_given_answers_are_counted_exactly(tiny_llama: Path, tmp_path: Path, out: Path):
    prompts = write_jsonl(tmp_path / "answered.jsonl", ANSWERED)
    settings = EXTRACT | {"mode": "given"}
    estimated = vpd("estimate", tiny_llama, prompts, "--out", out, **settings)
    assert not out.parent.exists()
    extracted = vpd("extract", tiny_llama, prompts, "--out", out, **settings)
    for name in ("num_sequences", "num_tokens"):
        assert estimated[name] == extracted[name]
    lengths = {row.source_row: row.num_tokens for row in Cache.open(out).rows}
    assert lengths[2] == EXTRACT["max_len"]
    plan, _, _ = make_plan(tiny_llama, prompts, out.with_name("other"), mode="given")
    assert [conversation.expected_len(None) for conversation in plan.conversations] == [
        lengths[conversation.record.row] for conversation in plan.conversations
    ]
    assert (estimated["response_tokens"], estimated["num_present"], estimated["hours"]) == (None, 0, None)


def test_generated_answers_stay_below_the_bound(tiny_llama: Path, tiny_prompts: Path, tiny_cache: Path, out: Path):
    plan, _, _ = make_plan(tiny_llama, tiny_prompts, out)
    rows = {row.seq_id: row for row in Cache.open(tiny_cache).rows}
    assert len(rows) == len(plan.conversations)
    for conversation in plan.conversations:
        row, bound = rows[conversation.record.seq_id], conversation.expected_len(None)
        if row.source_row == MULTI_TURN_ROW:
            continue
        assert row.num_tokens <= bound <= EXTRACT["max_len"]
        assert (row.num_tokens == bound) == (row.finish_reason == "length")
        answer = row.num_tokens + 1 - row.prompt_len
        assert conversation.expected_len(answer) == row.num_tokens
    assert {row.finish_reason for row in rows.values()} == {"length", "stop"}
    assert TEXT_ROW in {row.source_row for row in rows.values()}
    estimated = vpd("estimate", tiny_llama, tiny_prompts, "--out", out, **EXTRACT)
    assert estimated["num_tokens"] == round(expected_lengths(plan.conversations, None, len(rows)).total)
    assert estimated["response_tokens"] is None


def test_later_turns_count_with_all_that_the_template_adds(tiny_llama: Path, tmp_path: Path, out: Path):
    one, three = {"prompt": "which fox"}, {"turns": ["which fox", "name a dog", "and another one"]}
    system = {"messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "which fox"}]}
    prompts = write_jsonl(tmp_path / "turns.jsonl", [one, three, system])
    plan, _, _ = make_plan(tiny_llama, prompts, out, max_len=400)
    short, long, third = (conversation.expected_len(24) for conversation in plan.conversations)
    assert (short, third) == tuple(len(plan.conversations[i].first_request().prompt_ids) + 23 for i in (0, 2))
    tokenizer = load_target(str(tiny_llama)).tokenizer
    later = "".join(
        f".<|im_end|>\n<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        for text in ("name a dog", "and another one")
    )
    assert long == short + len(tokenizer(later, add_special_tokens=False)["input_ids"]) + 2 * 24
    plan, _, _ = make_plan(tiny_llama, prompts, out, max_len=100)
    assert [conversation.expected_len(None) for conversation in plan.conversations][1] == 100


def test_several_turns_stay_below_the_bound(tiny_llama: Path, tmp_path: Path, out: Path):
    """The answers have the greatest length, and their texts have no more tokens than the answers."""
    turns = ["which fox", "name a dog", "and another one"]
    prompts = write_jsonl(tmp_path / "turns.jsonl", [{"turns": turns[:count]} for count in (1, 2, 3)])
    tokenizer = load_target(str(tiny_llama)).tokenizer
    text = tokenizer("the quick brown fox jumps over the lazy dog, which is what the fox jumps over")["input_ids"]
    plan, _, _ = make_plan(tiny_llama, prompts, out, max_len=400)
    for conversation in plan.conversations:
        bound = conversation.expected_len(None)
        step: EngineRequest | FinishedSequence = conversation.first_request()
        while isinstance(step, EngineRequest):
            completion = Completion(
                key=step.key,
                prompt_ids=step.prompt_ids,
                output_ids=text[: step.max_new_tokens],
                finish_reason="length",
                hidden_TKH=torch.zeros(1),
                argmax_T=torch.zeros(len(step.prompt_ids) + step.max_new_tokens - 1),
            )
            step = conversation.advance(completion)
        assert len(text) > EXTRACT["max_new_tokens"]
        assert bound - 4 <= len(step.token_ids) <= bound


def test_response_tokens_lower_the_estimate(tiny_llama: Path, tiny_prompts: Path, out: Path):
    def tokens(**settings: Any) -> int:
        return vpd("estimate", tiny_llama, tiny_prompts, "--out", out, **EXTRACT, **settings)["num_tokens"]

    longest, half, one = tokens(), tokens(response_tokens=12), tokens(response_tokens=1)
    num_answers = len(PROMPTS) + 1
    assert longest - half == 12 * num_answers
    assert half - one == 11 * num_answers
    assert tokens(response_tokens=1000) == longest


def test_a_sample_stands_for_all(tiny_llama: Path, tiny_prompts: Path, tiny_cache: Path, tmp_path: Path, out: Path):
    prompts = write_jsonl(tmp_path / "alike.jsonl", [{"prompt": f"the sum of {i} and two"} for i in range(10, 40)])
    whole, sample = (
        vpd("estimate", tiny_llama, prompts, "--out", out, **EXTRACT, **more) for more in ({}, {"sample": 10})
    )
    assert (whole.pop("num_tokenized"), sample.pop("num_tokenized")) == (30, 10)
    assert (whole.pop("num_sampled"), sample.pop("num_sampled")) == (30, 10)
    assert whole.pop("free_bytes") > 0 < sample.pop("free_bytes")
    assert sample == whole
    present = vpd("estimate", tiny_llama, tiny_prompts, "--out", tiny_cache, **EXTRACT, sample=6)
    assert (present["num_present"], present["num_sequences"], present["num_tokens"]) == (len(PROMPTS), 0, 0)
    assert set(present["bytes"].values()) == {0}


@pytest.mark.parametrize(("number", "rows"), [(1, [0]), (3, [0, 4, 8]), (12, range(12)), (99, range(12))])
@pytest.mark.parametrize("cuts", [[0, 12], [0, 5, 6, 12]], ids=str)
def test_samples_are_spread_over_the_rows(number: int, rows: list[int], cuts: list[int]):
    units = [WorkUnit(str(start), range(start, end)) for start, end in pairwise(cuts)]
    assert sample_rows(units, number) == list(rows)
    assert sample_rows([], number) == []


def test_a_sample_counts_what_is_left_out(tiny_llama: Path, tmp_path: Path, out: Path):
    """Of four records one is too long, one has no form, and one is there twice in a row."""
    records = [
        each for i in range(12) for each in ({"prompt": f"why {i}?"},) * 2 + ({"prompt": "fox " * 200}, {"n": i})
    ]
    prompts = write_jsonl(tmp_path / "mixed.jsonl", records)
    whole, sample = (
        vpd("estimate", tiny_llama, prompts, "--out", out, **EXTRACT, skip_bad=True, **more)
        for more in ({}, {"sample": 16})  # the first, fourth, seventh, tenth ... of the records
    )
    # A repetition of a record that is too long is counted as a duplicate.
    assert whole["left_out"] == {"duplicate": 23, "too long": 1, "unreadable record": 12}
    assert (whole["num_records"], whole["num_sequences"]) == (48, 12)
    assert sample["num_sampled"] == 16
    assert sample["left_out"]["unreadable record"] == 12
    assert sum(sample["left_out"].values()) + sample["num_sequences"] == 48
    assert run_vpd("estimate", tiny_llama, prompts, "--out", out, **EXTRACT).code == 1


def test_config_and_tokenizer_are_enough(
    tiny_llama: Path, tiny_prompts: Path, tiny_cache: Path, tmp_path: Path, out: Path
):
    folder = shutil.copytree(tiny_llama, tmp_path / "small", ignore=shutil.ignore_patterns("*.safetensors*"))
    for place in (out, tiny_cache):
        with_weights, without = (
            vpd("estimate", target, tiny_prompts, "--out", place, **EXTRACT) for target in (tiny_llama, folder)
        )
        assert without.pop("free_bytes") > 0 < with_weights.pop("free_bytes")
        assert without == with_weights
    refused = run_vpd("estimate", folder, tiny_prompts, "--out", out, **EXTRACT, pilot=1)
    assert (refused.code, "safetensors" in refused.message) == (1, True)


@pytest.mark.parametrize(("gpus", "of_worker", "num_workers"), [(None, 2, 1), (8, 1, 8), (8, 2, 4), (1, 2, 0.5)])
def test_hours_are_those_of_all_gpus(
    gpus: int | None, of_worker: int, num_workers: float, tiny_llama: Path, tiny_prompts: Path, out: Path
):
    known = {"response_tokens": 7, "tokens_per_second": 100.0, "utilization": 0.5}
    arguments = ["estimate", tiny_llama, tiny_prompts, "--out", out, *as_flags(EXTRACT | known)]
    arguments += ["--engine-arg", f"tensor_parallel_size={of_worker}", *(["--gpus", gpus] if gpus else [])]
    found = vpd(*arguments)
    assert (found["num_workers"], found["rate_source"]) == (num_workers, "--tokens-per-second")
    assert found["hours"] == pytest.approx(found["num_tokens"] / 100 / 3600 / num_workers)
    wall = found["training"].get("hours")
    assert wall == (pytest.approx(found["training"]["gpu_hours"] / gpus) if gpus else None)
    shown = run_vpd(*arguments).out
    assert (f"on {gpus} GPUs" in shown) == (gpus is not None)


DURATIONS = [(0.001, "4 s"), (0.5, "30 min"), (3.2, "3 h 12 min"), (47.999, "48 h 0 min"), (1234.6, "51 days 11 h")]


@pytest.mark.parametrize(("hours", "shown"), DURATIONS)
def test_hours_are_readable(hours: float, shown: str):
    assert describe_hours(hours) == shown


# Bytes


@pytest.mark.parametrize("codec", CODECS)
def test_bytes_are_those_of_a_real_cache(codec: str, tiny_cache: Path, tmp_path: Path):
    """Eleven in twelve of these sequences fill three quarters of their one chunk, so that padding counts."""
    cache = Cache.open(tiny_cache)
    recode(cache, tmp_path / "out", codec, 1 << 30)
    real = Cache.open(tmp_path / "out").num_bytes
    share = measure_share(cache, codec)
    assert (share == 1) == (CODECS[codec].spec(1, 1, 1).compression is None)
    lengths = cache.rows.column("num_tokens").tolist()
    assert cache_bytes(Lengths(lengths, len(lengths)), cache.manifest, codec, share) == pytest.approx(real, rel=0.05)
    tenfold = cache_bytes(Lengths(lengths, 10 * len(lengths)), cache.manifest, codec, share)
    assert tenfold == pytest.approx(10 * real, rel=0.05)
    usual = cache_bytes(Lengths(lengths, len(lengths)), cache.manifest, codec)
    assert usual == cache_bytes(Lengths(lengths, len(lengths)), cache.manifest, codec, CODECS[codec].usual_share)
    assert cache_bytes(Lengths([], 0), cache.manifest, codec) == 0


# The pilot


def test_a_pilot_measures(tiny_llama: Path, tiny_prompts: Path, tiny_cache: Path, tmp_path: Path):
    before = snapshot(tmp_path)
    found = vpd("estimate", tiny_llama, tiny_prompts, "--out", tmp_path / "new", **EXTRACT, pilot=3)
    assert snapshot(tmp_path) == before
    assert list(tmp_path.iterdir()) == []
    rows = {row.source_row: row for row in Cache.open(tiny_cache).rows}
    answers = [rows[row].num_tokens + 1 - rows[row].prompt_len for row in (1, 7, 12)]
    assert found["response_tokens"] == pytest.approx(np.mean(answers))
    assert found["tokens_per_second"] > 0
    assert found["rate_source"] == "a pilot of 3 sequences on this machine"
    assert found["hours"] == pytest.approx(found["num_tokens"] / found["tokens_per_second"] / 3600, rel=0.01)
    assert found["bytes"]["raw"] == pytest.approx(Cache.open(tiny_cache).num_bytes, rel=0.05)


def test_a_pilot_of_all_leaves_the_expected_lengths_as_they_are(
    tiny_llama: Path, tiny_prompts: Path, tiny_cache: Path, out: Path
):
    """The pilot uses up the turns of the conversations."""
    plan, manifest, start_engine = make_plan(tiny_llama, tiny_prompts, out)
    expected = expected_lengths(plan.conversations, 20.0, 99)
    config = ExtractConfig(**EXTRACT)
    pilot = run_pilot(start_engine, choose_evenly(plan, 99), manifest, config, out)
    assert expected_lengths(plan.conversations, 20.0, 99) == expected
    cache = Cache.open(tiny_cache)
    assert (pilot.num_sequences, pilot.num_tokens) == (len(cache), cache.num_tokens)
    assert pilot.shares == {codec: measure_share(cache, codec) for codec in CODECS}
    assert plan.report.num_written == 0
    assert not out.parent.exists()


def test_what_is_known_needs_no_measuring(tiny_llama: Path, tiny_prompts: Path, out: Path):
    known = {"response_tokens": 7, "tokens_per_second": 100.0}
    found = vpd("estimate", tiny_llama, tiny_prompts, "--out", out, **EXTRACT, **known, pilot=1)
    assert {name: found[name] for name in known} == known
    assert found["hours"] == pytest.approx(found["num_tokens"] / 100 / 3600)


def test_a_pilot_without_a_sequence_is_an_error(
    tiny_llama: Path, tiny_prompts: Path, out: Path, monkeypatch: pytest.MonkeyPatch
):
    plan, manifest, start_engine = make_plan(tiny_llama, tiny_prompts, out)
    monkeypatch.setattr("vpd.stages.extract.sink.find_fault", lambda sequence: ("a fault", True))
    with pytest.raises(ExtractionError, match="expected sequences of 2 records in a pilot, found none"):
        run_pilot(start_engine, choose_evenly(plan, 2), manifest, ExtractConfig(**EXTRACT), out)
    assert not out.parent.exists()


# Free space


def set_free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(total=1 << 40, used=0, free=free))


def test_a_disk_that_is_too_small_is_refused(
    tiny_llama: Path, tiny_prompts: Path, out: Path, monkeypatch: pytest.MonkeyPatch
):
    arguments = [tiny_llama, tiny_prompts, "--out", out, "--limit", 2]
    needed = vpd("estimate", *arguments, **EXTRACT)["bytes"]
    set_free(monkeypatch, needed["raw"] - 1)
    outcome = run_vpd("extract", *arguments, **EXTRACT)
    assert outcome.code == 1
    for word in ("expected 0.000 GiB", str(out), "2 sequences", "all 24 tokens", "--response-tokens", "--fill-disk"):
        assert word in outcome.message
    assert not out.parent.exists()
    refused = run_vpd("extract", *arguments, **EXTRACT, response_tokens=24)
    assert refused.code == 1
    assert "--response-tokens" not in refused.message
    assert run_vpd("extract", *arguments, **EXTRACT | {"max_new_tokens": 500}).code == 1
    assert not out.parent.exists()
    assert vpd("extract", *arguments, **EXTRACT, fill_disk=True)["num_written"] == 2
    set_free(monkeypatch, 0)
    assert vpd("extract", *arguments, **EXTRACT)["num_present"] == 2


@pytest.mark.parametrize(
    ("settings", "more"),
    [({}, 0), ({"codec": "fp8"}, -1), ({"limit": 1}, -1), ({"response_tokens": 1}, -1)],
    ids=str,
)
def test_a_disk_that_is_large_enough_is_not(
    settings: dict[str, Any],
    more: int,
    tiny_llama: Path,
    tmp_path: Path,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """Only whole chunks are stored, so shorter answers matter only if they save a chunk."""
    prompts = write_jsonl(tmp_path / "some.jsonl", [{"prompt": "the quick brown fox jumps over the dog"}] * 2)
    common = EXTRACT | {"max_new_tokens": 60, "duplicates": "keep"}
    changed = common | settings
    needed = vpd("estimate", tiny_llama, prompts, "--out", out, **common)["bytes"]["raw"]
    set_free(monkeypatch, needed + more)
    estimated = vpd("estimate", tiny_llama, prompts, "--out", out, **changed)
    assert estimated["free_bytes"] == needed + more >= estimated["bytes"][changed.get("codec", "raw")]
    assert run_vpd("extract", tiny_llama, prompts, "--out", out, **changed).code == 0


def test_free_space_is_looked_at_where_the_cache_will_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=len(str(folder))))
    assert open_storage(tmp_path / "not" / "yet").free_bytes() == len(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert open_storage("not/yet").free_bytes() == len(str(tmp_path))
    assert open_storage("s3://bucket/cache").free_bytes() is None


def test_people_see_the_same(
    tiny_llama: Path, tiny_prompts: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "200")
    set_free(monkeypatch, 400 << 10)
    arguments = ["estimate", tiny_llama, tiny_prompts, "--out", out, *as_flags(EXTRACT)]
    found, outcome = vpd(*arguments, codec="fp8"), run_vpd(*arguments, codec="fp8")
    lines = {line.split("│")[1].strip(): line for line in outcome.out.splitlines() if line.startswith("│")}
    assert f"{len(PROMPTS)} to come, 0 there" in lines["sequences"]
    assert f"{found['num_tokens']} ({len(PROMPTS)} records tokenized; at most" in lines["tokens"]
    assert ["<- chosen" in lines[f"as {codec}"] for codec in CODECS] == [codec == "fp8" for codec in CODECS]
    too_large = [found["bytes"][codec] > 400 << 10 for codec in CODECS]
    assert ["more than is free" in lines[f"as {codec}"] for codec in CODECS] == too_large
    assert {True, False} == set(too_large)
    assert "400.0 KiB" in lines["free"]
    assert "--tokens-per-second" in lines["time"]
    assert "answers of 5 tokens" in run_vpd(*arguments, response_tokens=5).out
    prompts = write_jsonl(tmp_path / "answered.jsonl", ANSWERED)
    given = run_vpd("estimate", tiny_llama, prompts, *as_flags({**EXTRACT, "mode": "given", "tokens_per_second": 10}))
    assert "answers as given" in given.out
    assert " at 10 tokens/s" in given.out
