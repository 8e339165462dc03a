"""The server as an ASGI application, to be run by ``python -m engine.serve`` or mounted in somebody else's."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from engine.async_refiner import AsyncRefiner
from engine.errors import EngineError
from engine.server.base import BaseAPI
from engine.server.chat import ChatEndpoint
from engine.server.errors import ApiError, api_error
from engine.server.gate import Gate
from engine.server.json_body import dump
from engine.server.openapi import document
from engine.server.options_body import FIELDS
from engine.server.refine import RefineEndpoint
from engine.server.settings import Settings

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

PAGE = Path(__file__).with_name("page.html")
PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:;"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Server:
    """What the routes share. ``app.state.server`` of an application that ``create_app`` made."""

    def __init__(self, refiner: AsyncRefiner, settings: Settings, registry: "CollectorRegistry | None") -> None:
        self.settings = settings
        self.draining = False
        self._refiner = refiner
        self._registry = registry
        self._base = BaseAPI(settings) if settings.base_url is not None else None
        self.chat = ChatEndpoint(refiner, self._base, settings)
        self.refine = RefineEndpoint(refiner, self._base, settings)
        self._document = dump(document(settings, metrics=registry is not None))

    def drain(self) -> None:
        """Lets no further work in and says so on /health; what is in progress goes on."""
        self.draining = True

    async def close(self) -> None:
        """Closes the connections to the base API; the AsyncRefiner stays its owner's."""
        if self._base is not None:
            await self._base.close()

    async def page(self, request: HttpRequest) -> Response:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers={"Content-Security-Policy": PAGE_POLICY})

    async def health(self, request: HttpRequest) -> Response:
        alive = self._refiner.alive
        status = "draining" if alive and self.draining else "alive" if alive else "dead"
        return _json({"status": status}, 200 if status == "alive" else 503)

    async def metrics(self, request: HttpRequest) -> Response:
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        assert self._registry is not None
        return Response(generate_latest(self._registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def openapi(self, request: HttpRequest) -> Response:
        return Response(self._document, media_type="application/json")

    async def models(self, request: HttpRequest) -> Response:
        settings = self.settings
        if self._base is None or settings.base_model is not None:
            name = settings.model_name if self._base is None else settings.base_model
            models = [{"id": name, "object": "model", "created": 0, "owned_by": "diffpo-engine"}]
        else:
            models = await self._base.models()
        options = {name: getattr(settings.options, name) for name in sorted(FIELDS)}
        about = {"base": self._base is not None, "max_new_tokens": settings.max_new_tokens, "options": options}
        return _json({"object": "list", "data": models, "refine": about})


def create_app(
    refiner: AsyncRefiner, settings: Settings | None = None, *, registry: "CollectorRegistry | None" = None
) -> Starlette:
    """The application. ``registry``: what /metrics shows; without one there is no such path.

    The refiner stays yours to close, after the server has ended. Mounted in another application, whose lifespan does not
    reach it, ``await app.state.server.close()`` ends its connections to the base API.
    """
    settings = settings or Settings()
    server = Server(refiner, settings, registry)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await server.close()

    routes = [
        Route("/", server.page),
        Route("/health", server.health),
        Route("/openapi.json", server.openapi),
        Route("/v1/models", server.models),
        Route("/v1/chat/completions", server.chat.__call__, methods=["POST"]),
        Route("/v1/refine", server.refine.__call__, methods=["POST"]),
    ]
    if registry is not None:
        routes.append(Route("/metrics", server.metrics))
    app = Starlette(
        routes=routes,
        lifespan=lifespan,
        middleware=[
            Middleware(
                Gate, settings=settings, closing=lambda: server.draining, retry_after=lambda: refiner.retry_after
            )
        ],
        exception_handlers={
            ApiError: _tell, EngineError: _tell, HTTPException: _tell_http, Exception: _tell_unexpected
        },
    )  # fmt: skip
    app.state.server = server
    return app


async def _tell(request: HttpRequest, error: Exception) -> Response:
    return (api_error(error) if isinstance(error, EngineError) else _as_api_error(error)).response()


def _as_api_error(error: Exception) -> ApiError:
    assert isinstance(error, ApiError)
    return error


async def _tell_http(request: HttpRequest, error: Exception) -> Response:
    """Starlette's own: a path or a method that does not exist."""
    assert isinstance(error, HTTPException)
    response = ApiError(error.status_code, f"{request.method} {request.url.path:.100}: {error.detail}").response()
    response.headers.update(error.headers or {})
    return response


async def _tell_unexpected(request: HttpRequest, error: Exception) -> Response:
    """A fault of this server, which is logged with its traceback by whoever runs the application."""
    return ApiError(500, f"unexpected {type(error).__name__}", code="unexpected", close=True).response()


def _json(value: dict[str, Any], status: int = 200) -> Response:
    return Response(dump(value), status, media_type="application/json")
