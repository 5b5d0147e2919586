"""Signs of life of real processes: ranks that raise, are killed, stopped or hang, and ranks that leave together."""

import signal
from collections.abc import Callable

import pytest
from rank_processes import Ranks
from torch._C._distributed_c10d import TCPStore

SIGNS = """
import threading
from offloop.engine.distributed.launch import find_launch
from offloop.engine.distributed.rendezvous import connect
from offloop.engine.distributed.signs_of_life import SignsOfLife
launch = find_launch("auto")
store = connect(launch, timeout=30)
failures = []
has_failed, is_asked = threading.Event(), threading.Event()
def fail(error):
    failures.append(error)
    has_failed.set()
wanted = []
of_attention = {"wants_attention": lambda: bool(wanted and wanted.pop()), "attention": is_asked.set}
def make(timeout):
    made = SignsOfLife(store, launch, "run", timeout=timeout, fail=fail, **of_attention)
    made.start()
    return made
def wait_for_rounds(signs, count):
    # Until this rank and the others have exchanged some more signs
    before = {each: signs._signs[each].number if each in signs._signs else 0 for each in range(launch.world_size)}
    with signs._read:
        signs._read.wait_for(
            lambda: all(
                each in signs._signs and signs._signs[each].number >= number + count
                for each, number in before.items()
            )
        )
"""


def script(text: str) -> str:
    return SIGNS + text.replace("\n    ", "\n")


@pytest.mark.parametrize("failing", ["0", "1"])
def test_rank_that_raises_tells_all_others_before_it_leaves(
    failing: str, ranks: Callable[[str], Ranks]
) -> None:
    """Also the one that hosts the store, which goes with it."""
    text = """
    signs = make(60)
    wait_for_rounds(signs, 1)
    if rank == int(os.environ["FAILING"]):
        try:
            raise ValueError("bad sample")
        except ValueError as error:
            signs.report(error)
            assert signs.cause_of(error) is None
        assert not failures
    else:
        has_failed.wait()
        say(failures[0].rank, failures[0])
    signs.stop()
    signs.stop()
    """
    ended = ranks(script(text)).run(3, variables={"FAILING": failing})
    assert [code for code, _ in ended] == [0, 0, 0], ended
    (said,) = {said for rank, (_, said) in enumerate(ended) if rank != int(failing)}
    assert said.startswith(f"{failing} rank {failing} on ")
    assert " has failed: ValueError: bad sample\n\n" in said
    assert f'On rank {failing}:\nTraceback (most recent call last):\n  File "' in said
    assert 'raise ValueError("bad sample")' in said


def test_rank_that_is_killed_is_silent(ranks: Callable[[str], Ranks]) -> None:
    text = """
    signs = make(2)
    wait_for_rounds(signs, 1)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    has_failed.wait()
    say(failures[0])
    signs.stop()
    """
    ended = ranks(script(text)).run(3)
    assert [code for code, _ in ended] == [0, -signal.SIGKILL, 0]
    assert ended[0] == ended[2]
    assert ended[0][1].startswith("rank 1 on ") and " has given no sign of life for 2 s: " in ended[0][1]


def test_rank_whose_process_is_stopped_is_silent_and_hears_of_it_when_it_goes_on(
    ranks: Callable[[str], Ranks],
) -> None:
    text = """
    signs = make(2)
    wait_for_rounds(signs, 1)
    say("lives")
    has_failed.wait()
    say(failures[0])
    sys.stdin.readline()
    signs.stop()
    """
    both = ranks(script(text))
    first, other = both.start(0), both.start(1)
    assert first.stdout.readline() == other.stdout.readline() == "lives\n"
    other.send_signal(signal.SIGSTOP)
    said = first.stdout.readline()
    assert said.startswith("rank 1 on ") and " has given no sign of life for 2 s: " in said
    other.send_signal(signal.SIGCONT)
    assert other.stdout.readline() == said
    for each in (other, first):
        each.stdin.write("\n")
        each.stdin.flush()
        each.communicate()
        assert each.returncode == 0


def test_store_that_does_not_answer_is_a_failure(ranks: Callable[[str], Ranks]) -> None:
    """As when a link is cut: the connection is there, and nothing comes through it."""
    text = """
    signs = make(2)
    wait_for_rounds(signs, 1)
    say("lives")
    has_failed.wait()
    say(failures[0])
    signs.report(ValueError("is not told"))
    signs.stop()
    """
    both = ranks(script(text))
    first, other = both.start(0), both.start(1)
    assert first.stdout.readline() == other.stdout.readline() == "lives\n"
    first.send_signal(signal.SIGSTOP)
    said, _ = other.communicate()
    assert f" cannot be reached: the store at 127.0.0.1:{both.port} has not answered for 2 s" in said
    assert other.returncode == 0


def test_rank_that_hangs_says_so_with_its_stack_and_ends_itself(ranks: Callable[[str], Ranks]) -> None:
    text = """
    signs = make(2)
    def hang_here():
        threading.Event().wait()
    signs.place = (2, 2)
    if rank == 1:
        signs.place = (3, 1)
        hang_here()
    signs.place = (3, 2)
    has_failed.wait()
    say(failures[0])
    if rank == 0:
        # The store goes with this rank
        with signs._read:
            signs._read.wait_for(lambda: signs._signs[2].knows_failure)
    signs.stop()
    """
    (code, said), (other_code, last_words), third = ranks(script(text)).run(3)
    assert code == 0 and third == (code, said)
    assert (
        said.startswith("rank 1 on ")
        and "has not come on for 2 s, while others wait for it: it is in" in said
    )
    assert "is in the forward pass of batch 3. If it is only slow, raise rank_timeout." in said
    assert "in hang_here\n" in said
    assert other_code == 1
    # torch has said that the store is gone
    assert (
        "\noffloop: rank 1 on " in f"\n{last_words}"
        and " ends itself: RankFailedError: rank 1 on " in last_words
    )
    # Before the others, whom its closed connections bring out
    assert "offloop: its training thread has not come out for 2 s:\n" in last_words


def test_rank_that_is_excused_or_comes_on_is_not_late(ranks: Callable[[str], Ranks]) -> None:
    text = """
    signs = make(1)
    others = SignsOfLife(store, launch, "another run", timeout=1, fail=fail, **of_attention)
    if rank == 0:
        signs.place = (5, 0)
    else:
        signs.excused = True
        wait_for_rounds(signs, 20)  # eight to each time-out
        signs.excused = False
        for batch in range(5):
            signs.place = (batch, 1)
            wait_for_rounds(signs, 4)
    signs.leave()
    assert signs.wait_for_others() and not failures
    signs.stop()
    """
    assert ranks(script(text)).run() == [(0, ""), (0, "")]


def test_ranks_leave_together_although_the_store_goes_with_one_of_them(
    ranks: Callable[[str], Ranks],
) -> None:
    text = """
    signs = make(2)
    if rank == int(os.environ["LATE"]):
        sys.stdin.readline()
    signs.leave()
    if rank != int(os.environ["LATE"]):
        assert not signs.wait_for_others(0.1)
        say("waits")
    assert signs.wait_for_others()
    # Nobody misses the store of a rank that has ended
    if rank == 0:
        signs.stop()
        say("gone")
        os._exit(0)
    say("left")
    sys.stdin.readline()
    assert not failures
    signs.stop()
    """
    for late in ("0", "1"):
        both = ranks(script(text))
        processes = [both.start(rank, variables={"LATE": late}) for rank in range(2)]
        early, last = processes[1 - int(late)], processes[int(late)]
        assert early.stdout.readline() == "waits\n"
        last.stdin.write("\n")
        last.stdin.flush()
        assert processes[0].communicate()[0] == "gone\n"
        assert processes[1].communicate("\n")[0] == "left\n"
        assert processes[1].returncode == 0


def test_run_leaves_nothing_in_the_store(ranks: Callable[[str], Ranks]) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    text = """
    if rank == 0:
        say(store.num_keys())
    signs = make(2)
    wait_for_rounds(signs, 5)
    if rank == 0:
        say(store.num_keys())
    signs.leave()
    signs.wait_for_others()
    signs.stop()
    """
    (_, said), _ = ranks(script(text)).run(
        port=store.port, variables={"TORCHELASTIC_USE_AGENT_STORE": "True"}
    )
    before, meanwhile = map(int, said.split())
    assert (meanwhile, store.num_keys()) == (before + 3, before)


def test_rank_that_has_left_is_missed_by_nobody(ranks: Callable[[str], Ranks]) -> None:
    """Neither where it stops at once, nor where it waits for the others and is killed."""
    text = """
    signs = make(1)
    wait_for_rounds(signs, 1)
    if rank:
        signs.leave()
        if rank == 1:
            signs.stop()
        else:
            signs.wait_for_others(1)
        os.kill(os.getpid(), signal.SIGKILL)
    with signs._read:
        signs._read.wait_for(lambda: signs._has_left(1) and signs._has_left(2))
    number = signs._signs[0].number
    with signs._read:
        signs._read.wait_for(lambda: failures or signs._signs[0].number > number + 30)
    assert not failures
    signs.leave()
    assert signs.wait_for_others()
    signs.stop()
    """
    assert ranks(script(text)).run(3)[0] == (0, "")


def test_any_rank_may_ask_for_the_attention_of_rank_0(ranks: Callable[[str], Ranks]) -> None:
    text = """
    signs = make(30)
    for _ in range(2):
        if rank == 1:
            sys.stdin.readline()
            wanted.append(True)
        else:
            is_asked.wait()
            is_asked.clear()
            say("asked")
    signs.leave()
    signs.wait_for_others()
    assert not is_asked.is_set()
    signs.stop()
    """
    both = ranks(script(text))
    first, other = both.start(0), both.start(1)
    for _ in range(2):
        other.stdin.write("\n")
        other.stdin.flush()
        assert first.stdout.readline() == "asked\n"
    for each in (first, other):
        assert each.communicate()[0] == "" and each.returncode == 0


@pytest.mark.parametrize("ending", ["raise", "kill 0", "kill 1"])
def test_cause_of_a_broken_collective_is_the_rank_that_failed(
    ending: str, ranks: Callable[[str], Ranks]
) -> None:
    text = """
    import torch
    from offloop.engine.distributed.group import join
    group = join(launch, store, torch.device("cpu"))
    signs = make(60)
    wait_for_rounds(signs, 1)
    group.gather(b"")
    failing, ending = int(os.environ["ENDING"][-1] == "1"), os.environ["ENDING"]
    if rank == failing and ending == "raise":
        signs.report(ValueError("bad sample"))
        os._exit(1)
    if rank == failing:
        os.kill(os.getpid(), signal.SIGKILL)
    assert signs.cause_of(RuntimeError("of the user's")) is None
    try:
        group.gather(b"")
    except RuntimeError as error:
        say(signs.cause_of(error))
        say(failures == [signs.failure])
    signs.stop()
    """
    both = ranks(script(text))
    processes = [both.start(rank, variables={"ENDING": ending}) for rank in range(2)]
    failing = int(ending[-1] == "1")
    said, _ = processes[1 - failing].communicate()
    expected = {
        "raise": " has failed: ValueError: bad sample\n",
        "kill 0": " cannot be reached: the store at ",
        "kill 1": " has ended without a word: ",
    }
    assert f"rank {failing} on " in said and expected[ending] in said and said.endswith("True\n")
    assert processes[1 - failing].returncode == 0
