"""The error that a user can cause."""


class FraError(ValueError):
    """Bad input: the message is one sentence that says what is wrong, where, and what to do."""


class CannotLoad(FraError):
    """What is missing is out of reach, as a hub release without a network, or the target has too little of it, as text:
    nothing is wrong, and claims about it cannot run.
    """
