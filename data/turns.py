"""The assistant's turns in a rendered conversation, found by rendering the conversation up to each of them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from operator import eq

from .errors import PromptError
from .prompts.messages import Message
from .template import Span

HEADER_LEN = 8
"""Characters by which the place before an answer is known again, if the template writes no header."""

Render = Callable[[Sequence[Message], bool], str]
"""`ChatTemplate.render`."""


def turn_spans(
    render: Render, messages: Sequence[Message], text: str, ends: Sequence[Span], inner_ends: Sequence[Span] = ()
) -> list[Span]:
    """The characters of each assistant turn, its end-of-turn token included.

    Args:
        text: the rendered conversation.
        ends: characters of the end-of-turn tokens in `text`.
        inner_ends: characters of the tokens that end a message inside of a conversation, though they end no answer.

    Raises:
        PromptError: a turn can't be found.
    """
    turns = [i for i, message in enumerate(messages) if message.role == "assistant"]
    starts: list[int] = []
    for i in turns:
        start = _turn_start(render, messages, i, text)
        if starts and start <= starts[-1]:
            raise _rewritten_error(i)
        starts.append(start)
    limits = [*starts[1:], len(text)]
    return [
        (start, _turn_end(render, messages, i, text, (start, limit), ends, inner_ends))
        for i, start, limit in zip(turns, starts, limits, strict=True)
    ]


def mask_spans(offsets: Sequence[Span], spans: Sequence[Span]) -> list[int]:
    """Loss mask: 1 for each token that begins inside a span.

    Some tokenizers' offsets leave out spaces, so that a token of spaces has an empty range at its end. Such a token
    begins where the token before it ends. A token that stands for no character is never supervised.
    """
    starts, stops = [start for start, _ in offsets], [stop for _, stop in offsets]
    if starts != sorted(starts) or any(map(eq, starts, stops)):
        return _mask_each(offsets, spans)
    loss_mask = bytearray(len(starts))
    for begin, end in spans:
        first, stop = bisect_left(starts, begin), bisect_left(starts, end)
        loss_mask[first:stop] = bytes([1]) * (stop - first)
    return list(loss_mask)


def _mask_each(offsets: Sequence[Span], spans: Sequence[Span]) -> list[int]:
    """`mask_spans`, token by token."""
    loss_mask: list[int] = []
    previous_end = 0
    for start, end in offsets:
        begin = min(start, previous_end) if start == end else start
        loss_mask.append(int(begin < end and any(s <= begin < e for s, e in spans)))
        previous_end = end
    return loss_mask


def without_blank_end(text: str, spans: Sequence[Span], ends: Sequence[Span]) -> list[Span]:
    """The spans, without the blanks that follow an end-of-turn token at a span's end."""
    found: list[Span] = []
    for start, stop in spans:
        last = next((end for _, end in reversed(ends) if start < end <= stop), stop)
        found.append((start, stop if text[last:stop].strip() else last))
    return found


def _turn_start(render: Render, messages: Sequence[Message], i: int, text: str) -> int:
    """Where message `i` begins: after the part of its generation prompt that `text` holds.

    `text` may hold only the first part of the generation prompt, if the template drops earlier thinking, or opens
    each answer with an empty think block.
    """
    if i == 0:
        raise PromptError("messages[0] is the assistant's, so there is no prompt before it; begin with a user message")
    head = render(messages[:i], True)
    if text.startswith(head):
        return len(head)
    # The answer may begin like the rest of the generation prompt ("<b>" like "<think>"). With another answer in its
    # place, characters that are still common come from the template.
    content_start = common_len(render(_with_other(messages, i), False), text)
    before = render(messages[:i], False)
    start = min(common_len(head, text), content_start)
    if start >= max(common_len(before, text), common_len(before, head)):
        return start
    # A template may write the functions before the last question alone. What follows the question stays the same.
    question = messages[i - 1].content.strip()
    header = head.rpartition(question)[2] if question and question in head else ""
    header = header or head[-HEADER_LEN:]
    start = text.rfind(header, 0, content_start) + len(header)
    if start < len(header) or text[start:content_start].strip():
        raise _rewritten_error(i)
    return start


def _turn_end(
    render: Render,
    messages: Sequence[Message],
    i: int,
    text: str,
    window: Span,
    ends: Sequence[Span],
    inner_ends: Sequence[Span],
) -> int:
    """Where message `i` ends: after its end-of-turn token, or with its content if it has no such token."""
    start, limit = window
    end = next((end for end in ends if start <= end[0] < limit), None)
    upto = render(messages[: i + 1], False)
    # If there is text between the message and the end-of-turn token, the token belongs to a later message.
    if end and not (text.startswith(upto) and text[len(upto) : end[0]].strip()):
        return end[1]
    other_text = render(_with_other(messages, i), False)
    content_end = min(limit, len(text) - common_len(text[::-1], other_text[::-1]))
    inner_end = next((end for end in inner_ends if content_end <= end[0] < limit), None)
    if inner_end and start < content_end and not text[content_end : inner_end[0]].strip():
        return inner_end[1]
    stop = _without_newline(text, start, content_end, messages[i].content)
    if stop <= start:
        raise PromptError(
            f"messages[{i}] has no end: expected an end-of-turn token after it, found none. Check the end tokens of "
            "the target's config, and the chat template"
        )
    return stop


def _without_newline(text: str, start: int, stop: int, content: str) -> int:
    """Where a turn without an end-of-turn token ends: before the blanks that the template writes after the content."""
    begin = text.rfind(content, start, stop) if content else -1
    if begin >= 0 and not text[begin + len(content) : stop].strip():
        return begin + len(content)
    return start + len(text[start:stop].rstrip())


def common_len(a: str, b: str) -> int:
    """Length of the longest common prefix, found by bisection."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _with_other(messages: Sequence[Message], i: int) -> list[Message]:
    """The messages with another answer in the place of message `i`: a letter that the message does not have."""
    letter = next(letter for letter in map(chr, range(ord("A"), 0x3000)) if letter not in messages[i].content)
    return [*messages[:i], Message("assistant", letter), *messages[i + 1 :]]


def _rewritten_error(i: int) -> PromptError:
    return PromptError(
        f"the chat template changes the text before messages[{i}] when that message is added, so the message's "
        "beginning can't be found; pass a template with a {% generation %} block"
    )
