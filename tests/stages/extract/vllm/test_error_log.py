"""What is told of the errors that vLLM's processes log."""

import os
from contextlib import closing

import pytest
from vpd.stages.extract.vllm.error_log import ErrorLog

TRACEBACK = """Worker hit an exception.
Traceback (most recent call last):
  File "executor.py", line 1063, in worker_busy_loop
    output = func(*args)
{raised}

During handling of the above exception, another exception occurred:

RuntimeError: Worker failed, see the stack trace above
"""


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, None),
        ("Worker died without a word\n", None),
        (TRACEBACK.format(raised="AssertionError: only BF16."), "AssertionError: only BF16"),
        (TRACEBACK.format(raised="torch.OutOfMemoryError: 3 GiB. "), "torch.OutOfMemoryError: 3 GiB"),
        (TRACEBACK.format(raised="NotImplementedError"), "NotImplementedError"),
        (
            "Error in inspecting model\nsubprocess.CalledProcessError: Command failed.\n"
            "RuntimeError: Error raised in subprocess:\nModuleNotFoundError: No module named 'torchvision'\n",
            "ModuleNotFoundError: No module named 'torchvision'",
        ),
    ],
)
def test_the_first_exception_is_the_reason(text: str | None, reason: str | None):
    with closing(ErrorLog()) as log:
        if text is not None:
            log._path.write_text(text)
        assert log.first_error() == reason
    assert not log._folder.exists()


def test_a_configuration_of_the_users_stays(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VLLM_LOGGING_CONFIG_PATH", "mine.json")
    with closing(ErrorLog()) as log, log.written():
        assert not list(log._folder.iterdir())
    assert os.environ["VLLM_LOGGING_CONFIG_PATH"] == "mine.json"
