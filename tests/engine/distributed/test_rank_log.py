"""One voice: what all ranks would say in the terminal, rank 0 says; each rank's log file has everything."""

import logging
from pathlib import Path

import pytest

from offloop.engine.distributed.rank_log import SAYS_ITSELF, OneVoice, RankLog

logger = logging.getLogger("offloop")


def test_another_rank_is_silent_but_for_errors_and_what_it_alone_knows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    voice = OneVoice()
    try:
        logger.warning("before the run's directory is there")
        log = RankLog(tmp_path, 1, voice)
        logger.warning("the run waits for its data")
        logger.warning("rank 1 waits", extra=SAYS_ITSELF)
        logger.error("a callback failed")
        log.close()
        logger.warning("after the run")
    finally:
        voice.close()
        voice.close()
    logger.warning("alone again")
    assert [each.getMessage() for each in caplog.records] == [
        "rank 1 waits",
        "a callback failed",
        "alone again",
    ]
    lines = (tmp_path / "ranks" / "1" / "log.txt").read_text().splitlines()
    assert [line.split(" ", 3)[3] for line in lines] == [
        "the run waits for its data",
        "rank 1 waits",
        "a callback failed",
    ]


def test_rank_0_says_everything(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = RankLog(tmp_path, 0)
    logger.warning("the run waits for its data")
    log.close()
    assert [each.getMessage() for each in caplog.records] == ["the run waits for its data"]
    assert "waits for its data" in (tmp_path / "ranks" / "0" / "log.txt").read_text()
