"""A web service that trains: runs are started, listed, steered and cancelled over HTTP, and watched on the live page.

    POST   /login {"secret": "..."}      sets a cookie, for browsers; programs send the secret in a header
    POST   /runs {"lr": 0.1}             -> {"run": "..."}          answered at once; the run outlives the request
    GET    /runs                         -> {"...": "running, step 120"}
    POST   /runs/.../pause               and resume, stop: answered when the run has done it
    DELETE /runs/...                     -> {"status": "cancelled"}
    GET    /train/                       the live page of all runs

Run it: python examples/web_service.py; it runs a client that makes these requests, and ends.
To keep it: uvicorn --app-dir examples web_service:app
"""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, MutableMapping
from typing import Annotated, Any, Literal

import httpx
import torch
import uvicorn
from fastapi import Body, Depends, FastAPI, HTTPException, Request, Response
from starlette.requests import HTTPConnection

from offloop import Dashboard, Run, Runs, Trainer

# A service asks its own sessions or users here.
SECRETS: dict[str, Literal["control", "read_only"]] = {"of the owner": "control", "of a guest": "read_only"}
BATCHES = [(torch.randn(32, 8), torch.randint(0, 3, (32,))) for _ in range(64)]


def make_trainer(lr: float) -> Trainer:
    model = torch.nn.Linear(8, 3)
    return Trainer(model, torch.optim.SGD(model.parameters(), lr), loss=torch.nn.functional.cross_entropy)


def role_of(scope: MutableMapping[str, Any]) -> Literal["control", "read_only"] | None:
    """Return what the sender of a request, or of a websocket's handshake, may do."""
    asks = HTTPConnection(scope)
    secret = asks.headers.get("authorization", "").removeprefix("Bearer ") or asks.cookies.get("secret", "")
    return SECRETS.get(secret)


def may_steer(request: Request) -> None:
    if (role := role_of(request.scope)) != "control":
        raise HTTPException(401 if role is None else 403)


OWNER = [Depends(may_steer)]


def run_of(run_id: str, request: Request) -> Run:
    run = request.app.state.runs.get(run_id)
    if run is None:
        raise HTTPException(404)
    return run


@contextlib.asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with Runs() as app.state.runs:
        yield


app = FastAPI(lifespan=lifespan)
app.mount("/train", Dashboard().asgi(auth=role_of))


@app.post("/login")
async def login(secret: Annotated[str, Body(embed=True)], response: Response) -> None:
    response.set_cookie("secret", secret, httponly=True, samesite="strict")


@app.post("/runs", dependencies=OWNER)
async def start(request: Request, lr: Annotated[float, Body(embed=True)] = 0.1) -> dict[str, str]:
    run = await request.app.state.runs.start(
        make_trainer(lr), BATCHES, epochs=1_000_000, callbacks=[Dashboard()]
    )
    return {"run": run.id}


@app.get("/runs", dependencies=OWNER)
async def list_runs(request: Request) -> dict[str, str]:
    return {name: f"{run.state}, step {run.step}" for name, run in request.app.state.runs.items()}


@app.post("/runs/{run_id}/{command}", dependencies=OWNER)
async def steer(run: Annotated[Run, Depends(run_of)], command: Literal["pause", "resume", "stop"]) -> None:
    await getattr(run, command)()


@app.delete("/runs/{run_id}", dependencies=OWNER)
async def cancel(run: Annotated[Run, Depends(run_of)]) -> dict[str, str]:
    run.cancel("asked to")
    return {"status": (await run.wait()).status}


async def main() -> None:
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        serving = asyncio.create_task(server.serve([listening]))
        owner = {"Authorization": "Bearer of the owner"}
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        async with httpx.AsyncClient(base_url=address, headers=owner, timeout=60) as client:
            run = (await client.post("/runs", json={"lr": 0.5})).json()["run"]
            print("page:", (await client.get("/train/api/status")).json()["role"])
            print("pause:", (await client.post(f"/runs/{run}/pause")).status_code)
            print("list:", (await client.get("/runs")).json())
            print("cancel:", (await client.delete(f"/runs/{run}")).json())
        server.should_exit = True
        await serving


if __name__ == "__main__":
    asyncio.run(main())
