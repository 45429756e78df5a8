"""The recipes of docs/extending.md: each patch fits the tree, touches as many files as the page says, and works."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from pages import ROOT

PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
COUNTS = dict(re.findall(r"^\| \[(.+)\]\(#.+\) \| (\d+) \|$", PAGE, re.MULTILINE))
PATCHES = dict(re.findall(r"^## (.+?)\n.*?^```diff\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
TRIED = {
    "A sampler": """
from vpd.stages.train.config import PrefixConfig
from vpd.stages.train.prefix import BlockFacts, prefix_distribution
import torch
facts = BlockFacts(torch.tensor([3, 1]), 4, None)
found = prefix_distribution(PrefixConfig(sampler="uniform"), facts)
torch.testing.assert_close(found, torch.tensor([[1 / 3, 1 / 3, 1 / 3], [1, 0, 0]]))
""",
    "A codec": """
import torch
from vpd.data.cache.codecs import CODECS
from vpd.stages.extract.config import ExtractConfig
codec = CODECS[ExtractConfig(codec="round2").codec]
states = torch.tensor([[[1.0, 1.2, 1.3, -5.6]]]).bfloat16()
stored = torch.from_numpy(codec.encode(states))
assert codec.decode(stored, 4).tolist() == [[[1.0, 1.25, 1.25, -6.0]]]
""",
    "A record form": """
from vpd.data.prompts.forms import known_keys, parse_record
content = parse_record({"riddle": "why?", "solved": "so"})
assert [(each.role, each.content) for each in content.messages] == [("user", "why?"), ("assistant", "so")]
assert {"riddle", "solved"} <= set(known_keys())
""",
    "A branch policy": """
import torch
from vpd.stages.evaluate.branches import POLICIES, CycleFacts
from vpd.stages.evaluate.config import EvalConfig
(name,) = EvalConfig(policies=["shortest"]).policies
facts = CycleFacts(torch.zeros(2, 3, 5, dtype=torch.long), torch.full((2, 3, 5), 0.1), num_branches=2)
assert POLICIES[name](facts).prefix_len_NB.tolist() == [[0, 1], [0, 1]]
""",
    "An engine": """
from vpd.stages.extract.config import ExtractConfig
from vpd.stages.extract.engines import plan_engine
assert plan_engine(ExtractConfig(engine="sdpa"))["name"] == "sdpa"
""",
    "Another checkpoint format": """
import json, sys, tempfile
from pathlib import Path
from safetensors.torch import save_file
from vpd.stages.drafter.checkpoint import load_drafter
from vpd.stages.drafter.model import Drafter
from vpd.stages.drafter.shape import DrafterShape
shape = DrafterShape(num_layers=1, hidden_size=8, num_attention_heads=2, num_key_value_heads=1, head_dim=4,
    intermediate_size=8, rms_norm_eps=1e-6, rope_theta=1e4, max_position_embeddings=64, vocab_size=16, block_size=4,
    mask_token_id=1, target_layer_ids=(1,), num_target_layers=4)
folder = Path(tempfile.mkdtemp())
(folder / "config.json").write_text(json.dumps(shape.to_json(training_mode="dflash", prefix_weight_base=None)))
weights = Drafter(shape).state_dict()
save_file({f"model.{name}": value.contiguous() for name, value in weights.items()}, folder / "model.safetensors")
assert load_drafter(folder).state_dict().keys() == weights.keys()
""",
    "Eq. 7's weights": """
import torch
from types import SimpleNamespace
from vpd.stages.train.objective import position_weights
blocks = SimpleNamespace(predicted_NG=torch.tensor([[False, True, True]]), distance_NG=torch.tensor([[-1, 0, 1]]))
assert position_weights(blocks, tau=1.0).tolist() == [[0.0, 1.0, 0.5]]
""",
    "A setting": """
import torch
from vpd.stages.train.config import TrainConfig
from vpd.stages.train.optimization import make_optimizers
(optimizer,) = make_optimizers(torch.nn.Linear(2, 2), TrainConfig(adam_eps=1e-6))
assert {group["eps"] for group in optimizer.param_groups} == {1e-6}
""",
    "A per-token array": """
from vpd.data.cache.arrays import TOKEN_ARRAYS
from vpd.stages.extract.conversations import FinishedSequence
from vpd.data.prompts.records import PromptRecord
record = PromptRecord("id", "file", 1, (), "text")
finished = FinishedSequence(record=record, token_ids=[1, 2, 3], loss_mask=[0, 0, 1], target_argmax=[2, 3, 4],
    hidden_TKH=None, prompt_len=2, final_token_id=None, finish_reason="stop", num_checked=0, num_argmax_differing=0)
assert finished.as_new().arrays["is_prompt"] == [1, 1, 0]
""",
    "A command": """
from click.testing import CliRunner
from vpd.pipeline.cli import main
outcome = CliRunner().invoke(main, ["count", "no-such-cache"])
assert outcome.exit_code == 1 and "expected a cache at no-such-cache" in outcome.output
""",
}
"""What shows that a patch works, for each heading of the page."""


def test_every_recipe_is_tried():
    assert [*PATCHES] == [*TRIED]
    assert [name.lower() for name in COUNTS] == [name.lower() for name in TRIED]


TRY_ALL = """
import json, sys, traceback
for name, script in json.loads(sys.argv[1]).items():
    try:
        exec(script, {})
        print(json.dumps([name, ""]))
    except Exception:
        print(json.dumps([name, traceback.format_exc()]))
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Heading -> traceback, or nothing, from a copy of the tree that has all patches."""
    folder = tmp_path_factory.mktemp("recipes")
    tree = folder / "vpd"
    for name in ("configs", "data", "pipeline", "stages"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "__init__.py", tree)
    for patch in PATCHES.values():
        subprocess.run(["git", "apply", "-p1", "-"], cwd=tree, input=patch, text=True, check=True)
    script = [sys.executable, "-c", TRY_ALL, json.dumps(TRIED)]
    environment = os.environ | {"PYTHONPATH": str(folder)}
    done = subprocess.run(script, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return dict(json.loads(line) for line in done.stdout.splitlines())


@pytest.mark.parametrize("name", TRIED)
def test_a_recipe_works(name: str, outcomes: dict[str, str]):
    assert outcomes[name] == ""


@pytest.mark.parametrize("name", TRIED)
def test_a_recipe_touches_as_many_files_as_the_page_says(name: str):
    touched = re.findall(r"^\+\+\+ b/.+$", PATCHES[name], re.MULTILINE)
    assert str(len(touched)) == {key.lower(): count for key, count in COUNTS.items()}[name.lower()]
