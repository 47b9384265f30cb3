"""What ends the demo early."""

from ..errors import RhesisTasksError

__all__ = ["DemoError"]


class DemoError(RhesisTasksError):
    """The demo cannot go on."""

    def __init__(self, message: str, *, exit_code: int = 1) -> None:
        self.exit_code = exit_code
        super().__init__(message)
