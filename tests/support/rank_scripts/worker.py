"""What each rank runs under torchrun: named scenarios one after another, in one process and one process group.

worker.py FOLDER MODULE SCENARIO ...
"""

import importlib
import sys
import traceback
import warnings
from pathlib import Path

import torch
from rank_scripts import talk

WORKER = Path(__file__)

if __name__ == "__main__":
    folder, module, *names = sys.argv[1:]
    torch.set_num_threads(1)
    from rank_scripts.collectives import Recorder

    recorder = Recorder(Path(folder))
    warnings.simplefilter("error")
    scenarios = importlib.import_module(f"rank_scripts.{module}")
    for name in names:
        recorder.note("scenario", name)
        try:
            talk.write_result(Path(folder), name, {"result": getattr(scenarios, name)()})
        except BaseException as error:
            report = {
                "error": type(error).__name__,
                "text": str(error),
                "code": getattr(error, "code", None),
                "rank": getattr(error, "rank", None),
                "traceback": traceback.format_exc(),
            }
            talk.write_result(Path(folder), name, report)
            raise
