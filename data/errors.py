"""Errors that a user can act on: each message states what was expected, what was found and what to do.

VpdError
+-- ConfigError                a setting (also a ValueError)
+-- PromptError                a prompt file (ValueError)
|   +-- NothingToTrainError    a record without answer or question
+-- TargetError                the target (ValueError)
+-- DrafterError               a drafter (ValueError)
+-- CacheNotFoundError         no cache (FileNotFoundError)
+-- CacheCorruptError          damage to a cache
+-- FingerprintMismatchError   a cache of another origin (ValueError)
+-- StorageError               a disk or bucket (OSError)
+-- NonFiniteError             a training step
+-- ExtractionError            the engine's answers
    +-- EngineDiedError        the engine's end
"""

REPAIR_ADVICE = "Find all that is damaged, and have it extracted again, with vpd verify --repair."


class VpdError(Exception):
    """Base of every error that the command line prints without a traceback; exit code 1."""


class ConfigError(VpdError, ValueError):
    """A setting is unknown, of the wrong type, or out of range; exit code 2."""


class PromptError(VpdError, ValueError):
    """A prompt file or one of its records can't be used."""


class NothingToTrainError(PromptError):
    """A record has no answer, or no question to answer."""


class TargetError(VpdError, ValueError):
    """The target's folder lacks something, or does not fit the settings."""


class DrafterError(VpdError, ValueError):
    """A drafter checkpoint lacks something, or does not fit the cache."""


class CacheNotFoundError(VpdError, FileNotFoundError):
    """There is no cache at the given place, or the cache has no committed part."""


class CacheCorruptError(VpdError):
    """Bytes of the cache are not what its records say.

    Args:
        what: what was expected and found.
        advice: what to do about it.
    """

    def __init__(self, what: str, advice: str = REPAIR_ADVICE):
        super().__init__(what, advice)
        self.what, self.advice = what, advice

    def __str__(self) -> str:
        return f"{self.what} {self.advice}"


class FingerprintMismatchError(VpdError, ValueError):
    """The cache was made with another target, tokenizer, template, layer set or prompt set."""


class StorageError(VpdError, OSError):
    """The place of a cache does not answer, refuses a request, or is full."""


class NonFiniteError(VpdError):
    """A loss or its gradient is not finite."""


class ExtractionError(VpdError):
    """The engine returned something else than the requests asked for."""


class EngineDiedError(ExtractionError):
    """The engine's processes have died; a new engine can continue."""
