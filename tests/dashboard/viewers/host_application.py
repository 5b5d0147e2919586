"""Serves examples/web_service.py: python host_application.py uvicorn|hypercorn [ROOT_PATH]. Prints its port."""

import socket
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3] / "examples"))


def main(server: str, root_path: str) -> None:
    from web_service import app  # type: ignore[import-not-found]  # a script

    with socket.create_server(("127.0.0.1", 0)) as listening:
        print(listening.getsockname()[1], flush=True)
        if server == "uvicorn":
            import asyncio

            import uvicorn

            config = uvicorn.Config(
                app, root_path=root_path, log_level="warning", timeout_graceful_shutdown=5
            )
            asyncio.run(uvicorn.Server(config).serve([listening]))
        else:
            import trio
            from hypercorn.config import Config
            from hypercorn.trio import serve

            settings = Config()
            settings.bind = [f"fd://{listening.fileno()}"]
            settings.root_path = root_path
            trio.run(serve, app, settings)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "")
