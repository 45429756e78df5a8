"""Extraction with the real transformers engine: the cache holds what plain transformers computes."""

# T tokens with a state, S tokens of the sequence, K layers, H hidden width, V vocabulary
import copy
import re
import shutil
import tracemalloc
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from support.extracting import by_row, make_config, no_engine, run, tokens
from support.tiny import CHATML, END, MULTI_TURN_ROW, NUM_LAYERS, PROMPTS, TEXT_ROW, VOCAB, render, write_jsonl
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from vpd.data.cache.arrays import NO_CHOICE
from vpd.data.cache.cache import Cache
from vpd.data.cache.reader import CachedSequence
from vpd.data.errors import PromptError
from vpd.data.prompts.records import PromptRecord
from vpd.stages.extract.inputs import make_chat, plan_prompts
from vpd.stages.extract.left_out import LeftOut
from vpd.stages.extract.plan import start_conversations
from vpd.stages.extract.run import ExtractReport
from vpd.stages.extract.target import load_target


class Reference(NamedTuple):
    """Plain transformers on one sequence, all tokens at once."""

    hidden_TKH: Tensor
    argmax_T: Tensor


class Model:
    """The target as transformers loads it."""

    def __init__(self, folder: Path):
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()

    @torch.inference_mode()
    def forward(self, token_ids: list[int]) -> Reference:
        raw: list[Tensor] = []
        last = self.model.model.layers[-1]
        # `hidden_states` ends with the state after the final norm, so the last layer's own output is hooked.
        hook = last.register_forward_hook(lambda module, args, output: raw.append(output))
        out = self.model(torch.tensor([token_ids]), output_hidden_states=True)
        hook.remove()
        states = [*out.hidden_states[1:-1], *raw]
        return Reference(torch.cat(states).transpose(0, 1), out.logits[0].argmax(dim=-1))

    @torch.inference_mode()
    def greedy(self, prompt_ids: list[int], max_new_tokens: int) -> list[int]:
        prompt = torch.tensor([prompt_ids])
        mask = torch.ones_like(prompt)
        out = self.model.generate(prompt, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False)
        return out[0, len(prompt_ids) :].tolist()


def check_states(found_TKH: Tensor, expected_TKH: Tensor) -> None:
    """Equal up to the rounding to bfloat16 of float32 states, whose sums are in another order."""
    assert (found_TKH.dtype, found_TKH.shape) == (torch.bfloat16, expected_TKH.shape)
    torch.testing.assert_close(found_TKH.float(), expected_TKH, rtol=2**-7, atol=2**-9)
    cosine_TK = torch.cosine_similarity(found_TKH.float(), expected_TKH, dim=-1)
    assert cosine_TK.min() > 0.9999


class Extracted(NamedTuple):
    folder: Path
    model: Model
    report: ExtractReport


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def extracted(
    request: pytest.FixtureRequest, tiny_prompts: Path, tmp_path_factory: pytest.TempPathFactory
) -> Extracted:
    """All layers of a target over all prompts."""
    target = request.getfixturevalue(f"tiny_{request.param}")
    folder = tmp_path_factory.mktemp("extracted") / "cache"
    report = run(target, tiny_prompts, folder)
    return Extracted(folder, Model(target), report)


# What is stored


def asked_for(sequence: CachedSequence, argmax_T: Tensor) -> list[int]:
    """The choices that training may ask for, each before a supervised token; `NO_CHOICE` in place of the others."""
    following = [*sequence.loss_mask_S.tolist()[1:], False]
    return [choice if following[i] else NO_CHOICE for i, choice in enumerate(argmax_T.tolist())]


def test_every_record_is_stored_once(extracted: Extracted):
    assert sorted(by_row(extracted.folder)) == list(range(1, len(PROMPTS) + 1))
    report = extracted.report
    assert (report.num_written, report.num_present, report.skipped) == (len(PROMPTS), 0, {})
    assert report.num_tokens == Cache.open(extracted.folder).num_tokens


def test_states_of_every_layer_are_those_of_a_plain_forward_pass(extracted: Extracted):
    for sequence in by_row(extracted.folder).values():
        expected = extracted.model.forward(sequence.token_ids_S[: sequence.row.num_tokens].tolist())
        check_states(sequence.hidden_TKH, expected.hidden_TKH)


def test_the_stored_choices_are_the_argmax_of_a_plain_forward_pass(extracted: Extracted):
    for sequence in by_row(extracted.folder).values():
        expected = extracted.model.forward(sequence.token_ids_S[: sequence.row.num_tokens].tolist())
        assert sequence.target_argmax_T.tolist() == asked_for(sequence, expected.argmax_T)
    assert extracted.report.num_argmax_differing == 0


def test_answers_are_what_generate_writes(extracted: Extracted):
    num_generated = 0
    for sequence in by_row(extracted.folder).values():
        token_ids, prompt_len = sequence.token_ids_S.tolist(), sequence.row.prompt_len
        assert token_ids[prompt_len:] == extracted.model.greedy(token_ids[:prompt_len], 24)
        assert token_ids[-1] == sequence.row.final_token_id
        num_generated += len(token_ids) - prompt_len
    assert extracted.report.num_checked == num_generated


def test_an_answer_ends_with_the_end_token_or_at_the_limit(
    extracted: Extracted, tiny_tokenizer: PreTrainedTokenizerFast
):
    end = tiny_tokenizer.get_vocab()[END]
    reasons = set()
    for sequence in by_row(extracted.folder).values():
        row = sequence.row
        ended = row.final_token_id == end
        assert row.finish_reason == ("stop" if ended else "length")
        assert ended or row.num_tokens + 1 - row.prompt_len == 24
        reasons.add(row.finish_reason)
    assert reasons == {"stop", "length"}


def test_prompts_are_the_rendered_records_and_answers_are_supervised(
    extracted: Extracted, tiny_tokenizer: PreTrainedTokenizerFast
):
    sequences = by_row(extracted.folder)
    for row, record in enumerate(PROMPTS, start=1):
        if row == MULTI_TURN_ROW:
            continue
        messages = record.get("messages") or [{"role": "user", "content": record.get("prompt", "")}]
        text = record["text"] if row == TEXT_ROW else render(tiny_tokenizer, *messages)
        sequence = sequences[row]
        prompt_len = sequence.row.prompt_len
        assert tiny_tokenizer.decode(sequence.token_ids_S[:prompt_len].tolist()) == text
        num_answered = len(sequence.token_ids_S) - prompt_len
        assert sequence.loss_mask_S.tolist() == [False] * prompt_len + [True] * num_answered
        assert sequence.row.num_supervised == num_answered


def test_of_two_turns_both_answers_are_supervised(extracted: Extracted, tiny_tokenizer: PreTrainedTokenizerFast):
    sequence = by_row(extracted.folder)[MULTI_TURN_ROW]
    turns = PROMPTS[MULTI_TURN_ROW - 1]["turns"]
    first = {"role": "user", "content": turns[0]}
    prompt_ids = tiny_tokenizer(render(tiny_tokenizer, first))["input_ids"]
    answer = str(tiny_tokenizer.decode(extracted.model.greedy(prompt_ids, 24), skip_special_tokens=True))
    second = [{"role": "assistant", "content": answer}, {"role": "user", "content": turns[1]}]
    prompt_len = sequence.row.prompt_len
    asked = render(tiny_tokenizer, first, *second)
    assert sequence.token_ids_S[:prompt_len].tolist() == tiny_tokenizer(asked)["input_ids"]
    earlier = tiny_tokenizer(answer + END)["input_ids"]
    expected = [False] * len(prompt_ids) + [True] * len(earlier)
    expected += [False] * (prompt_len - len(expected))
    assert sequence.loss_mask_S[:prompt_len].tolist() == expected
    assert sequence.loss_mask_S[prompt_len:].all()
    assert sequence.token_ids_S[:prompt_len][torch.tensor(expected)].tolist() == earlier


def test_the_manifest_says_what_the_cache_was_made_from(extracted: Extracted, tiny_tokenizer: PreTrainedTokenizerFast):
    manifest = Cache.open(extracted.folder).manifest
    assert manifest.layer_ids == tuple(range(NUM_LAYERS))
    assert manifest.vllm_layer_ids == tuple(range(1, NUM_LAYERS + 1))
    assert manifest.generation["mode"] == "generate"
    assert manifest.rendered_sample == render(tiny_tokenizer, {"role": "user", "content": PROMPTS[0]["prompt"]})
    for record in Cache.open(extracted.folder).commits().values():
        assert (record["engine"]["name"], record["engine"]["dtype"]) == ("transformers", "float32")


def test_bfloat16_is_what_the_target_computes_in_when_asked(tiny_llama: Path, four_prompts: Path, tmp_path: Path):
    run(tiny_llama, four_prompts, tmp_path / "cache", dtype="bfloat16")
    (record,) = Cache.open(tmp_path / "cache").commits().values()
    assert record["engine"]["dtype"] == "bfloat16"


@pytest.mark.parametrize("change", [{"machinery": {"max_in_flight": number}} for number in (1, 3)], ids=str)
def test_scheduling_does_not_change_the_tokens(
    change: dict[str, Any], tiny_llama: Path, four_prompts: Path, tmp_path: Path
):
    run(tiny_llama, four_prompts, tmp_path / "one", max_new_tokens=6)
    run(tiny_llama, four_prompts, tmp_path / "other", max_new_tokens=6, **change)
    assert tokens(tmp_path / "one") == tokens(tmp_path / "other")


def test_sampling_repeats_with_its_seed_alone(tiny_llama: Path, four_prompts: Path, tmp_path: Path):
    settings: dict[str, Any] = {"max_new_tokens": 8, "temperature": 0.8, "top_k": 20, "top_p": 0.9}
    for name, change in [("one", {}), ("same", {}), ("seed", {"seed": 1}), ("greedy", {"temperature": 0.0})]:
        report = run(tiny_llama, four_prompts, tmp_path / name, **settings | change)
        assert (report.num_checked > 0) == (name == "greedy")
    assert tokens(tmp_path / "one") == tokens(tmp_path / "same")
    assert tokens(tmp_path / "one") != tokens(tmp_path / "seed")
    assert tokens(tmp_path / "one") != tokens(tmp_path / "greedy")


# Given responses

GIVEN: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "which fox?"}, {"role": "assistant", "content": "the quick one"}]},
    {"prompt": "name a dog", "response": "the lazy dog"},
    {"text": "the quick brown fox jumps"},
]


@pytest.mark.parametrize("max_len", [128, 25])
def test_given_responses_are_prefilled(
    max_len: int, tiny_llama: Path, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
):
    prompts = write_jsonl(tmp_path / "given.jsonl", GIVEN)
    report = run(tiny_llama, prompts, tmp_path / "cache", mode="given", max_len=max_len)
    assert (report.num_written, report.num_checked) == (3, 0)
    model = Model(tiny_llama)
    fox, dog = (render(tiny_tokenizer, {"role": "user", "content": text}) for text in ("which fox?", "name a dog"))
    parts = [
        (fox, "the quick one" + END, "\n"),
        (dog, "the lazy dog" + END, "\n"),
        ("the", " quick brown fox jumps", ""),
    ]
    for row, texts in enumerate(parts, start=1):
        ids = [tiny_tokenizer(text)["input_ids"] if text else [] for text in texts]
        if row == 3:  # all tokens of a text but the first are supervised
            whole = tiny_tokenizer("".join(texts))["input_ids"]
            ids = [whole[:1], whole[1:], []]
        sequence = by_row(tmp_path / "cache")[row]
        assert sequence.token_ids_S.tolist() == [*ids[0], *ids[1], *ids[2]][:max_len]
        mask = [False] * len(ids[0]) + [True] * len(ids[1]) + [False] * len(ids[2])
        assert sequence.loss_mask_S.tolist() == mask[:max_len]
        expected = model.forward(sequence.token_ids_S.tolist())
        check_states(sequence.hidden_TKH, expected.hidden_TKH)
        assert sequence.target_argmax_T.tolist() == asked_for(sequence, expected.argmax_T)
        is_cut = len(mask) > max_len
        assert (sequence.row.final_token_id, sequence.row.finish_reason) == (None, "given, cut" if is_cut else "given")
        assert sequence.row.prompt_len == len(ids[0])


# Records that can't be used


class Unusable(NamedTuple):
    id: str
    record: object
    reason: str
    changes: dict[str, Any]


UNUSABLE = [
    Unusable("no-form", {"number": 7}, "unreadable record", {}),
    Unusable("too-long", {"prompt": "fox " * 200}, "too long", {}),
    Unusable("too-long-text", {"text": "fox " * 200}, "too long", {}),
    Unusable("no-user", {"messages": [{"role": "system", "content": "be brief"}]}, "no user message", {}),
    Unusable("given-without-answer", {"prompt": "why?"}, "no assistant token", {"mode": "given"}),
    Unusable("unknown-token", {"prompt": "a <|new|> fox"}, "token beyond the vocabulary", {}),
    Unusable("unknown-token-text", {"text": "a <|new|> fox"}, "token beyond the vocabulary", {}),
    Unusable(
        "unknown-token-given",
        {"prompt": "why?", "response": "<|new|> fox"},
        "token beyond the vocabulary",
        {"mode": "given"},
    ),
    Unusable("given-cut", {"prompt": "fox " * 200, "response": "yes"}, "no assistant token", {"mode": "given"}),
]


@pytest.fixture(scope="module")
def with_a_new_token(
    tiny_llama: Path, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """`tiny_llama` with a larger vocabulary, in which `<|new|>` is the first token without an embedding."""
    folder = shutil.copytree(tiny_llama, tmp_path_factory.mktemp("new") / "llama")
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_tokens([f"<|spare {i}|>" for i in range(VOCAB - len(tokenizer))])
    tokenizer.add_tokens(["<|new|>"])
    assert tokenizer.get_vocab()["<|new|>"] == VOCAB
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("place", [0, 1], ids=["first", "last"])
@pytest.mark.parametrize("case", UNUSABLE, ids=lambda case: case.id)
def test_a_record_that_cannot_be_used_is_named_or_skipped_and_counted(
    case: Unusable, place: int, tiny_llama: Path, with_a_new_token: Path, tmp_path: Path
):
    target = with_a_new_token if "new" in str(case.record) else tiny_llama
    records: list[object] = [GIVEN[1]]
    records.insert(place, case.record)
    prompts = write_jsonl(tmp_path / "prompts.jsonl", records)
    settings: dict[str, Any] = {"max_new_tokens": 2, **case.changes}
    with pytest.raises(PromptError, match=rf"prompts\.jsonl(, row |:){place + 1}: "):
        run(target, prompts, tmp_path / "cache", **settings)
    report = run(target, prompts, tmp_path / "skipping", skip_bad=True, **settings)
    assert (report.num_written, report.skipped) == (1, {case.reason: 1})
    (first,) = report.left_out.firsts.values()
    assert re.search(rf"prompts\.jsonl(, row |:){place + 1}: ", first)
    assert list(by_row(tmp_path / "skipping")) == [2 - place]


REFUSING = CHATML.replace(
    "{% for m in messages %}",
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system message') }}{% endif %}",
)


@pytest.mark.parametrize("place", [0, 1], ids=["first", "last"])
def test_a_record_that_the_template_refuses_is_named_or_skipped(place: int, tiny_llama: Path, tmp_path: Path):
    template = tmp_path / "template.jinja"
    template.write_text(REFUSING)
    records: list[object] = [PROMPTS[0]]
    records.insert(place, PROMPTS[8])
    prompts = write_jsonl(tmp_path / "prompts.jsonl", records)
    settings: dict[str, Any] = {"max_new_tokens": 2, "chat_template": str(template)}
    report = run(tiny_llama, prompts, tmp_path / "cache", skip_bad=True, **settings)
    assert (report.num_written, report.skipped) == (1, {"unusable with this chat template": 1})
    assert "no system message" in next(iter(report.left_out.firsts.values()))
    with pytest.raises(PromptError, match=rf"prompts\.jsonl(, row |:){place + 1}: "):
        run(tiny_llama, prompts, tmp_path / "other", **settings)


REWRITING = CHATML.replace("m.content", "('?' if m.role == 'assistant' and add_generation_prompt else '') + m.content")


@pytest.mark.parametrize("skip_bad", [False, True])
def test_a_conversation_that_goes_wrong_in_a_later_turn_costs_no_other(
    skip_bad: bool, tiny_llama: Path, tmp_path: Path
):
    """This template renders earlier answers differently when it asks for the next answer."""
    template = tmp_path / "template.jinja"
    template.write_text(REWRITING)
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [*PROMPTS[:2], PROMPTS[MULTI_TURN_ROW - 1], PROMPTS[2]])
    settings: dict[str, Any] = {"chat_template": str(template), "skip_bad": skip_bad}
    if skip_bad:
        report = run(tiny_llama, prompts, tmp_path / "cache", **settings)
        assert (report.num_written, report.skipped) == (3, {"unusable after some turns": 1})
    else:
        with pytest.raises(PromptError, match=r"prompts\.jsonl, row 3: "):
            run(tiny_llama, prompts, tmp_path / "cache", **settings)
        assert sorted(by_row(tmp_path / "cache")) == [1, 2, 4]


def test_an_unknown_token_in_a_later_turn_costs_no_other(with_a_new_token: Path, tmp_path: Path):
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"turns": ["name a dog", "a <|new|> one"]}, PROMPTS[0]])
    report = run(with_a_new_token, prompts, tmp_path / "cache", skip_bad=True)
    assert (report.num_written, report.skipped) == (1, {"unusable after some turns": 1})


def test_what_waits_takes_few_bytes_a_token(tiny_llama: Path, tmp_path: Path):
    """A worker keeps the tokens of a small prompt set in memory."""
    answers = [{"prompt": f"why {i}?", "response": "jumps over the dog " * 60} for i in range(50)]
    prompts = write_jsonl(tmp_path / "prompts.jsonl", answers)
    config = make_config(mode="given", max_len=4096)
    target = load_target(str(tiny_llama))
    chat = make_chat(target, config)
    records = [each for each in plan_prompts([prompts], config).read() if isinstance(each, PromptRecord)]
    left_out = LeftOut()
    for _ in start_conversations(records[:1], chat, target, config, left_out):
        pass  # fills the caches of the tokenizer and the template
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    planned = list(start_conversations(records, chat, target, config, left_out))
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    num_tokens = sum(conversation.expected_len(None) for conversation in planned)
    assert num_tokens > 10_000
    assert after - before < 10 * num_tokens


def test_a_bad_record_costs_no_engine_start(tiny_llama: Path, tmp_path: Path):
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [PROMPTS[0], {"prompt": "fox " * 200}])
    with pytest.raises(PromptError):
        run(tiny_llama, prompts, tmp_path / "cache", wrap=no_engine)


def test_a_conversation_that_outgrows_max_len_is_counted(tiny_llama: Path, tmp_path: Path):
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [PROMPTS[0], {"turns": ["name a dog"] * 3}])
    report = run(tiny_llama, prompts, tmp_path / "cache", max_len=60)
    assert (report.num_written, report.skipped) == (1, {"too long after some turns": 1})


def test_an_answer_of_one_token_holds_nothing_to_train_on(tiny_llama: Path, four_prompts: Path, tmp_path: Path):
    report = run(tiny_llama, four_prompts, tmp_path / "cache", max_new_tokens=1)
    assert (report.num_written, report.skipped) == (0, {"empty response": 4})
    assert tokens(tmp_path / "cache") == {}
