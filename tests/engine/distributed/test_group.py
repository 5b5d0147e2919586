"""Groups of real processes: what collectives give, and what forked children keep."""

from collections.abc import Callable

from rank_processes import Ranks, free_port

MEET = """
import torch, torch.distributed as dist
from offloop.engine.distributed.launch import find_launch
from offloop.engine.distributed.rendezvous import connect, own_client
from offloop.engine.distributed.group import join
launch = find_launch("auto")
store = connect(launch, timeout=30)
group = join(launch, store, torch.device("cpu"))
"""


def test_collectives_give_what_all_ranks_have_sent(ranks: Callable[[str], Ranks]) -> None:
    script = """
    import threading
    for size in (0, 1, 1016, 1017, 5000):
        sent = bytes([rank + 1]) * (size if rank else 3)
        said = group.gather(sent)
        assert said == [b"\\1" * 3, b"\\2" * size], size
    assert group.gather_objects({"rank": rank}) == [{"rank": 0}, {"rank": 1}]

    tensors = [
        torch.full((2, 3), rank, dtype=torch.bfloat16),
        torch.full((), rank == 0, dtype=torch.bool),
        torch.full((4, 4), rank, dtype=torch.int64).t()[::2],
        torch.full((2, 3, 4, 4), float(rank)).to(memory_format=torch.channels_last),
        torch.zeros(0),
        torch.full((2,), rank, dtype=torch.complex64),
    ]
    strides = [each.stride() for each in tensors]
    group.broadcast(tensors)
    assert [each.float().abs().sum().item() for each in tensors[:1] + tensors[2:4]] == [0, 0, 0]
    assert tensors[1].item() and [each.stride() for each in tensors] == strides

    number = torch.tensor([1.0 + rank, 10.0])
    group.add(number)
    assert number.tolist() == [3.0, 20.0]

    # A second run in the same process
    assert find_launch("auto") == launch and connect(launch, timeout=1) is store
    assert join(launch, store, torch.device("cpu")) is group
    # In a thread of its own, as a training thread is
    thread = threading.Thread(target=lambda: say(group.gather(b"x")))
    thread.start()
    thread.join()
    """
    for code, said in ranks(MEET + script.replace("\n    ", "\n")).run():
        assert (code, said) == (0, "[b'x', b'x']\n")


def test_death_of_a_rank_is_seen_at_once_although_its_forked_children_live(
    ranks: Callable[[str], Ranks],
) -> None:
    """On rank 0, which hosts the store, and on the other one."""
    script = """
    import multiprocessing, os, socket
    mine = own_client(store)
    mine.set("there", "")
    here, there = os.pipe()
    if os.fork() == 0:
        # As a loader's worker, which looks for its parent some seconds later. It ends when the test does
        tcp = []
        for number in map(int, os.listdir("/dev/fd")):
            try:
                each = socket.socket(fileno=os.dup(number))
            except OSError:
                continue
            if each.family == socket.AF_INET:
                tcp.append(number)
            each.close()
        os.write(there, repr(tcp).encode())
        os.close(1), os.close(2)
        sys.stdin.read()
        os._exit(0)
    say("kept", os.read(here, 100).decode())
    if rank == int(os.environ["VICTIM"]):
        group.gather(b"")
        os.kill(os.getpid(), signal.SIGKILL)
    group.gather(b"")
    try:
        group.gather(b"")
    except RuntimeError as error:
        say("closed" in str(error) or "reset" in str(error))
    """
    for victim in ("0", "1"):
        both = ranks(MEET + script.replace("\n    ", "\n"))
        processes = [both.start(rank, variables={"VICTIM": victim}) for rank in range(2)]
        survivor = processes[1 - int(victim)]
        # Without the closing, this would wait for the children, which wait for the test
        assert [survivor.stdout.readline() for _ in range(2)] == ["kept []\n", "True\n"]


def test_group_of_the_host_application_is_used_and_left_alone(ranks: Callable[[str], Ranks]) -> None:
    script = """
    import torch, torch.distributed as dist
    port = os.environ.pop("MASTER_PORT")
    for name in ("RANK", "WORLD_SIZE"):
        del os.environ[name]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    theirs = dist.group.WORLD
    from offloop.engine.distributed.launch import find_launch
    from offloop.engine.distributed.rendezvous import connect, own_client
    from offloop.engine.distributed.group import join
    launch = find_launch("auto")
    assert launch.has_host_group and (launch.rank, launch.world_size) == (rank, 2)
    assert find_launch("ddp") == launch and find_launch("none") is None
    store = connect(launch, timeout=30)
    own_client(store).set(f"here/{rank}", "x")
    assert store.get("here/0") + store.get("here/1") == b"xx"
    group = join(launch, store, torch.device("cpu"))
    assert dist.group.WORLD is theirs
    say(group.gather(str(rank).encode()))
    # The application ends its group, and makes another one: a further run meets in that
    dist.destroy_process_group()
    assert find_launch("auto") is None
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{os.environ['AGAIN']}", rank=1 - rank, world_size=2)
    launch = find_launch("auto")
    assert launch.rank == 1 - rank
    say(join(launch, connect(launch, timeout=30), torch.device("cpu")).gather(str(rank).encode()))
    """
    for code, said in ranks(script).run(variables={"AGAIN": str(free_port())}):
        assert (code, said) == (0, "[b'0', b'1']\n[b'1', b'0']\n")
