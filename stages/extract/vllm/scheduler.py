"""vLLM's scheduler without the speculated token of extraction.

vLLM's `extract_hidden_states` method "drafts" each sampled token once more. So every decode step computes two tokens
per request and discards one. On a GPU this costs nothing, because reading the weights takes longer; and the CUDA graphs
are made for two tokens. On a CPU this costs up to half of the speed. Layers with a recurrent state take their state
from the place of the token that was accepted last, so they need the two tokens.

The engine's processes import this module by its name.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import MambaSpec
from vllm.v1.outputs import DraftTokenIds


class OneTokenScheduler(Scheduler):
    """Schedules one token per request and decode step, unless layers are recurrent; the states are cached as before."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        groups = self.kv_cache_config.kv_cache_groups
        self._is_recurrent = any(isinstance(group.kv_cache_spec, MambaSpec) for group in groups)
        if not self._is_recurrent:
            self._num_drafted, self.num_spec_tokens = self.num_spec_tokens, 0

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        output = super().schedule(*args, **kwargs)
        if not self._is_recurrent:
            output.num_spec_tokens_to_schedule = self._num_drafted  # drafting caches the states
        return output

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        if self._is_recurrent:
            super().update_draft_token_ids(draft_token_ids)
