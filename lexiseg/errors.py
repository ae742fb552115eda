"""The one exception that means: the user can mend this."""


class LexisegError(Exception):
    """A mistake the user can mend, said in one sentence: what is wrong, where, and what to do.

    The command line prints the sentence without a traceback and exits with code 2; in Python it is an ordinary
    exception, so that a script can catch it.
    """
