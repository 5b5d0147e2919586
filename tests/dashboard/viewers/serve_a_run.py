"""Train without end and show it: PORT RUN_NAME RUN_DIR. Prints the page's address."""

import sys

from offloop.dashboard import Dashboard
from offloop.engine.testing import EndlessLoader, tiny_trainer

port, run_name, run_dir = sys.argv[1:]
trainer = tiny_trainer(run_name=run_name, run_dir=run_dir)
dashboard = Dashboard(port=int(port), token="0123456789abcdef", quiet=True)
with dashboard:
    print(dashboard.url, flush=True)
    trainer.train(EndlessLoader(), max_steps=10**9, callbacks=[dashboard])
