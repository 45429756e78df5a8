"""The plan of a large prompt set: rows are read when their unit is claimed, and counted once."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.extracting import by_row, make_config, no_engine, run, tokens
from support.tiny import EXTRACT, as_flags, run_vpd, snapshot, write_jsonl
from vpd.data.cache.cache import Cache
from vpd.data.cache.work import DONE, WORK
from vpd.data.errors import PromptError
from vpd.data.prompts.records import PromptSource
from vpd.pipeline.extraction import ExtractJob, prepare
from vpd.pipeline.ray_workers import add_report, run_worker
from vpd.stages.extract.inputs import make_chat, plan_prompts
from vpd.stages.extract.manifest import plan_layers, plan_manifest
from vpd.stages.extract.plan import ExtractPlan, plan_extraction
from vpd.stages.extract.target import load_target

UNIT, SAMPLED = 4, 2
RECORDS: list[dict[str, Any]] = [{"prompt": f"why {i}?"} for i in range(18)]
SETTINGS: dict[str, Any] = {"max_new_tokens": 3, "machinery": {"unit_records": UNIT, "max_in_flight": 1}}
LONG = {"prompt": "fox " * 200}


@pytest.fixture(autouse=True)
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every prompt set of these tests is a large one."""
    monkeypatch.setattr("vpd.stages.extract.plan.CHECKED_ROWS", UNIT)
    monkeypatch.setattr("vpd.stages.extract.plan.SAMPLE_ROWS", SAMPLED)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gets the number of every row that is read."""
    rows: list[int] = []
    whole = PromptSource.read

    def read(source: PromptSource, chosen: Sequence[int] | None = None) -> Any:
        assert chosen is not None
        rows.extend(chosen)
        return whole(source, chosen)

    monkeypatch.setattr(PromptSource, "read", read)
    return rows


def plan(target_folder: Path, prompts: Path, out: Path, **changes: Any) -> ExtractPlan:
    config = make_config(**SETTINGS | changes)
    target, source = load_target(str(target_folder)), plan_prompts([prompts], config)
    chat = make_chat(target, config)
    manifest = plan_manifest(target, plan_layers(target, config), chat, source, config)
    return plan_extraction(out, manifest, source, chat, target, config)


def count_done(folder: Path) -> int:
    return len([*(folder / WORK).glob(f"*{DONE}")])


def test_a_plan_reads_the_first_unit_and_a_sample(tiny_llama: Path, tmp_path: Path, read: list[int]):
    planned = plan(tiny_llama, write_jsonl(tmp_path / "a.jsonl", RECORDS), tmp_path / "cache")
    assert set(read) == {*range(UNIT), 4, 11}
    assert [unit.prepared is not None for unit in planned.units] == [True, False, False, False, False]
    assert (planned.num_left, planned.num_expected) == (18, 18)
    assert not (tmp_path / "cache").exists()


def test_a_large_prompt_set_gives_the_sequences_of_a_small_one(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    prompts = write_jsonl(tmp_path / "a.jsonl", RECORDS)
    report = run(tiny_llama, prompts, tmp_path / "large", **SETTINGS)
    monkeypatch.setattr("vpd.stages.extract.plan.CHECKED_ROWS", 100)
    run(tiny_llama, prompts, tmp_path / "small", **SETTINGS)
    assert tokens(tmp_path / "large") == tokens(tmp_path / "small")
    assert (report.num_written, report.num_left) == (18, 0)
    assert count_done(tmp_path / "large") == count_done(tmp_path / "small") == 5


def test_what_is_finished_is_not_read_again(tiny_llama: Path, tmp_path: Path, read: list[int]):
    prompts = write_jsonl(tmp_path / "a.jsonl", RECORDS)
    run(tiny_llama, prompts, tmp_path / "cache", **SETTINGS)
    read.clear()
    before = snapshot(tmp_path / "cache")
    report = run(tiny_llama, prompts, tmp_path / "cache", wrap=no_engine, **SETTINGS)
    assert set(read) == set(range(UNIT)), "for the rendered sample alone"
    assert (report.num_present, report.num_written, report.skipped) == (18, 0, {})
    assert snapshot(tmp_path / "cache") == before


def test_sequences_that_an_earlier_plan_made_are_found_and_start_no_engine(tiny_llama: Path, tmp_path: Path):
    """The notes of the work are those of other units."""
    prompts = write_jsonl(tmp_path / "a.jsonl", RECORDS)
    run(tiny_llama, prompts, tmp_path / "cache", **SETTINGS)
    for note in (tmp_path / "cache" / WORK).glob(f"*{DONE}"):
        note.unlink()
    for num_done in (4, 4):  # the first unit is looked at before a unit is claimed
        report = run(tiny_llama, prompts, tmp_path / "cache", wrap=no_engine, **SETTINGS)
        assert (report.num_present, report.num_written) == (18, 0)
        assert count_done(tmp_path / "cache") == num_done


MIXED = [*RECORDS[:6], RECORDS[1], LONG, *RECORDS[6:10], {"no": "form"}, RECORDS[8], RECORDS[2], *RECORDS[10:]]
LEFT_OUT = {"duplicate": 3, "too long": 1, "unreadable record": 1}


def test_every_row_is_counted_once_by_name_and_again_by_later_runs(tiny_llama: Path, tmp_path: Path):
    prompts = write_jsonl(tmp_path / "mixed.jsonl", MIXED)
    found = plan(tiny_llama, prompts, tmp_path / "cache", skip_bad=True)
    assert found.num_left == len(MIXED)
    report = run(tiny_llama, prompts, tmp_path / "cache", skip_bad=True, **SETTINGS)
    assert (report.num_written, report.num_present, report.skipped) == (18, 0, LEFT_OUT)
    for _ in range(2):
        report = run(tiny_llama, prompts, tmp_path / "cache", wrap=no_engine, skip_bad=True, **SETTINGS)
        assert (report.num_written, report.num_present, report.skipped) == (0, 18, LEFT_OUT)


def test_a_late_bad_record_ends_the_run_and_keeps_what_was_finished(tiny_llama: Path, tmp_path: Path):
    records = [*RECORDS[:9], {"no": "form"}, *RECORDS[9:]]
    prompts, cache = write_jsonl(tmp_path / "bad.jsonl", records), tmp_path / "cache"
    with pytest.raises(PromptError, match=r"bad\.jsonl:10: no known form.* --skip-bad"):
        run(tiny_llama, prompts, cache, **SETTINGS)
    assert sorted(by_row(cache)) == [*range(1, 9)]
    assert [path.name for path in (cache / WORK).iterdir() if not path.name.endswith(DONE)] == []
    with pytest.raises(PromptError, match=r"bad\.jsonl:10: "):
        run(tiny_llama, prompts, cache, wrap=no_engine, **SETTINGS)
    report = run(tiny_llama, prompts, cache, skip_bad=True, **SETTINGS)
    assert (report.num_written, report.num_present, report.skipped) == (10, 8, {"unreadable record": 1})


def test_a_bad_record_of_the_sample_costs_no_engine_start(tiny_llama: Path, tmp_path: Path):
    prompts = write_jsonl(tmp_path / "bad.jsonl", [*RECORDS[:11], {"no": "form"}, *RECORDS[12:]])
    with pytest.raises(PromptError, match=r"bad\.jsonl:12: "):
        run(tiny_llama, prompts, tmp_path / "cache", wrap=no_engine, **SETTINGS)
    assert not (tmp_path / "cache").exists()


def test_what_the_sample_lets_expect(tiny_llama: Path, tmp_path: Path):
    half = [each for i in range(20) for each in (RECORDS[i % 18] | {"prompt": f"why {i}?"}, {"no": i})]
    prompts = write_jsonl(tmp_path / "half.jsonl", half[1:-1])
    settings = {"skip_bad": True, "machinery": {"unit_records": 1}}
    found = plan(tiny_llama, prompts, tmp_path / "cache", **settings)
    assert found.num_left == 37
    assert found.num_expected in (18, 37), "of the two rows one or both have a record"


def test_lost_sequences_are_made_again(tiny_llama: Path, tmp_path: Path):
    prompts = write_jsonl(tmp_path / "a.jsonl", RECORDS)
    run(tiny_llama, prompts, tmp_path / "cache", part_mib=1, **SETTINGS)
    run(tiny_llama, prompts, tmp_path / "other", limit=8, **SETTINGS)
    work = tmp_path / "other" / WORK
    for note in (tmp_path / "cache" / WORK).glob(f"*{DONE}"):  # as if all units had been finished here
        (work / note.name).write_bytes(note.read_bytes())
    report = run(tiny_llama, prompts, tmp_path / "other", **SETTINGS)
    assert (report.num_present, report.num_written) == (8, 10)
    assert tokens(tmp_path / "other") == tokens(tmp_path / "cache")


def test_kept_repetitions_have_ids_of_their_own_in_every_unit(tiny_llama: Path, tmp_path: Path):
    prompts = write_jsonl(tmp_path / "a.jsonl", [*RECORDS[:6], *RECORDS[:3]])
    report = run(tiny_llama, prompts, tmp_path / "cache", temperature=1.0, **SETTINGS)
    assert (report.num_written, report.skipped) == (9, {})
    ids = sorted(row.seq_id for row in Cache.open(tmp_path / "cache").rows)
    assert sum(seq_id.endswith("-1") for seq_id in ids) == 3


def test_a_shuffled_share_goes_on(tiny_llama: Path, tmp_path: Path):
    prompts = write_jsonl(tmp_path / "a.jsonl", RECORDS)
    first = run(tiny_llama, prompts, tmp_path / "cache", shuffle_seed=1, limit=7, **SETTINGS)
    more = run(tiny_llama, prompts, tmp_path / "cache", shuffle_seed=1, limit=12, **SETTINGS)
    assert (first.num_written, more.num_present, more.num_written) == (7, 7, 5)


def test_any_number_of_workers_count_every_row_once(tiny_llama: Path, tmp_path: Path):
    prompts = write_jsonl(tmp_path / "mixed.jsonl", MIXED)
    settings = make_config(**SETTINGS, skip_bad=True)
    job = ExtractJob(str(tiny_llama), (str(prompts),), str(tmp_path / "cache"), settings)
    report = prepare(job).plan.report
    for _ in range(3):
        add_report(report, run_worker(job))
    assert (report.num_written, report.skipped) == (18, LEFT_OUT)


def test_the_command_counts_and_checks_the_space_for_a_large_set(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    prompts = write_jsonl(tmp_path / "a.jsonl", RECORDS)
    arguments = ["extract", tiny_llama, prompts, "--out", tmp_path / "cache", *as_flags(EXTRACT)]
    arguments += ["--json", "--set", f"extract.machinery.unit_records={UNIT}"]
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(total=1 << 40, used=0, free=1000))
        outcome = run_vpd(*arguments)
        assert (outcome.code, "18 sequences" in outcome.message) == (1, True)
    outcome = run_vpd(*arguments)
    assert outcome.result["num_written"] == 18
    assert "extract: 18/18" in outcome.err
