"""The errors Penstock raises on purpose; every message says what to do next.

PenstockError
├── ConfigError      a setting or a use-case definition is wrong
├── InputError       what a caller or a producer sent is wrong
├── StateError       stored state and committed positions do not fit together
├── UnavailableError a service that is needed does not answer
└── FencedError      another instance has taken over this partition
"""


class PenstockError(Exception):
    """Base of all errors that are told to the user as one line."""


class ConfigError(PenstockError):
    """A setting or a definition is wrong; the message names it and the mend."""


class InputError(PenstockError):
    """A caller or a producer sent something that can't be used."""


class StateError(PenstockError):
    """Stored state contradicts the committed positions, or fits another definition."""


class UnavailableError(PenstockError):
    """A needed service does not answer within its deadline."""


class FencedError(PenstockError):
    """A newer instance owns this partition; this one must stop."""
