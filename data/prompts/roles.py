"""Names of roles in data sets, and the roles that chat templates know."""

from __future__ import annotations

from functools import lru_cache

CALL = "call"
"""Role of a turn whose content is a call of a function: an assistant's turn."""
NAMES = {
    "system": "system system_prompt system_message",
    "developer": "developer",
    "user": "user human prompter question customer",
    "assistant": "assistant gpt chatgpt gpt_3.5 gpt_4 bard bing claude gemini llama ai ai_assistant bot chatbot model "
    "llm agent answer",
    "tool": "tool tools function observation observations environment env ipython api tool_response tool_responses "
    "tool_result tool_results tool_output function_response function_responses function_result function_return "
    "function_output execution_result",
    CALL: "function_call function_calls functioncall tool_call tool_calls",
}
ROLES = {name: role for role, names in NAMES.items() for name in names.split()}
"""Role name in a data set -> role; see `canonical_role` for the spelling."""


@lru_cache(maxsize=4096)
def canonical_role(name: str) -> str:
    """A role's name in lower case, with underscores between words."""
    return "_".join(name.strip().lower().replace("-", " ").replace("_", " ").split())
