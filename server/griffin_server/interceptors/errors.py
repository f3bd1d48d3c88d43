"""Turns what a call raises into its status."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import structlog

from griffin_core.errors import EngineFault, GriffinError
from griffin_server.interceptors.call import Call
from griffin_server.rpc.status import abort, code_of, code_of_cancel

log = structlog.get_logger("griffin.rpc")


@asynccontextmanager
async def to_status(call: Call) -> AsyncIterator[None]:
    """Ends a call that raised with the error's status, and notes its code. Any error that is not
    Griffin's is a bug: it is logged with its traceback and ends the call with INTERNAL."""
    try:
        yield
    except GriffinError as error:
        call.code = code_of(error)[0].name
        error.__traceback__ = None  # with ``chain``'s clear_frames, nothing holds the request
        await abort(call.context, error)
    except (asyncio.CancelledError, GeneratorExit):
        call.code = code_of_cancel(call.context).name
        raise
    except grpc.aio.AbortError:  # the method itself chose the status
        call.code = call.context.code().name
        raise
    except Exception as error:
        call.code = "INTERNAL"
        log.exception("call failed", method=call.method)
        await abort(call.context, EngineFault.of(error))
