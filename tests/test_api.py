"""The Python API, from opening a cache to a replay, against what the command line and the files say."""

import ast
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import vpd
import zarr
from support.tiny import vpd as run
from vpd.pipeline import api
from vpd.stages.drafter.checkpoint import drafter_fingerprint
from vpd.stages.train.checkpoints import find_drafter

ROOT = Path(__file__).parents[1]
HOLDOUT = 0.6


@pytest.fixture
def cache(drafted_cache: Path) -> vpd.Cache:
    return vpd.open_cache(drafted_cache)


@pytest.fixture(scope="module")
def replayed(drafted_cache: Path, first_run: Path) -> dict:
    """What `vpd eval` finds."""
    return run("eval", drafted_cache, "--first-drafter", first_run, "--drafter", first_run, "--holdout", HOLDOUT)


def test_all_names_are_there_and_say_what_they_do():
    assert [*vpd.__all__] == sorted([*api.__all__, "__version__"])
    imports = [node for node in ast.walk(ast.parse(Path(vpd.__file__).read_text())) if isinstance(node, ast.ImportFrom)]
    (for_type_checkers,) = [node.names for node in imports if node.module == "pipeline.api"]
    assert [each.name for each in for_type_checkers] == api.__all__
    assert vpd.__version__ == "0.1.0"
    for name in api.__all__:
        found = getattr(vpd, name)
        assert found is getattr(api, name)
        assert found.__doc__
        if not isinstance(found, type):
            assert "return" in found.__annotations__
    with pytest.raises(AttributeError, match="module 'vpd' has no attribute 'nothing'"):
        vpd.nothing  # noqa: B018 # pyright: ignore[reportAttributeAccessIssue]


def test_sequences_are_tensors_of_what_is_stored(cache: vpd.Cache, drafted_cache: Path):
    sequences = [*cache]
    assert len(sequences) == len(cache) > 0
    for sequence in sequences:
        row = sequence.row
        group: Any = zarr.open_group(drafted_cache / "parts" / f"{row.part}.zarr", mode="r")
        tokens = slice(row.first_row, row.first_row + row.num_tokens)
        stored = {
            name: np.asarray(group[name][tokens]) for name in ("hidden", "token_ids", "loss_mask", "target_argmax")
        }
        hidden = torch.from_numpy(stored["hidden"].view(np.int16)).view(torch.bfloat16)
        assert torch.equal(sequence.hidden_TKH, hidden)
        assert sequence.hidden_TKH.shape == (row.num_tokens, len(cache.manifest.layer_ids), cache.manifest.hidden_size)
        final = [] if row.final_token_id is None else [row.final_token_id]
        assert sequence.token_ids_S.tolist() == stored["token_ids"].tolist() + final
        assert sequence.loss_mask_S.tolist() == stored["loss_mask"].astype(bool).tolist() + [True] * len(final)
        assert sequence.target_argmax_T.tolist() == stored["target_argmax"].tolist()


def test_drafted_blocks_are_the_recorded_first_drafts(cache: vpd.Cache, first_run: Path):
    recorded = vpd.open_first_drafts(cache)
    drafter, pieces = vpd.load_drafter(first_run), vpd.load_pieces(cache)
    for sequence in cache:
        anchors_N = vpd.anchors_of(sequence.loss_mask_S, sequence.row.num_tokens)
        tokens_NJA, probs_NJA = vpd.draft_blocks(drafter, pieces, sequence, anchors_N)
        drafts = recorded.read(sequence.row)
        assert torch.equal(tokens_NJA[..., 0], drafts.tokens_TGA[anchors_N, :, 0].long())
        # Recorded probabilities are float16.
        torch.testing.assert_close(probs_NJA, drafts.probs_TGA[anchors_N].float(), atol=1e-3, rtol=1e-3)


def test_a_redrafted_block_keeps_its_prefix(cache: vpd.Cache, first_run: Path):
    drafter, pieces = vpd.load_drafter(first_run), vpd.load_pieces(cache)
    sequence = next(iter(cache))
    anchors_N = vpd.anchors_of(sequence.loss_mask_S, sequence.row.num_tokens)
    draft_NJ = vpd.draft_blocks(drafter, pieces, sequence, anchors_N)[0][..., 0]
    for length in range(draft_NJ.shape[1] + 1):
        found_NJ = vpd.redraft_blocks(
            drafter, pieces, sequence, anchors_N, draft_NJ, torch.full_like(anchors_N, length)
        )
        assert torch.equal(found_NJ[:, :length], draft_NJ[:, :length])
        assert length > 0 or torch.equal(found_NJ, draft_NJ)  # Nothing is shown: the first draft again.


def test_writing_first_drafts_gives_those_of_vpd_draft(
    tiny_cache: Path, drafted_cache: Path, first_run: Path, tmp_path: Path
):
    cache = vpd.open_cache(shutil.copytree(tiny_cache, tmp_path / "cache"))
    written = vpd.write_first_drafts(cache, first_run)
    expected = vpd.open_first_drafts(vpd.open_cache(drafted_cache))
    assert written.fingerprint == expected.fingerprint
    for row in cache.rows:
        for ours, theirs in zip(written.read_arrays(row).values(), expected.read_arrays(row).values(), strict=True):
            assert np.array_equal(ours, theirs)


def test_drafts_of_your_own(cache: vpd.Cache, drafted_cache: Path, tmp_path: Path):
    """Drafts of any origin, here copies, are drafts for training and for the replay."""
    copy = vpd.open_cache(shutil.copytree(drafted_cache, tmp_path / "cache"))
    recorded = vpd.open_first_drafts(cache)
    own = vpd.create_first_drafts(copy, "abcd", recorded.facts | {"name": "mine"})
    for part in own.missing_parts():
        with own.writer(part) as writer:
            for row in copy.rows_of_part(part):
                writer.append(recorded.read_arrays(row))
            writer.commit({})
    found = vpd.open_first_drafts(copy, "abcd")
    assert found.missing_parts() == []
    for row in copy.rows:
        assert torch.equal(found.accept_lengths(row), recorded.accept_lengths(row))
    with pytest.raises(vpd.VpdError, match="Name one of them"):
        vpd.open_first_drafts(copy)


def test_a_replay_is_that_of_vpd_eval(cache: vpd.Cache, first_run: Path, replayed: dict):
    report = vpd.replay(cache, first_run, first_run, holdout=HOLDOUT)
    own = drafter_fingerprint(find_drafter(first_run))
    assert {**report.to_json(), "drafters": {"first": own, "second": own}} == replayed
    recorded = vpd.replay(cache, vpd.open_first_drafts(cache), first_run, holdout=HOLDOUT)
    assert recorded.alpha["first"] == replayed["alpha"]["first"]
    assert vpd.replay(cache, first_run, holdout=HOLDOUT).alpha.keys() == {"first", "first_tree", "first_as_second"}


def test_a_wrong_setting_is_named(cache: vpd.Cache, drafted_cache: Path, first_run: Path):
    with pytest.raises(vpd.VpdError, match=r"eval\.policy: unknown setting"):
        vpd.replay(cache, first_run, policy="paper")
    with pytest.raises(vpd.VpdError, match=r"draft\.stride"):
        vpd.write_first_drafts(cache, first_run, stride=0)
    with pytest.raises(vpd.VpdError, match=r"read\.num_threads"):
        vpd.open_cache(drafted_cache, num_threads="many")
    with pytest.raises(vpd.VpdError, match="expected a cache"):
        vpd.open_cache(drafted_cache / "nowhere")


@pytest.mark.parametrize("page", ["README.md", "docs/python-api.md"])
def test_the_examples_run(
    page: str, drafted_cache: Path, first_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """One after another, in a folder that has what they name: `cache`, `runs/first` and `runs/vp`."""
    shutil.copytree(drafted_cache, tmp_path / "cache")
    for run_name in ("first", "vp"):
        shutil.copytree(first_run, tmp_path / "runs" / run_name)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert blocks
    exec(compile("\n".join(blocks), page, "exec"), {})
