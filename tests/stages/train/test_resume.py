"""Training runs: a resumed run equals an unbroken one bit for bit, and changes that would alter it are refused."""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support.compare import cut_short
from support.tiny import DRAFTER, TRAIN, Damage, append, run_vpd, snapshot, vpd
from vpd.data.cache.cache import Cache
from vpd.data.cache.writer import StateWriter
from vpd.data.errors import DrafterError
from vpd.pipeline.config import load_config
from vpd.stages.drafter.checkpoint import load_drafter, load_shape
from vpd.stages.train.checkpoints import find_drafter, list_checkpoints, load_state
from vpd.stages.train.loop import run_together
from vpd.stages.train.plan import make_trainer
from vpd.stages.train.trainer import StepResult, Trainer

Flags = dict[str, Any]
SETTINGS: Flags = {**DRAFTER, **TRAIN, "max_steps": 6, "save_every": 3, "batch_tokens": 100}
CLOCK = {"tokens_per_second", "data_wait"}
DFLASH: Flags = {"objective": "dflash"}


def train(cache: Path, run: Path, **changes: Any) -> Flags:
    return vpd("train", cache, "--out", run, **{**SETTINGS, **changes})


def metrics(run: Path) -> list[Flags]:
    """The lines of metrics.jsonl without the fields that depend on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in CLOCK} for line in lines]


def check_same_state(one: Any, other: Any) -> None:
    """Equality of nested states, tensors bit for bit."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            check_same_state(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for ours, theirs in zip(one, other, strict=True):
            check_same_state(ours, theirs)
    else:
        assert one == other


def check_same_run(one: Path, other: Path) -> None:
    assert metrics(one) == metrics(other)
    checkpoints = [list_checkpoints(run)[-1] for run in (one, other)]
    assert checkpoints[0].name == checkpoints[1].name
    for name in ("model.safetensors", "config.json"):
        assert (checkpoints[0] / name).read_bytes() == (checkpoints[1] / name).read_bytes()
    check_same_state(*map(load_state, checkpoints))


@pytest.fixture(scope="module")
def finished(tiny_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps with checkpoints at 3 and 6."""
    run = tmp_path_factory.mktemp("finished") / "run"
    train(tiny_cache, run, **DFLASH)
    return run


@pytest.fixture
def half(finished: Path, tmp_path: Path) -> Path:
    """A run that was stopped after its third step."""
    run = shutil.copytree(finished, tmp_path / "half")
    shutil.rmtree(run / "checkpoints" / "step-0000006")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:3]))
    return run


# Resuming


class Case(NamedTuple):
    id: str
    flags: Flags


CASES = [
    Case("dflash", DFLASH),
    Case("posterior", {}),
    Case("mixture", {"prefix_sampler": "mixture"}),
    Case("topk-failure", {"prefix_sampler": "topk", "anchor_sampler": "failure"}),
    Case("sampled-vocabulary", {"prefix_sampler": "visible-geometric", "num_sampled_tokens": 32, "labels": "argmax"}),
]


@pytest.mark.parametrize("stop_before", [4, 6])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_an_interrupted_run_ends_as_an_unbroken_one(
    case: Case, stop_before: int, drafted_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    train(drafted_cache, tmp_path / "unbroken", **case.flags)
    original = Trainer.finish_step

    def interrupted(trainer: Trainer) -> StepResult | None:
        if trainer.step + 1 == stop_before:
            raise KeyboardInterrupt
        return original(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "finish_step", interrupted)
        run = tmp_path / "run"
        outcome = run_vpd("train", drafted_cache, "--out", run, **SETTINGS, **case.flags)
    assert (outcome.code, "the same command continues" in outcome.err) == (130, True)
    assert [line["step"] for line in metrics(run)] == list(range(1, stop_before))
    assert [path.name for path in list_checkpoints(run)] == ["step-0000003"]
    assert train(drafted_cache, run, **case.flags)["step"] == 6
    check_same_run(tmp_path / "unbroken", run)


def test_a_trainer_resumes_from_the_latest_checkpoint(finished: Path, half: Path, tiny_cache: Path):
    config = load_config(half / "config.yaml", {})
    trainer = make_trainer(Cache.open(tiny_cache), half, config.drafter, config.train)
    assert (trainer.step, trainer.num_steps) == (3, 6)
    losses: list[float] = []
    assert run_together([trainer], lambda _, line: losses.append(line["loss"]))
    assert losses == [line["loss"] for line in metrics(finished)[3:]]
    check_same_state(load_state(list_checkpoints(half)[-1]), load_state(list_checkpoints(finished)[-1]))


def test_what_a_run_began_with_is_not_needed_again(first_run: Path, tiny_cache: Path, tmp_path: Path):
    begun = shutil.copytree(find_drafter(first_run), tmp_path / "begun")
    flags = {**DFLASH, "init": begun}
    train(tiny_cache, tmp_path / "unbroken", **flags)
    run = shutil.copytree(tmp_path / "unbroken", tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "step-0000006")
    shutil.rmtree(begun)
    train(tiny_cache, run, **flags)
    check_same_run(tmp_path / "unbroken", run)


def test_a_finished_run_does_not_change(finished: Path, tiny_cache: Path):
    before = snapshot(finished)
    assert train(tiny_cache, finished, **DFLASH)["step"] == 6
    after = snapshot(finished)
    assert {path for path, content in after.items() if before.get(path) != content} <= {"provenance.json"}
    assert before.keys() == after.keys()


@pytest.mark.parametrize("name", ["log_every", "save_every", "keep"])
def test_what_computes_nothing_may_change(name: str, finished: Path, half: Path, tiny_cache: Path):
    train(tiny_cache, half, **DFLASH, **{name: 1 if name != "log_every" else 2})
    logged = {line["step"]: line for line in metrics(half)}
    assert logged.keys() == ({1, 2, 3, 4, 6} if name == "log_every" else {1, 2, 3, 4, 5, 6})
    assert [logged[step] for step in logged] == [metrics(finished)[step - 1] for step in logged]
    steps = [int(path.name[-7:]) for path in list_checkpoints(half)]
    assert steps == {"log_every": [3, 6], "save_every": [5, 6], "keep": [6]}[name]


@pytest.mark.parametrize("verify", ["always", "never"])
def test_how_the_cache_is_read_may_change(verify: str, finished: Path, half: Path, tiny_cache: Path):
    settings = {"read.verify": verify, "read.num_threads": 3}
    flags = [flag for name, value in settings.items() for flag in ("--set", f"{name}={value}")]
    vpd("train", tiny_cache, "--out", half, *flags, **SETTINGS, **DFLASH)
    check_same_run(finished, half)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("drafter.num_layers", 2),
        ("drafter.block_size", 8),
        ("drafter.mask_token_id", 310),
        ("train.objective", "vp"),
        ("train.prefix.beta", 0.5),
        ("train.lr", 1e-4),
        ("train.schedule", "linear"),
        ("train.max_steps", 7),
        ("train.batch_tokens", 3),
        ("train.holdout", 0.4),
        ("train.seed", 1),
    ],
)
def test_a_changed_setting_is_refused_by_its_name(key: str, value: object, half: Path, tiny_cache: Path):
    before = snapshot(half)
    flags = SETTINGS | DFLASH | {"prefix_sampler": "boundary" if key != "train.objective" else "geometric"}
    outcome = run_vpd(
        "train",
        tiny_cache,
        "--out",
        half,
        "--set",
        f"{key}={value}",
        **{name: flag for name, flag in flags.items() if name != key.rpartition(".")[2]},
    )
    assert outcome.code == 2
    section, *rest = key.split(".")
    name = f"{section}.{rest[0]}"
    for word in (str(half), f"{name}: the run has", str(value), "another --out"):
        assert word in outcome.message
    assert snapshot(half) == before


def add_sequence(cache: Path) -> None:
    opened = Cache.open(cache)
    sequence = opened.read(opened.rows[0])
    writer = StateWriter(opened, 1 << 20, {})
    append(
        writer,
        seq_id="another",
        source="more.jsonl",
        source_row=1,
        hidden_TKH=sequence.hidden_TKH,
        token_ids=sequence.token_ids_S[: sequence.row.num_tokens].tolist(),
        loss_mask=sequence.loss_mask_S[: sequence.row.num_tokens].int().tolist(),
        target_argmax=sequence.target_argmax_T.tolist(),
        prompt_len=sequence.row.prompt_len,
        final_token_id=sequence.row.final_token_id,
        finish_reason=sequence.row.finish_reason,
    )
    writer.commit()


def test_a_changed_cache_is_refused(half: Path, tiny_cache: Path, tmp_path: Path):
    cache = shutil.copytree(tiny_cache, tmp_path / "cache")
    fingerprint = Cache.open(cache).fingerprint
    add_sequence(cache)
    before = snapshot(half)
    outcome = run_vpd("train", cache, "--out", half, **SETTINGS, **DFLASH)
    assert outcome.code == 2
    for word in ("cache: the run was started from", fingerprint, Cache.open(cache).fingerprint, "another --out"):
        assert word in outcome.message
    assert snapshot(half) == before


# Effects of training


def test_a_step_without_an_anchor_is_skipped(tiny_cache: Path, tmp_path: Path):
    """With this `max_len` some sequences have no anchor; training leaves them out."""
    prompt_lens = sorted(row.prompt_len for row in Cache.open(tiny_cache).rows)
    max_len = prompt_lens[len(prompt_lens) // 2]
    result = train(tiny_cache, tmp_path / "run", **DFLASH, max_len=max_len, batch_tokens=1, max_steps=20, log_every=1)
    assert result["step"] == 20
    logged = [line["step"] for line in metrics(tmp_path / "run")]
    assert 0 < len(logged) < 20
    assert all(torch.isfinite(value).all() for value in load_drafter(find_drafter(tmp_path / "run")).parameters())


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(DFLASH, id="dflash"),
        pytest.param({"prefix_sampler": "geometric"}, id="geometric"),
        pytest.param({"prefix_sampler": "visible-geometric"}, id="visible-geometric"),
        pytest.param({"prefix_sampler": "boundary"}, id="boundary"),
    ],
)
def test_thirty_steps_lower_the_loss(flags: Flags, drafted_cache: Path, tmp_path: Path):
    train(drafted_cache, tmp_path / "run", **flags, max_steps=30, save_every=30)
    losses = [line["loss"] for line in metrics(tmp_path / "run")]
    assert len(losses) == 30
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_passes_do_not_change_the_loss(drafted_cache: Path, tmp_path: Path):
    flags = {"anchor_sampler": "failure", "batch_tokens": 200}
    for name, tokens_per_pass in (("one-by-one", 1), ("together", 65536)):
        train(drafted_cache, tmp_path / name, **flags, tokens_per_pass=tokens_per_pass)
    alone, together = ([line["loss"] for line in metrics(tmp_path / name)] for name in ("one-by-one", "together"))
    assert len(alone) == 6
    # Float32 sums in another order, over six steps that build on each other.
    assert together == pytest.approx(alone, rel=1e-4)


def test_the_samplers_draw_different_prefixes(drafted_cache: Path, tmp_path: Path):
    losses = []
    for sampler in ("geometric", "visible-geometric", "boundary"):
        train(drafted_cache, tmp_path / sampler, prefix_sampler=sampler, max_steps=1)
        losses.append(metrics(tmp_path / sampler)[0]["loss"])
    train(drafted_cache, tmp_path / "dflash", **DFLASH, max_steps=1)
    assert len({*losses, metrics(tmp_path / "dflash")[0]["loss"]}) == 4


# The run's folder


def test_the_folder_holds_config_provenance_metrics_and_checkpoints(finished: Path, tiny_cache: Path):
    checkpoint_files = {"config.json", "model.safetensors", "training_state.pt"}
    expected = {f"checkpoints/step-000000{step}/{name}" for step in (3, 6) for name in checkpoint_files}
    assert snapshot(finished).keys() == expected | {"config.yaml", "provenance.json", "metrics.jsonl"}
    lines = metrics(finished)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    counted = {"num_labels", "num_skipped", "accept_length", "accept_rate"}
    assert lines[0].keys() == {"step", "epoch", "loss", "lr", "grad_norm"} | counted
    provenance = json.loads((finished / "provenance.json").read_text())
    cache = Cache.open(tiny_cache)
    assert provenance["cache_fingerprint"] == cache.fingerprint
    assert provenance["target_fingerprint"] == cache.manifest.target_fingerprint
    assert provenance["cache"] == str(tiny_cache)
    assert provenance["target"] == cache.manifest.target
    assert {"command", "time", "python"} < provenance.keys()
    assert provenance["versions"].keys() >= {"vpd", "torch", "transformers"}


def test_the_resolved_config_names_every_setting_and_loads(finished: Path):
    config = load_config(finished / "config.yaml", {})
    assert (config.train.objective, config.train.max_steps, config.train.lr) == ("dflash", 6, TRAIN["lr"])
    assert (config.drafter.block_size, config.drafter.num_layers) == (4, 1)
    tree = yaml.safe_load((finished / "config.yaml").read_text())
    assert tree.keys() == {"drafter", "train"}
    for section, content in tree.items():
        assert content.keys() == set(type(getattr(config, section)).model_fields)


def test_a_checkpoint_is_a_drafter_in_the_public_form(finished: Path, tiny_cache: Path):
    checkpoint = list_checkpoints(finished)[-1]
    config = json.loads((checkpoint / "config.json").read_text())
    manifest = Cache.open(tiny_cache).manifest
    assert config["dflash_config"]["target_layer_ids"] == list(manifest.layer_ids)
    assert config["dflash_config"]["training_mode"] == "dflash"
    assert (config["block_size"], config["num_hidden_layers"], config["hidden_size"]) == (4, 1, manifest.hidden_size)
    assert config["dflash_config"]["mask_token_id"] == 300  # the first slot that the tokenizer leaves unused
    state = load_state(checkpoint)
    stored = load_file(checkpoint / "model.safetensors")
    assert stored.keys() == state["weights"].keys() == load_drafter(checkpoint).state_dict().keys()
    # Training divides the features by their scale; a checkpoint's weights are for undivided features.
    for name, value in stored.items():
        scale = state["feature_rms"] if name == "fc.weight" else 1.0
        assert torch.equal(value, (state["weights"][name] / scale).bfloat16()), name


def test_a_vp_drafter_says_that_it_is_one(drafted_cache: Path, tmp_path: Path):
    train(drafted_cache, tmp_path / "run", max_steps=1, prefix_beta=0.8)
    config = json.loads((find_drafter(tmp_path / "run") / "config.json").read_text())
    assert config["dflash_config"]["training_mode"] == "vp_drafter"
    assert config["dflash_config"]["prefix_weight_base"] == 0.8


def test_a_run_stands_for_its_latest_checkpoint(finished: Path):
    assert find_drafter(finished).name == "step-0000006"
    assert find_drafter(finished / "checkpoints/step-0000003").name == "step-0000003"
    with pytest.raises(DrafterError, match=r"expected a drafter in .*found neither.*vpd train"):
        find_drafter(finished / "checkpoints")


def test_a_checkpoint_that_was_being_written_is_ignored(finished: Path, half: Path, tiny_cache: Path):
    aside = half / "checkpoints" / ".step-0000006.123.tmp"
    aside.mkdir()
    (aside / "config.json").write_text("{")
    assert [path.name for path in list_checkpoints(half)] == ["step-0000003"]
    assert find_drafter(half).name == "step-0000003"
    train(tiny_cache, half, **DFLASH)
    check_same_run(finished, half)


def test_metrics_of_steps_that_are_computed_again_are_dropped(finished: Path, half: Path, tiny_cache: Path):
    with open(half / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "loss": 99.0}\n{"step": 5, "lo')
    train(tiny_cache, half, **DFLASH)
    assert metrics(half) == metrics(finished)


@pytest.mark.parametrize(
    "damage",
    [Damage("gone", None), Damage("emptied", 0.0, cut=True), Damage("cut-short", 0.5, cut=True)],
    ids=lambda damage: damage.id,
)
def test_a_broken_training_state_is_named(damage: Damage, half: Path, tiny_cache: Path):
    path = half / "checkpoints/step-0000003/training_state.pt"
    damage.apply(path)
    outcome = run_vpd("train", tiny_cache, "--out", half, **SETTINGS, **DFLASH)
    assert outcome.code == 1
    assert str(path) in outcome.message


def test_a_run_without_provenance_is_named(half: Path, tiny_cache: Path):
    (half / "provenance.json").unlink()
    outcome = run_vpd("train", tiny_cache, "--out", half, **SETTINGS, **DFLASH)
    assert outcome.code in (1, 2)
    assert str(half / "provenance.json") in outcome.message


def test_a_training_state_of_another_version_is_refused(half: Path):
    path = half / "checkpoints/step-0000003"
    state = load_state(path)
    torch.save(state | {"version": 99}, path / "training_state.pt")
    with pytest.raises(DrafterError, match="version 99, this vpd reads 2"):
        load_state(path)


def test_the_mask_token_of_a_begun_drafter_is_taken_over(tiny_cache: Path, tmp_path: Path):
    """Blocks masked with another token would be new to the drafter; a run goes on when what it began from is gone."""
    flags = {**DRAFTER, **TRAIN, **DFLASH, "save_every": 1}
    vpd("train", tiny_cache, "--out", tmp_path / "first", **flags, mask_token_id=311, max_steps=1)
    flags |= {"init": tmp_path / "first", "max_steps": 2}
    vpd("train", tiny_cache, "--out", tmp_path / "second", **flags)
    cut = cut_short(tmp_path / "second", tmp_path / "cut", 1)
    shutil.rmtree(tmp_path / "first")
    vpd("train", tiny_cache, "--out", cut, **flags)
    found = [load_shape(checkpoint).mask_token_id for checkpoint in list_checkpoints(cut)]
    assert found == [311, 311]
