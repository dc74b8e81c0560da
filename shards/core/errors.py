"""Errors that a user can act on. Their message is a sentence: what was wrong, where, and what to do."""


class UserError(Exception):
    """Something the user can mend; printed as one sentence, without a traceback. Exit status 1."""

    exit_status = 1


class StoreAway(UserError):
    """Files cannot be reached now, but may be later: an object store that does not answer, a network disk that is away."""


class UsageError(UserError):
    """The command line, a recipe or a setting is wrong. Exit status 2."""

    exit_status = 2


class TooManyFailures(UserError):
    """The run ended, but more samples failed than --max-failed allows. Exit status 3."""

    exit_status = 3
