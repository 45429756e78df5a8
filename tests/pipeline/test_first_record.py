"""How the first record was read: shown before anything runs, kept with the cache; and what the template asks for."""

import datetime
import json
from pathlib import Path

import pytest
from support.extracting import tokens
from support.tiny import CHATML, END, EXTRACT, run_vpd, vpd, write_jsonl
from vpd.data.cache.cache import Cache
from vpd.stages.extract.preview import GAP, MAX_CHARACTERS, MAX_RUNS, shorten

RECORD = {"id": 7, "messages": [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "the sun."}]}
SEEN = f"<|im_start|>user\nwhy?{END}\n<|im_start|>assistant\n"


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "prompts.jsonl", [RECORD])


def test_the_first_record_is_shown_with_its_mask_and_its_keys(tiny_llama: Path, prompts: Path, tmp_path: Path):
    given = {**EXTRACT, "mode": "given"}
    place = ["--out", tmp_path / "cache"]
    estimated = run_vpd("estimate", tiny_llama, prompts, *place, "--json", **given)
    extracted = run_vpd("extract", tiny_llama, prompts, *place, **given)
    inspected = run_vpd("inspect", tmp_path / "cache")
    assert json.loads(estimated.out)["num_sequences"] == 1
    for shown in (estimated.err, extracted.err, inspected.out):
        assert f"{SEEN}[[the sun.{END}]]\n" in shown
        assert f"({prompts}, row 1)" in shown
        assert "keys used: messages\nleft out: id\n" in shown
    kept = vpd("inspect", tmp_path / "cache")["first_record"]
    assert (kept["used"], kept["left_out"], kept["row"]) == (["messages"], ["id"], 1)
    assert kept["runs"] == [[SEEN, False], [f"the sun.{END}", True], ["\n", False]]


def test_the_first_prompt_is_shown_where_the_target_answers(tiny_llama: Path, prompts: Path, tmp_path: Path):
    assert f"{SEEN}\nkeys used" in run_vpd("estimate", tiny_llama, prompts, "--out", tmp_path / "c", **EXTRACT).err


def test_what_is_kept_of_a_long_record_is_short():
    runs = [("x" * 5000, i % 2 == 1) for i in range(99)]
    found = shorten(runs)
    assert len(found) == MAX_RUNS + 1
    assert found[MAX_RUNS // 2] == (GAP, False)
    assert all(len(text) <= MAX_CHARACTERS + len(GAP) for text, _ in found)
    assert shorten(runs[:2]) == tuple((f"{'x' * 200}{GAP}{'x' * 200}", mark) for _, mark in runs[:2])


def test_a_template_that_reads_the_clock_keeps_the_date_of_the_cache(tiny_llama: Path, prompts: Path, tmp_path: Path):
    template = tmp_path / "clock.jinja"
    template.write_text("{{ strftime_now('%d %B %Y') + '\n' }}" + CHATML)
    arguments = ["extract", tiny_llama, prompts, "--out", tmp_path / "cache"]
    settings = {**EXTRACT, "mode": "given", "chat_template": template}
    begun = run_vpd(*arguments, **settings, template_date="2020-02-29")
    assert "reads the clock; it is given 2020-02-29" in begun.err
    cache = Cache.open(tmp_path / "cache")
    assert cache.manifest.generation["template_date"] == "2020-02-29"
    assert cache.manifest.rendered_sample.startswith("29 February 2020\n")
    # Another day, the same command continues the cache with the same date.
    write_jsonl(prompts, [RECORD, {**RECORD, "messages": [{"role": "user", "content": "so?"}, RECORD["messages"][1]]}])
    assert vpd(*arguments, **settings)["num_written"] == 1
    first, second = (ids[:12] for ids in tokens(tmp_path / "cache").values())
    assert first == second
    other = run_vpd(*arguments, **settings, template_date="2021-01-01")
    assert other.code == 1
    assert "2021-01-01" in other.message
    today = run_vpd("estimate", *arguments[1:3], "--out", tmp_path / "new", **settings)
    assert datetime.date.today().isoformat() in today.err
    wrong = run_vpd(*arguments, **settings, template_date="29.2.2020")
    assert wrong.code == 2
    assert "template_date" in wrong.message


def test_the_templates_end_of_turn_ends_answers_too(tiny_llama: Path, prompts: Path, tmp_path: Path):
    target = tmp_path / "target"
    target.mkdir()
    for path in tiny_llama.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    for name in ("config.json", "generation_config.json"):
        content = json.loads((target / name).read_text())
        (target / name).write_text(json.dumps({**content, "eos_token_id": 5}))
    content = json.loads((target / "tokenizer_config.json").read_text())
    (target / "tokenizer_config.json").write_text(json.dumps({**content, "eos_token": "<|im_start|>"}))
    outcome = run_vpd("extract", target, prompts, "--out", tmp_path / "cache", **{**EXTRACT, "mode": "given"})
    assert f"ends an answer with {END}" in outcome.err
    assert f"[[the sun.{END}]]\n" in outcome.err
    assert Cache.open(tmp_path / "cache").manifest.generation["end_of_turn_id"] == 1
    # The answers of the target end there too: the target's head likes this token.
    many = write_jsonl(tmp_path / "many.jsonl", [{"prompt": f"name {i}"} for i in range(6)])
    found = vpd("extract", target, many, "--out", tmp_path / "answers", **{**EXTRACT, "max_new_tokens": 100})
    assert found["num_written"] == 6
    rows = Cache.open(tmp_path / "answers").rows
    assert {row.final_token_id for row in rows if row.finish_reason == "stop"} == {1}
