"""vLLM's scheduler without the token that extraction would speculate with.

vLLM's `extract_hidden_states` method "drafts" each sampled token once more, so that every decode step computes two
tokens a request and throws one away. On a GPU that is hidden by the reading of the weights, and its CUDA graphs are
made for two; on a CPU it costs up to half of the speed.

This module is imported inside the engine's processes, by name.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import DraftTokenIds


class OneTokenScheduler(Scheduler):
    """Schedules one token a request and decode step; the states are cached all the same."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._num_drafted, self.num_spec_tokens = self.num_spec_tokens, 0

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        output = super().schedule(*args, **kwargs)
        output.num_spec_tokens_to_schedule = self._num_drafted  # what caches the states is part of drafting
        return output

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        pass
