"""Errors that a user can act on: each message says what was expected, what was found and what to do."""


class VpdError(Exception):
    """Base of every error that the command line prints without a traceback; exit code 1."""


class ConfigError(VpdError, ValueError):
    """A setting is unknown, of the wrong type, or out of range; exit code 2."""


class PromptError(VpdError, ValueError):
    """A prompt file or one of its records can't be used."""


class TargetError(VpdError, ValueError):
    """The target's folder lacks something, or does not fit what was asked of it."""


class DrafterError(VpdError, ValueError):
    """A drafter checkpoint lacks something, or does not fit the cache."""


class CacheNotFoundError(VpdError, FileNotFoundError):
    """There is no cache at the given place, or nothing in it is committed."""


class CacheCorruptError(VpdError):
    """Bytes of the cache are not what its commit records say."""


class FingerprintMismatchError(VpdError, ValueError):
    """The cache was made with another target, tokenizer, template, layer set or prompt set."""


class StorageError(VpdError, OSError):
    """The place of a cache does not answer, refuses, or is full."""


class NonFiniteError(VpdError):
    """A loss or its gradient is not finite."""


class ExtractionError(VpdError):
    """The engine handed back something else than what was asked of it."""


class EngineDiedError(ExtractionError):
    """The engine's processes ended by themselves; another engine may go on."""
