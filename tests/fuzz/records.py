"""Records that are right, in the usual forms."""

from typing import Any

CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 3}}}
RECORDS: list[dict[str, Any]] = [
    {"prompt": "name a fox", "response": "the quick fox"},
    {"prompt": [{"role": "user", "content": "name a dog"}], "response": "the lazy dog"},
    {"text": "the quick brown fox jumps"},
    {"messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "why?"},
                  {"role": "assistant", "content": "the sum."}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "what is "}, {"type": "text", "text": "two?"}]},
                  {"role": "assistant", "content": "five.", "reasoning_content": "two and three"}]},
    {"messages": [{"role": "user", "content": "two and three?"},
                  {"role": "assistant", "content": "i add", "tool_calls": [CALL]},
                  {"role": "tool", "tool_call_id": "c1", "content": "5"}, {"role": "assistant", "content": "five."}],
     "tools": [{"type": "function", "function": {"name": "add", "description": "a sum", "parameters": {}}}]},
    {"conversations": [{"from": "human", "value": "name a dog"}, {"from": "gpt", "value": "lazy."},
                       {"from": "human", "value": "and a fox?"}, {"from": "gpt", "value": "brown."}],
     "system": "be brief"},
    {"turns": ["name a dog", "and another one"]},
    {"instruction": "say why it is so", "input": "the sky is blue", "output": "the sun."},
    {"prompt": "which one?", "chosen": "the first", "rejected": "the second"},
]  # fmt: skip
"""One record of each usual form. A mode that needs an answer, or a question, may refuse some."""
