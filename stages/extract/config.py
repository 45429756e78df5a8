"""Settings of extraction and of its estimate."""

import datetime
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from ...data.cache.codecs import CODECS
from ..config import Count, NonNegative, NonNegativeFloat, OneOf, PositiveFloat, Ratio, Section, Share
from .engines import ENGINES


class MachinerySection(Section):
    """`extract.machinery`: how work and memory are divided. Few runs need other values, so there are no flags."""

    hidden: ClassVar[bool] = True

    max_in_flight: Count = 256
    """Requests that are in the engine or wait for the writer, which bounds memory; >= 1."""
    unit_records: Count = 256
    """Records of a work unit, which one worker does; >= 1."""
    lease_seconds: PositiveFloat = 120.0
    """Seconds without a new heartbeat after which a worker counts as dead; > 0."""


class ExtractConfig(Section):
    """`extract`: runs prompts through the target and stores the target's hidden states in a cache."""

    mode: Literal["generate", "given"] = "generate"
    """Whether the target answers the prompts, or the records hold the answers already."""
    engine: Annotated[str, OneOf(ENGINES)] = "vllm"
    """The engine that runs the target."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type that the target computes in; auto = the target's own. States are always stored as bfloat16."""
    num_draft_layers: Count = 5
    """Number of context layers, chosen by DFlash's layer rule; >= 1."""
    layer_ids: Annotated[list[NonNegative], Field(min_length=1)] | None = None
    """Context layers, in place of the rule's; id i = output of 0-based target layer i; distinct, >= 0."""
    max_len: Count = 3072
    """Longest sequence, in tokens of prompt and response together; >= 1."""
    max_new_tokens: Count = 2048
    """Longest answer, in tokens per assistant turn; >= 1."""
    temperature: NonNegativeFloat = 0.0
    """Sampling temperature; >= 0. 0 = greedy, which replay needs."""
    top_p: Ratio = 1.0
    """Probability mass of the tokens sampled from; in (0, 1]."""
    top_k: NonNegative = 0
    """Number of tokens sampled from; >= 0, 0 = all."""
    seed: NonNegative = 0
    """Seed of sampling; >= 0."""
    chat_template: str | None = None
    """Jinja file of the chat template; none = the tokenizer's own."""
    template_args: dict[str, Any] = Field(default={})
    """Arguments of the chat template, such as `enable_thinking: false`."""
    template_date: str | None = None
    """Date that a template which reads the clock is given, such as 2026-01-31; none = the cache's, or today."""
    adapter: str | None = None
    """Folder of a LoRA adapter of the target, in peft's form; none = the target as it is."""
    trust_remote_code: bool = False
    """Let code that the target's folder holds run, which some targets need (`auto_map` in their config)."""
    skip_bad: bool = False
    """Leave out and count records that can't be used; otherwise the first of them is an error."""
    limit: Count | None = None
    """Number of records to take, bad ones included, from the start or in the seed's order; >= 1, none = all."""
    shuffle_seed: NonNegative | None = None
    """Seed of the records' order, so that `limit` takes a random share; >= 0, none = the order of the files."""
    duplicates: Literal["auto", "keep", "drop"] = "auto"
    """Whether to use a record whose content came before; auto = keep if answers are sampled, as they differ."""
    split: str = "train"
    """Split of a data set of the hub (`hf://NAME`) or of a saved folder."""
    subset: str | None = None
    """Subset of data sets of the hub; none = their only subset."""
    columns: dict[str, str] = Field(default={})
    """Names that a record's keys have in the data, such as `prompt: question, response: answer`."""
    roles: dict[str, str] = Field(default={})
    """Roles that go by another name in the data, such as `alice: user`."""
    ignore: list[str] = Field(default=[])
    """Keys of the data to leave out, though they could carry conversation, such as `[context, images]`."""
    thinking: Literal["keep", "mask", "drop"] = "keep"
    """What to do with a reasoning model's thinking: supervise it, mask it, or drop it from given answers."""
    thinking_marks: tuple[str, str] = ("<think>", "</think>")
    """The two tokens around the thinking."""
    codec: Annotated[str, OneOf(CODECS)] = "raw"
    """How hidden states are stored."""
    response_tokens: Count | None = None
    """Expected mean length of an answer, in tokens, for the check of free space; >= 1, none = the longest allowed."""
    fill_disk: bool = False
    """Start even if the disk may be too small for the cache."""
    part_mib: Count = 1024
    """Size of a part of the cache, in MiB; >= 1."""
    stop_seconds: PositiveFloat = 120.0
    """Seconds that sequences in the engine have to finish after a signal to stop; > 0."""
    max_quarantined: Share = 0.01
    """Share of the sequences that may go into quarantine before the run ends with an error; in [0, 1]."""
    audit: Share = 0.005
    """Share of the sequences that a run computes again at its end, to compare the states; in [0, 1]."""
    engine_args: dict[str, Any] = Field(default={})
    """Arguments that are passed to the engine unchanged."""
    machinery: MachinerySection = MachinerySection()
    """How work and memory are divided."""

    @field_validator("template_date", mode="before")
    @classmethod
    def _iso_date(cls, value: Any) -> Any:
        if value is None:
            return None
        try:
            return datetime.date.fromisoformat(str(value)).isoformat()
        except ValueError:
            raise ValueError("a date such as 2026-01-31") from None

    @property
    def trusts_target_code(self) -> bool:
        """Whether the target's own code may run: the setting says so, or an engine argument of that name."""
        return self.trust_remote_code or self.engine_args.get("trust_remote_code") is True

    @field_validator("layer_ids")
    @classmethod
    def _distinct(cls, value: list[int] | None) -> list[int] | None:
        if value is not None and len(set(value)) < len(value):
            raise ValueError("distinct layer ids")
        return value


class EstimateConfig(Section):
    """`estimate`: what an extraction and a training run will cost."""

    sample: Count | None = None
    """Number of records to read, evenly chosen; they stand for all records; >= 1, none = all of up to 4096 records."""
    num_sequences: Count | None = None
    """Number of sequences that the records stand for; >= 1, none = one sequence per record."""
    tflops: PositiveFloat = 989.0
    """Peak of a training GPU in bfloat16, in TFLOPS; > 0. An H100 or H200 has 989."""
    utilization: Ratio | None = None
    """Share of the GPU's peak that training reaches; in (0, 1], none = unknown. `make bench` measures it on a GPU."""
    tokens_per_second: PositiveFloat | None = None
    """Rate of a worker's extraction; > 0, none = the pilot's rate; without a pilot, unknown."""
    gpus: Count | None = None
    """Number of GPUs that extract, and then train, together; >= 1, none = one worker extracts."""
    pilot: NonNegative = 0
    """Number of records to extract, to measure the rate, the length of answers and the size of each codec; >= 0.

    With fewer records than the engine runs at once, the measured rate is too low.
    """
