"""A target whose classes are in its own folder."""

import json
import shutil
import sys
from pathlib import Path

import pytest

CODE = {
    "configuration_own.py": "from transformers import LlamaConfig\n\nclass OwnConfig(LlamaConfig):\n"
    '    model_type = "own"\n',
    "modeling_own.py": "from transformers import LlamaForCausalLM\n\nfrom .configuration_own import OwnConfig\n\n"
    "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n",
}
CLASSES = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}


def save_own_code(llama: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a Llama whose classes are in its folder; what transformers copies and loads goes with the test."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(place / "modules"))
    monkeypatch.setattr("builtins.input", lambda text: pytest.fail(f"a question on the terminal: {text}"))
    monkeypatch.setattr(sys, "path", [*sys.path])  # transformers adds the folder above
    for name in [each for each in sys.modules if each.startswith("transformers_modules")]:
        monkeypatch.delitem(sys.modules, name)
    folder = shutil.copytree(llama, place / "own")
    for name, content in CODE.items():
        (folder / name).write_text(content)
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {"model_type": "own", "auto_map": CLASSES}
    path.write_text(json.dumps(config | {"architectures": ["OwnForCausalLM"]}))
    return folder
