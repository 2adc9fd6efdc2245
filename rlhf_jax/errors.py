"""The one exception a user sees: a problem they can mend."""


class UserError(Exception):
    """A mendable problem: one line that says what is wrong, where, and how to mend it.

    `main` prints it as ``error: <message>`` on stderr and exits with status 2, without a traceback.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))
