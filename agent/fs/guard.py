"""What stands between pyfuse3 and the handlers: nothing but FUSEError may leave one.

Any other exception, a result of another type, and FUSEError from `forget`, end the whole mount.
"""

import errno
import functools
import inspect
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Final

import trio
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, Operations, StatvfsData

from agent.model.errors import CocoonError

from .node import Refused

_RESULTS: Final[dict[str, type | tuple[type, ...]]] = {
    "lookup": EntryAttributes,
    "getattr": EntryAttributes,
    "setattr": EntryAttributes,
    "mkdir": EntryAttributes,
    "readlink": bytes,
    "open": FileInfo,
    "create": tuple,
    "opendir": int,
    "read": (bytes, memoryview),
    "write": int,
    "statfs": StatvfsData,
}
"""What pyfuse3 takes from each handler; from those not named here, nothing."""

_log = logging.getLogger(__name__)


class Guarded(Operations):
    """Every coroutine of a subclass is wrapped so that only FUSEError and Cancelled leave it."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for name, function in list(vars(cls).items()):
            if inspect.iscoroutinefunction(function) and not name.startswith("_"):
                setattr(cls, name, _guarded(name, function))

    def on_fault(self, handler: str, error: BaseException) -> None:
        """Tell people of an error that nobody foresaw; must raise nothing."""


Handler = Callable[..., Awaitable[Any]]


def _guarded(name: str, handler: Handler) -> Handler:
    @functools.wraps(handler)
    async def guarded(operations: Guarded, *arguments: Any) -> Any:
        try:
            result = await handler(operations, *arguments)
            if not isinstance(result, _RESULTS.get(name, type(None))):
                raise TypeError(f"{name} returned a {type(result).__name__}")
        except (CocoonError, Refused) as error:
            number = error.errno
        except Exception as error:
            number = _fault(operations, name, error)
        except BaseExceptionGroup as group:
            cancelled, rest = group.split(trio.Cancelled)
            if rest is not None:
                number = _fault(operations, name, rest)
            if cancelled is not None:
                raise cancelled from None
        else:
            return result
        if name == "forget":
            return None
        raise FUSEError(number)

    return guarded


def _fault(operations: Guarded, name: str, error: BaseException) -> int:
    _log.error("the filesystem's %s has a fault", name, exc_info=error)
    operations.on_fault(name, error)
    return errno.EIO
