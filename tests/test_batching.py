"""The engine side of the server: continuous batching gives every request the text that it has alone."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import conftest
import matquant
from cases import each
from matquant import _native
from matquant.core.spec import Plan
from matquant.engine.sampling import Sampling
from matquant.serve import batching, stepping
from matquant.serve.admission import Limits, available_bytes, cache_bytes, candidates, resolve_kv_bytes
from matquant.serve.batching import Batching, start
from matquant.serve.scheduling import Piece
from matquant.serve.stepping import now_s
from matquant.serve.work import Event, Refused
from matquant.system.errors import InputError
from serving import COSTS, PATIENT_S, Gate, Receiver, alone, generation, reference_engine, run, starting

TEXT = "Once upon a time, there was a little dog who lived in a small house near the wood. He said"
PLAN = Plan(default=4, bits={"model.layers.0.mlp.down_proj": 8, "model.layers.1.self_attn.q_proj": 2})


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> matquant.Engine:
    return reference_engine(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def ids(engine: matquant.Engine) -> list[int]:
    return engine.prompt_ids(TEXT)


@pytest.fixture
def serve(engine: matquant.Engine) -> Iterator[Callable[..., Batching]]:
    """start() with options, stopped at the end."""
    with starting(engine) as get:
        yield get


# ---------------------------------------------------------------------------------------------------------- same text


@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(temperature=0.9, seed=5), Sampling(temperature=1.2, top_k=40, top_p=0.9, min_p=0.01, seed=2)],
    ids=["greedy", "sampled", "nucleus"],
)
@pytest.mark.parametrize("plan", [Plan(default=8), Plan(default=3), Plan(default=2), PLAN], ids=["8", "3", "2", "plan"])
def test_text_is_that_of_the_engine(
    serve: Callable[..., Batching], engine: matquant.Engine, ids: list[int], plan: Plan, sampling: Sampling
) -> None:
    one = generation(ids, plan=plan, sampling=sampling, ends=engine.ends)
    got = run(serve(), one)[0]
    tokens = got.tokens[:-1] if got.finish == "stop" else got.tokens
    assert tokens == alone(engine, one)
    assert set(got.bits) == {"plan" if plan.bits else str(plan.default)}


def mixed(ids: list[int], count: int = 16) -> list[Any]:
    """Generations of all kinds: widths, a plan, lengths, sampling, prompts that share their start or do not."""
    plans = [Plan(default=8), Plan(default=4), Plan(default=2), PLAN, Plan(default=3)]
    return [
        generation(
            ids[number % 3 :] + ids[: 3 * number],
            plan=plans[number % len(plans)],
            max_tokens=5 + 4 * (number % 5),
            sampling=Sampling() if number % 2 else Sampling(temperature=1.0, top_p=0.95, seed=number),
            priority=number % 2,
        )
        for number in range(count)
    ]


def test_sixteen_mixed_requests_are_bit_equal_to_each_alone(
    serve: Callable[..., Batching], engine: matquant.Engine, ids: list[int]
) -> None:
    requests = mixed(ids)
    batcher = serve(chunk=16)
    together = run(batcher, *requests)
    assert [got.tokens for got in together] == [alone(engine, one) for one in requests]
    assert batcher.stats()["native_steps"] > batcher.stats()["steps"]  # several widths in one step


def test_log_probabilities_do_not_depend_on_the_load(serve: Callable[..., Batching], ids: list[int]) -> None:
    one = generation(ids, bits=4, logprobs=2)
    others = [generation(ids[number:], bits=(8, 4, 2)[number % 3]) for number in range(8)]
    loaded = run(serve(chunk=7), *others[:4], one, *others[4:])[4]
    quiet = run(serve(), one)[0]
    assert [event.token for event in loaded.events] == [event.token for event in quiet.events]


def test_requests_that_come_and_go_do_not_change_a_text(
    serve: Callable[..., Batching], engine: matquant.Engine, ids: list[int]
) -> None:
    long = generation(ids, bits=8, max_tokens=60, sampling=Sampling(temperature=1.0, seed=1))
    batcher, receiver = serve(), Receiver()
    batcher.submit(long, receiver)
    for number in range(6):
        run(batcher, generation(ids[number:], bits=2 + number, max_tokens=4))
    assert receiver.wait().tokens == alone(engine, long)


def test_many_threads_submit_at_once(serve: Callable[..., Batching], engine: matquant.Engine, ids: list[int]) -> None:
    batcher = serve()
    results: list[tuple[Any, list[int]]] = []

    def use(thread: int) -> None:
        for number in range(3):
            one = generation(ids[thread:], bits=2 + thread, max_tokens=4 + number, sampling=Sampling(seed=number))
            results.append((one, run(batcher, one)[0].tokens))
            batcher.stats()

    threads = [threading.Thread(target=use, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENT_S)
    assert len(results) == 18
    assert all(tokens == alone(engine, one) for one, tokens in results)


@pytest.mark.parametrize("activations", ["int8", "float"])
@pytest.mark.parametrize("family", ["gemma2", "qwen3"])
def test_families_and_modes_have_the_text_that_they_have_alone(
    family_model: Callable[[str], Path], tmp_path: Path, family: str, activations: str
) -> None:
    out = conftest.quantize(family_model(family), tmp_path / "out", method="rtn", scope="linears")
    engine = matquant.Engine(out, threads=1, activations=activations)
    shared = list(range(30, 55))
    batcher = start(engine, costs=COSTS, policy=False, chunk=6)
    requests = [
        generation([*shared[: 25 - 3 * (number % 2)], number], bits=(8, 4, 2)[number % 3], max_tokens=20)
        for number in range(12)
    ]
    got = run(batcher, *requests) + run(batcher, *requests)
    assert [one.tokens for one in got] == [alone(engine, one) for one in requests] * 2
    assert all(one.cached for one in got[12:])
    batcher.stop(0)


def test_the_context_ends_a_text(serve: Callable[..., Batching], engine: matquant.Engine, ids: list[int]) -> None:
    prompt = (ids * 40)[: engine.context - 5]
    one = generation(prompt, bits=8, max_tokens=100)
    got = run(serve(), one)[0]
    assert got.finish == "length"
    assert len(got.tokens) == 6  # the last one is not read, so it takes no room
    assert got.tokens == alone(engine, one)


# -------------------------------------------------------------------------------------------------------- scheduling


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[int, int]]]:
    """Of every step, the request number and the rows of each piece."""
    seen: list[list[tuple[int, int]]] = []
    step = stepping.Stepper.step

    def spy(self: stepping.Stepper, pieces: Sequence[Piece], *, reason: str) -> tuple[float, float]:
        seen.append([(piece.slot.number, piece.stop - piece.start) for piece in pieces])
        return step(self, pieces, reason=reason)

    monkeypatch.setattr(stepping.Stepper, "step", spy)
    return seen


def test_prompts_are_read_in_chunks_while_others_decode(
    serve: Callable[..., Batching], ids: list[int], steps: list[list[tuple[int, int]]]
) -> None:
    batcher = serve(chunk=8, max_batched_tokens=64)
    first, gate = Receiver(), Gate()
    batcher.submit(generation(ids, bits=8, constraint=gate, max_tokens=40), first)
    gate.reached.wait(PATIENT_S)
    second = Receiver()
    batcher.submit(generation((ids * 5)[:90], bits=4), second)
    gate.open.set()
    first.wait()
    second.wait()
    assert steps[0] == [(0, len(ids))]  # alone: up to max_batched_tokens
    both = [step for step in steps if len(step) == 2]
    assert all(step[0] == (0, 1) for step in both)  # a decoding sequence is in every step
    assert [step[1][1] for step in both][:12] == [8] * 11 + [2]


def test_a_chunk_fills_the_rows_that_a_product_takes_together(
    serve: Callable[..., Batching], engine: matquant.Engine, ids: list[int], steps: list[list[tuple[int, int]]]
) -> None:
    batcher, gate, receivers = serve(chunk=8, max_batched_tokens=64), Gate(), [Receiver(), Receiver()]
    batcher.submit(generation(ids, bits=8, constraint=gate, max_tokens=40), receivers[0])
    gate.reached.wait(PATIENT_S)
    batcher.submit(generation((ids * 5)[:90], bits=8), receivers[1])
    gate.open.set()
    for receiver in receivers:
        receiver.wait()
    both = [step for step in steps if len(step) == 2]
    assert both[0][1][1] == _native.padded_tokens(9, engine.exact) - 1 > 8
    assert _native.padded_tokens(both[0][1][1] + 2, engine.exact) > both[0][1][1] + 1


def test_a_request_of_higher_priority_is_started_first(
    serve: Callable[..., Batching], ids: list[int], steps: list[list[tuple[int, int]]]
) -> None:
    batcher, gate = serve(max_num_seqs=1), Gate()
    receivers = [Receiver() for _ in range(4)]
    batcher.submit(generation(ids, bits=8, constraint=gate, max_tokens=1), receivers[0])
    gate.reached.wait(PATIENT_S)
    for receiver, priority in zip(receivers[1:], (0, 0, 5), strict=True):
        batcher.submit(generation(ids[priority:], bits=8, max_tokens=1, priority=priority), receiver)
    gate.open.set()
    for receiver in receivers:
        receiver.wait()
    assert [step[0][0] for step in steps] == [0, 3, 1, 2]


def test_cancelling_removes_the_rows_within_two_steps(
    serve: Callable[..., Batching], ids: list[int], steps: list[list[tuple[int, int]]]
) -> None:
    batcher = serve()
    receiver, cancelled_at = Receiver(), []

    def deliver(events: Sequence[Event]) -> None:
        receiver(events)
        if len(receiver.tokens) == 3 and not cancelled_at:
            cancelled_at.append(len(steps))
            handle.cancel()

    other = Receiver()
    batcher.submit(generation(ids[2:], bits=8, max_tokens=60), other)
    handle = batcher.submit(generation(ids, bits=4, max_tokens=400), deliver)
    assert receiver.wait().finish == "abort"
    assert other.wait().finish == "length"
    assert len(receiver.tokens) <= 3 + 2
    assert not any(number == 1 for step in steps[cancelled_at[0] + 2 :] for number, _ in step)


@pytest.mark.parametrize("seed", range(3))
def test_any_order_of_requests_and_cancellations_ends_well(
    serve: Callable[..., Batching], engine: matquant.Engine, ids: list[int], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    batcher = serve(
        max_num_seqs=4, max_batched_tokens=24, chunk=5, kv_bytes=5 * cache_bytes(engine, 80), max_queued_requests=99
    )
    kept, cancelled = [], []
    for number in range(40):
        start_at, stop_at = sorted(rng.choice(len(ids) + 1, 2, replace=False).tolist())
        one = generation(
            ids[:stop_at] if number % 3 else ids[start_at:] * 2,
            bits=int(rng.choice([8, 4, 2])),
            max_tokens=int(rng.integers(1, 12)),
            priority=int(rng.integers(3)),
        )
        receiver = Receiver()
        handle = batcher.submit(one, receiver)
        if rng.random() < 0.4:
            timer = threading.Timer(float(rng.random()) / 50, handle.cancel)
            timer.start()
            cancelled.append((one, receiver))
        else:
            kept.append((one, receiver))
    assert all(receiver.wait().tokens == alone(engine, one) for one, receiver in kept)
    for one, receiver in cancelled:
        text = alone(engine, one)
        assert receiver.wait().finish in ("abort", "length")
        assert receiver.tokens == text[: len(receiver.tokens)]
    stats = batcher.stats()
    assert (stats["running"], stats["waiting"], stats["kv_bytes_reserved"]) == (0, 0, 0)
    assert stats["kv_bytes"] <= stats["kv_bytes_limit"]


def test_a_request_is_cancelled_while_it_waits_and_while_its_prompt_is_read(
    serve: Callable[..., Batching], ids: list[int]
) -> None:
    batcher, gate = serve(max_num_seqs=2, chunk=1), Gate()
    receivers = [Receiver() for _ in range(3)]
    batcher.submit(generation(ids, bits=8, constraint=gate, max_tokens=200), receivers[0])
    gate.reached.wait(PATIENT_S)
    reading = batcher.submit(generation(ids * 5, bits=4), receivers[1])
    waiting = batcher.submit(generation(ids, bits=4), receivers[2])
    gate.open.set()
    waiting.cancel()
    reading.cancel()
    assert [receiver.wait().events for receiver in receivers[1:]] == [[Event(finish="abort")]] * 2
    assert receivers[0].wait().finish == "length"


# ---------------------------------------------------------------------------------------------------- limits and ends


def test_requests_beyond_the_queue_are_refused_with_a_time_to_retry(
    serve: Callable[..., Batching], ids: list[int]
) -> None:
    batcher, gate = serve(max_num_seqs=1, max_queued_requests=2), Gate()
    receivers = [Receiver() for _ in range(3)]
    batcher.submit(generation(ids, bits=8, constraint=gate), receivers[0])
    gate.reached.wait(PATIENT_S)
    for receiver in receivers[1:]:
        batcher.submit(generation(ids, bits=8), receiver)
    with pytest.raises(
        Refused, match=r"2 requests with \d+ tokens are waiting, as many as max_queued_requests allows"
    ) as full:
        batcher.submit(generation(ids, bits=8), Receiver())
    assert 1 <= full.value.retry_after_s <= 120
    assert batcher.stats()["rejections/max_queued_requests"] == 1
    gate.open.set()
    assert [receiver.wait().finish for receiver in receivers] == ["length"] * 3
    run(batcher, generation(ids, bits=8))  # there is room again


def test_queued_tokens_are_limited(serve: Callable[..., Batching], ids: list[int]) -> None:
    batcher, gate = serve(max_num_seqs=1, max_queued_tokens=2 * len(ids)), Gate()
    batcher.submit(generation(ids, bits=8, constraint=gate), Receiver())
    gate.reached.wait(PATIENT_S)
    for _ in range(2):
        batcher.submit(generation(ids, bits=8), Receiver())
    with pytest.raises(Refused, match="max_queued_tokens"):
        batcher.submit(generation(ids[:1], bits=8), Receiver())
    gate.open.set()


def test_requests_that_start_at_once_are_not_counted_as_waiting(serve: Callable[..., Batching], ids: list[int]) -> None:
    batcher, receivers = serve(max_num_seqs=4, max_queued_tokens=len(ids)), [Receiver() for _ in range(5)]
    with batcher._changed:  # the engine thread sees all of them at once
        for receiver in receivers:
            batcher.submit(generation(ids, bits=8, max_tokens=2), receiver)
        with pytest.raises(Refused, match="max_queued_tokens"):
            batcher.submit(generation(ids[:1], bits=8), Receiver())
    assert [receiver.wait().finish for receiver in receivers] == ["length"] * 5


def test_requests_wait_for_the_memory_of_keys_and_values(
    serve: Callable[..., Batching], engine: matquant.Engine, ids: list[int], steps: list[list[tuple[int, int]]]
) -> None:
    room = cache_bytes(engine, len(ids) + 24)
    batcher = serve(kv_bytes=2 * room)
    run(batcher, *[generation(ids[number:] + ids[:number], bits=8) for number in range(6)])
    assert max(len(step) for step in steps) == 2
    assert batcher.stats()["kv_bytes"] <= 2 * room
    with pytest.raises(InputError, match=r"need \d+ bytes of keys and values, and the server has"):
        batcher.submit(generation(ids, bits=8, max_tokens=10 * len(ids)), Receiver())


def test_draining_finishes_what_was_admitted(serve: Callable[..., Batching], ids: list[int]) -> None:
    batcher, gate = serve(max_num_seqs=2), Gate()
    receivers = [Receiver() for _ in range(4)]
    batcher.submit(generation(ids, bits=8, constraint=gate), receivers[0])
    for receiver in receivers[1:]:
        batcher.submit(generation(ids, bits=4), receiver)
    stopping = threading.Thread(target=batcher.stop, args=(PATIENT_S,))
    gate.reached.wait(PATIENT_S)
    stopping.start()
    while not batcher._draining:
        pass
    with pytest.raises(Refused, match="the server is stopping"):
        batcher.submit(generation(ids, bits=8), Receiver())
    gate.open.set()
    stopping.join(PATIENT_S)
    assert [receiver.wait().finish for receiver in receivers] == ["length"] * 4
    assert batcher.stats()["caches"] == 0


def test_stopping_at_once_aborts_the_rest(serve: Callable[..., Batching], ids: list[int]) -> None:
    batcher, gate = serve(max_num_seqs=1), Gate()
    receivers = [Receiver(), Receiver()]
    batcher.submit(generation(ids, bits=8, constraint=gate), receivers[0])
    batcher.submit(generation(ids, bits=8), receivers[1])
    gate.reached.wait(PATIENT_S)
    threading.Timer(0.05, gate.open.set).start()
    batcher.stop(0)
    assert [receiver.wait().finish for receiver in receivers] == ["abort", "abort"]


def test_a_process_may_end_without_stopping(engine: matquant.Engine) -> None:
    code = f"""if True:
        import matquant, threading
        from matquant.engine.sampling import Sampling
        from matquant.serve.batching import start
        from matquant.serve.work import Generation
        done = threading.Event()
        batcher = start(matquant.Engine({str(engine.path)!r}, threads=1))
        batcher.submit(Generation(ids=[5], max_tokens=400, sampling=Sampling()), lambda events: done.set())
        done.wait()
        """
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (ended.stdout, ended.stderr) == ("", "")


class Broken:
    """A constraint that raises at the third token."""

    ended = False

    def __init__(self) -> None:
        self.calls = 0

    def mask(self, logits: np.ndarray) -> None:
        self.calls += 1
        if self.calls == 3:
            raise RuntimeError("the grammar is lost")

    def accept(self, token: int) -> None:
        """Take a token."""


def test_a_broken_request_ends_alone(serve: Callable[..., Batching], engine: matquant.Engine, ids: list[int]) -> None:
    other = generation(ids, bits=8)
    broken, good = run(serve(), generation(ids[1:], bits=8, constraint=Broken()), other)
    assert (len(broken.tokens), broken.events[-1]) == (
        2,
        Event(finish="error", reason="RuntimeError: the grammar is lost"),
    )
    assert good.tokens == alone(engine, other)


def test_a_receiver_that_raises_ends_its_request_alone(serve: Callable[..., Batching], ids: list[int]) -> None:
    notes: list[str] = []
    batcher = serve(note=notes.append)

    def deliver(events: Sequence[Event]) -> None:
        raise ConnectionError("gone")

    batcher.submit(generation(ids, bits=8), deliver)
    assert run(batcher, generation(ids, bits=4))[0].finish == "length"
    assert notes[0] == "events could not be delivered: ConnectionError: gone"
    assert batcher.stats()["running"] == 0


def test_an_error_of_the_engine_ends_all_requests_and_is_told(
    serve: Callable[..., Batching], ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    batcher, gate = serve(max_num_seqs=1), Gate()
    receivers = [Receiver(), Receiver()]
    batcher.submit(generation(ids, bits=8, constraint=gate), receivers[0])
    batcher.submit(generation(ids, bits=8), receivers[1])
    gate.reached.wait(PATIENT_S)

    def fail(*_: object) -> None:
        raise RuntimeError("no more")

    monkeypatch.setattr(_native, "step", fail)
    gate.open.set()
    told = "the engine has stopped: RuntimeError: no more"
    assert [receiver.wait().events[-1] for receiver in receivers] == [Event(finish="error", reason=told)] * 2
    assert batcher.failure == "RuntimeError: no more"
    assert batcher.stats()["failed"] == 1
    with pytest.raises(Refused, match=told):
        batcher.submit(generation(ids, bits=8), Receiver())


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"ids": []}, r"the prompt has 0 tokens; give 1 to \d+"),
        ({"ids": [5] * 2000}, r"the prompt has 2000 tokens; give 1 to \d+"),
        ({"ids": [5, 10**6]}, r"the prompt has the token 1000000; the model has tokens 0 to \d+"),
        ({"ids": [5], "max_tokens": 0}, "max_tokens=0; give a number of at least 1"),
        ({"ids": [5], "plan": Plan(default=4, bits={"nothing": 2})}, "the plan names 'nothing'"),
    ],
)
def test_a_request_that_cannot_run_is_rejected(
    serve: Callable[..., Batching], wrong: dict[str, Any], told: str
) -> None:
    with pytest.raises(InputError, match=told):
        serve().submit(generation(wrong.pop("ids"), **wrong), Receiver())


@each(
    ("wrong", "told"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs=0; give a number above 0"),
        ({"max_num_seqs": 20, "max_batched_tokens": 16}, "max_batched_tokens=16 is below max_num_seqs=20"),
        ({"max_num_seqs": 20000}, "20000 rows are more than the 16384 that a step takes"),
        ({"max_queued_requests": -1}, "max_queued_requests=-1"),
        ({"kv_bytes": 100}, "kv_bytes=100 does not hold one sequence"),
        ({"kv_bytes": 2**60}, r"kv_bytes=\d+ exceeds the \d+ bytes of memory available"),
        ({"widths": (8, 9)}, "9"),
    ],
)
def test_limits_that_cannot_be_are_rejected(engine: matquant.Engine, wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        start(engine, costs=COSTS, **wrong)


@each(
    ("options", "widths"),
    [
        ({}, (8, 6, 4)),
        ({"min_bits": 2}, (8, 6, 4, 3, 2)),
        ({"min_bits": 5}, (8, 6)),
        ({"widths": (2, 4, 8), "min_bits": 3}, (8, 4)),
        ({"widths": (2,)}, (8,)),
    ],
)
def test_the_policy_chooses_among(engine: matquant.Engine, options: dict[str, Any], widths: tuple[int, ...]) -> None:
    assert candidates(engine, Limits(**options)) == widths


def test_memory_for_keys_and_values_is_a_quarter_of_what_is_available(engine: matquant.Engine, tmp_path: Path) -> None:
    most = 16 * cache_bytes(engine, engine.context)
    assert resolve_kv_bytes(engine, Limits(), available=None) == most
    assert resolve_kv_bytes(engine, Limits(), available=most) == most // 4
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9 kB\nMemAvailable:  7 kB\n")
    assert available_bytes(meminfo) == 7168
    assert available_bytes(tmp_path / "none") is None


def test_five_hundred_short_requests_leave_memory_flat(serve: Callable[..., Batching], ids: list[int]) -> None:
    batcher = serve(kv_bytes=2**20, max_queued_requests=500)
    caches = []
    for turn in range(10):
        requests = [
            generation([*ids[number % 7 :], turn, number], bits=8 - number % 7, max_tokens=2) for number in range(50)
        ]
        run(batcher, *requests)
        end = time.monotonic() + PATIENT_S
        while batcher.stats()["running"]:  # its last event comes before a sequence is put away
            assert time.monotonic() < end, "a sequence goes on after its end"
        stats = batcher.stats()
        caches.append(stats["caches"])
        assert stats["kv_bytes"] <= 2**20
        assert (stats["running"], stats["waiting"], stats["kv_bytes_reserved"]) == (0, 0, 0)
    assert max(caches[3:]) <= max(caches[:3]) + 2
    assert batcher.stats()["finished/length"] == 500


# ------------------------------------------------------------------------------------------------------ prefix reuse


def test_a_copied_prefix_gives_the_logits_of_a_computed_one(engine: matquant.Engine, ids: list[int]) -> None:
    native, widths = engine.model.native, engine.widths(4)
    workspace = _native.Workspace(native, 64, 256, 1)
    logits = np.empty((2, engine.model.architecture.vocab), dtype=np.float32)
    first, second = _native.Cache(native, 200, False), _native.Cache(native, 64, False)
    count = len(ids)
    _native.step(native, widths, False, ids, list(range(count)), [first], count - 1, logits[:1], workspace)
    for length in (0, 1, 15, 16, 17, count - 1):
        second.copy_prefix(first, length)
        rest = ids[length:]
        _native.step(
            native, widths, False, rest, list(range(length, count)), [second], len(rest) - 1, logits[1:], workspace
        )
        assert np.array_equal(logits[0], logits[1])
    assert 0 == first.bytes_in_use(0) < first.bytes_in_use(20) <= first.bytes_in_use(200) == first.bytes


def test_copies_beyond_a_cache_or_between_kinds_are_rejected(engine: matquant.Engine) -> None:
    native = engine.model.native
    cache, short, exact = (_native.Cache(native, size, kind) for size, kind in ((64, False), (32, False), (64, True)))
    for source, target, length in ((cache, short, 33), (short, cache, 33), (cache, short, -1)):
        with pytest.raises(ValueError, match="the length is beyond one of the caches"):
            target.copy_prefix(source, length)
    with pytest.raises(ValueError, match="different models or modes"):
        exact.copy_prefix(cache, 16)


def test_a_prefix_is_reused_at_its_width_only(
    serve: Callable[..., Batching], engine: matquant.Engine, ids: list[int]
) -> None:
    batcher = serve()
    first = run(batcher, generation(ids, bits=4))[0]
    assert first.cached == 0
    for bits in (8, 3, 2):
        other = generation(ids, bits=bits, max_tokens=3)
        assert run(batcher, other)[0].cached == 0
    assert run(batcher, generation(ids, plan=PLAN))[0].cached == 0
    again = generation(ids, bits=4)
    got = run(batcher, again)[0]
    assert got.cached == len(ids) - 1  # the last token of a prompt is always read
    assert got.tokens == first.tokens == alone(engine, again)
    more = generation(ids + first.tokens[:8] + ids[:3], bits=4)
    got = run(batcher, more)[0]
    assert got.cached == len(ids) + 8
    assert got.tokens == alone(engine, more)
    assert batcher.stats()["cached_tokens"] == len(ids) - 1 + len(ids) + 8


@pytest.mark.parametrize("plan", [Plan(default=4), PLAN], ids=["4", "plan"])
def test_prompts_are_read_at_prefill_bits_but_for_their_last_token(
    serve: Callable[..., Batching], engine: matquant.Engine, ids: list[int], plan: Plan
) -> None:
    batcher = serve(prefill_bits=8, chunk=8)
    session, narrow = engine.session(len(ids) + 24), engine.widths(plan=plan)
    session.extend(ids[:-1], engine.widths(8))
    logits, wanted = session.extend(ids[-1:], narrow), []
    for _ in range(24):
        wanted.append(int(logits.argmax()))
        logits = session.extend(wanted[-1:], narrow)
    one = generation(ids, plan=plan)
    others = [generation(ids[1:], plan=plan), generation(ids, bits=8), generation(ids)]
    got, second, *at_one_width = run(batcher, one, *others)
    assert got.tokens == wanted != alone(engine, one)
    assert [receiver.events[0].prompt_bits for receiver in (got, second, *at_one_width)] == [8, 8, None, None]
    again = run(batcher, one)[0]  # its keys and values are kept with the width that computed them
    assert (again.tokens, again.cached) == (wanted, len(ids) - 1)
    scored = run(batcher, generation(ids, plan=plan, prompt_logprobs=True, logprobs=1))[0]
    assert scored.tokens == alone(engine, one)  # log-probabilities of a prompt are those of its width


def test_a_prompt_is_not_read_at_a_narrower_width(
    serve: Callable[..., Batching], engine: matquant.Engine, ids: list[int]
) -> None:
    one = generation(ids, bits=8)
    assert run(serve(prefill_bits=4), one)[0].tokens == alone(engine, one)


def test_answers_to_one_prompt_read_it_once(
    serve: Callable[..., Batching], engine: matquant.Engine, ids: list[int]
) -> None:
    requests = [
        generation(ids * 3, bits=8, sampling=Sampling(temperature=1.0, seed=number), max_tokens=6)
        for number in range(6)
    ]
    got = run(serve(chunk=16), *requests)
    assert [one.cached for one in got] == [0] + [3 * len(ids) - 1] * 5
    assert [one.tokens for one in got] == [alone(engine, one) for one in requests]


def test_the_least_recently_used_prefix_makes_room(
    serve: Callable[..., Batching], engine: matquant.Engine, ids: list[int]
) -> None:
    batcher = serve(kv_bytes=int(3.5 * cache_bytes(engine, len(ids) + 2)))
    prompts = [[number, *ids[1:]] for number in range(3)]
    cached = [run(batcher, generation(p, bits=8, max_tokens=2))[0].cached for p in (*prompts, prompts[2], prompts[0])]
    assert cached == [0, 0, 0, len(ids) - 1, 0]


# ------------------------------------------------------------------------------------------------------ width by load


def test_a_recorded_trace_gives_the_same_text(serve: Callable[..., Batching], ids: list[int]) -> None:
    rng = np.random.default_rng(0)
    pattern = {seed: [8, *rng.choice([8, 4, 2], 40).tolist()] for seed in range(4)}
    requests = [
        generation(ids[seed:], sampling=Sampling(temperature=0.8, seed=seed), max_tokens=30) for seed in range(4)
    ]
    recorded = run(serve(force=lambda one, number: pattern[one.sampling.seed][number]), *requests)
    for one, got in zip(requests, recorded, strict=True):
        trace = [int(bits) for bits in got.bits]
        assert trace == pattern[one.sampling.seed][:30]
        replay = run(serve(force=lambda _, number, trace=trace: trace[number]), one)[0]
        assert (replay.tokens, replay.bits) == (got.tokens, got.bits)
        fixed = run(serve(), generation(one.ids, bits=8, sampling=one.sampling, max_tokens=30))[0]
        assert fixed.tokens != got.tokens  # the trace matters


def test_the_policy_lowers_requests_that_leave_it_the_width(serve: Callable[..., Batching], ids: list[int]) -> None:
    notes: list[str] = []
    batcher = serve(policy=True, widths=(8, 4, 2), min_bits=2, latency_s=1e-9, note=notes.append)
    free, _ = run(batcher, generation(ids, max_tokens=40), generation(ids[1:], max_tokens=40))
    least = run(batcher, generation(ids, max_tokens=40, least_bits=3))[0]
    fixed = run(batcher, generation(ids, bits=8, max_tokens=40))[0]
    assert set(fixed.bits) == {"8"}
    assert free.bits[0] == least.bits[0] == "8"  # prompts are read at the widest width
    assert (free.bits[-1], least.bits[-1]) == ("2", "4")
    changed = [event.reason for event in free.events if event.reason]
    assert changed[0].startswith("int8 to int")
    assert "ms between tokens at int" in changed[0]
    assert changed[-1] in notes
    stats = batcher.stats()
    assert stats["width_changes/down/latency"] >= 1
    by_width = {name: value for name, value in stats.items() if name.startswith("generation_tokens/")}
    assert sum(by_width.values()) == stats["generation_tokens"] == 160


@pytest.mark.parametrize(("least", "served"), [(8, "8"), (6, "6"), (3, "4")])
def test_a_request_is_not_served_below_its_least_bits_whatever_the_policy_may_choose(
    serve: Callable[..., Batching], engine: matquant.Engine, ids: list[int], least: int, served: str
) -> None:
    batcher = serve(policy=True, widths=(4, 2), min_bits=2, latency_s=1e-9)
    one, beside = run(batcher, generation(ids, least_bits=least), generation(ids[1:], max_tokens=40))
    assert set(one.bits) == {served}
    assert one.tokens == alone(engine, generation(ids, bits=int(served)))
    assert beside.bits[0] == "4"


def test_a_text_read_at_changing_widths_is_not_reused(serve: Callable[..., Batching], ids: list[int]) -> None:
    batcher = serve(force=lambda _, number: 8 if number < 5 else 4)
    first = run(batcher, generation(ids, max_tokens=20))[0]
    longer = ids + first.tokens + ids[:2]
    assert run(batcher, generation(longer, bits=4))[0].cached == 0
    assert run(batcher, generation(longer, max_tokens=1))[0].cached == len(ids) + 4


def test_an_idle_server_returns_to_the_widest_width(
    engine: matquant.Engine, ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "IDLE_S", 0.01)
    began = now_s()
    limits = Limits(widths=(8, 4), latency_s=1e-9)
    batcher = Batching(engine, limits, costs=COSTS, clock=lambda: began + 100 * (now_s() - began))
    assert run(batcher, generation(ids, max_tokens=8))[0].bits[-1] == "4"
    stop = now_s() + PATIENT_S
    while batcher.stats()["bits"] != 8:
        assert now_s() < stop
    assert batcher.stats()["width_changes/up/recovered"] == 1
    batcher.stop(0)
