"""What deploy/nginx.conf does, in Python: pass on what is for SuperNodes, refuse all else.

Run: ``python tests/fleet_proxy.py ADDRESS PORT KEYS``: the SuperLink's address, the port to listen on, the folder with
the certificates.
"""

import ssl
import sys

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

HOP_BY_HOP = {"host", "connection", "content-length", "transfer-encoding"}


def proxy(superlink: str, keys: str) -> Starlette:
    """Make the app that listens to the outside."""
    client = httpx.AsyncClient(verify=ssl.create_default_context(cafile=f"{keys}/ca.crt"), timeout=300)

    async def pass_on(request: Request) -> Response:
        headers = {name: value for name, value in request.headers.items() if name not in HOP_BY_HOP}
        url = f"https://{superlink}{request.url.path}"
        answer = await client.request(request.method, url, content=await request.body(), headers=headers)
        return Response(answer.content, answer.status_code, media_type=answer.headers.get("content-type"))

    async def refuse(request: Request) -> Response:
        return Response(status_code=403)

    anything = [Route("/{path:path}", refuse, methods=["GET", "POST"])]
    return Starlette(routes=[Route("/v1/fleet/{path:path}", pass_on, methods=["POST"]), *anything])


if __name__ == "__main__":
    address, port, folder = sys.argv[1:]
    files = {"ssl_certfile": f"{folder}/server.pem", "ssl_keyfile": f"{folder}/server.key"}
    uvicorn.run(proxy(address, folder), host="127.0.0.1", port=int(port), log_level="warning", **files)
