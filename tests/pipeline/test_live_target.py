"""Which target `vpd eval --target` takes."""

import json
import shutil

from support.place import Place, check_message
from support.tiny import run_vpd


def test_another_target_than_the_caches_is_refused(place: Place):
    outcome = run_vpd(*place.evaluate("--holdout", 1, "--target", place.qwen3))
    check_message(outcome, 1, [f"expected the target of the cache, {place.llama}", str(place.qwen3), "extract.adapter"])


def test_a_changed_config_is_another_target(place: Place):
    copy = shutil.copytree(place.llama, place.folder / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-2}))
    check_message(run_vpd(*place.evaluate("--holdout", 1, "--target", copy)), 1, ["another config", str(copy)])
