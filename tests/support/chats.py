"""A small tokenizer and small chat templates, and what tests of conversations do with them."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from vpd.data.chat import ChatFormat
from vpd.data.prompts.messages import Message

END = "<|im_end|>"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_END = (
    "{% for m in messages %}{{ '[' + m.role + ']' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)


def byte_level_tokenizer(**post_processing: bool) -> PreTrainedTokenizerFast:
    """A byte-level BPE: any text has tokens, and an emoji is several that share one character offset."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if post_processing:
        tokenizer.post_processor = processors.ByteLevel(**post_processing)
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|im_start|>", END, "<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["hello world user assistant system the answer"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token=END)


TOKENIZER = byte_level_tokenizer()
TRIMMING = byte_level_tokenizer(add_prefix_space=False, trim_offsets=True)


def chat_format(template: str | None, tokenizer: PreTrainedTokenizerFast = TOKENIZER, **args: object) -> ChatFormat:
    end = tokenizer.convert_tokens_to_ids(END)
    assert isinstance(end, int)
    return ChatFormat(tokenizer, eos_token_ids={end}, template=template, template_args=args)


def talk(*contents: str, system: str | None = None) -> list[Message]:
    """User and assistant in turn."""
    messages = [Message(("user", "assistant")[i % 2], content) for i, content in enumerate(contents)]
    return messages if system is None else [Message("system", system), *messages]


def supervised(chat: ChatFormat, messages: list[Message], tokenizer=TOKENIZER) -> list[str]:
    """The text of each run of supervised tokens."""
    tokenized = chat.conversation(messages)
    assert len(tokenized.token_ids) == len(tokenized.loss_mask)
    assert set(tokenized.loss_mask) <= {0, 1}
    runs: list[list[int]] = []
    previous = 0
    for token_id, mask in zip(tokenized.token_ids, tokenized.loss_mask, strict=True):
        if mask and not previous:
            runs.append([])
        if mask:
            runs[-1].append(token_id)
        previous = mask
    return [str(tokenizer.decode(run, clean_up_tokenization_spaces=False)) for run in runs]
