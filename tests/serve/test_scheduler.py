"""Scheduler: every answer equals the one alone, whatever arrives, leaves or shares its prompt."""

import math
import random
import threading
import time

import numpy as np
import pytest
from PIL import Image
from slot_oracle import SlotOracle, answer, make_detokenizer, make_image

import llava_jax
from llava_jax.inference.slots import SlotEngine
from llava_jax.serve import scheduler as module
from llava_jax.serve.errors import ApiError
from llava_jax.serve.jobs import Finished, Job, Piece, PreparedImage
from llava_jax.serve.limits import Limits
from llava_jax.serve.scheduler import Scheduler
from llava_jax.text.encode import IMAGE_TOKEN_ID


class Client:
    """A job, and the events that it got."""

    def __init__(self, prompt, max_new_tokens=8, **fields):
        self.events = []
        tokens, images = [], []
        for part in prompt:
            if isinstance(part, int):
                tokens.append(part)
            else:
                images.append(part)
                tokens += [IMAGE_TOKEN_ID] * len(part.layout.index)
        fields = dict(temperature=0.0, top_p=1.0, seed=0, stop=(), deadline=math.inf) | fields
        self.job = Job(np.array(tokens, np.int32), images, max_new_tokens, emit=self.events.append, **fields)

    @property
    def text(self):
        return "".join(event.text for event in self.events if isinstance(event, Piece))

    @property
    def end(self) -> Finished:
        [end] = [event for event in self.events if isinstance(event, Finished)]
        assert self.events[-1] is end
        return end


def make_scheduler(engine, limits=None, **settings):
    return Scheduler(engine, make_detokenizer, limits or Limits(), **settings)


def run(scheduler, *clients, rounds=10_000):
    """Runs rounds in this thread until all jobs have ended, or `rounds` rounds."""
    scheduler.submit(*[client.job for client in clients])
    while rounds and (scheduler._waiting or scheduler.stats().busy_slots):
        scheduler._round()
        rounds -= 1


def letters(rng, count):
    return [3 + rng.randrange(26) for _ in range(count)]


def random_client(rng, prompts, images):
    """A client whose prompt may be new, an earlier one, or a continuation of an earlier prompt and its answer."""
    if prompts and rng.random() < 0.6:
        prompt = rng.choice(prompts)
        prompt = prompt[: rng.randrange(1, len(prompt) + 1)] + letters(rng, rng.randrange(1, 8))
    else:
        prompt = [1, *letters(rng, rng.choice((0, 3, 30))), *rng.sample(images, rng.randrange(3)), *letters(rng, 5)]
    client = Client(prompt, rng.choice((1, 5, 40)), temperature=float(rng.random() < 0.3), seed=rng.randrange(3),
                    stop=rng.choice(((), (), ("e", "gh"))), adapter=rng.choice((0, 0, 1)),
                    logprobs=rng.choice((None, None, 2)))
    if len(client.job.tokens) < 90:
        prompts.append(prompt)
        return client
    return random_client(rng, prompts, images)


def check_ended(client, context):
    """The answer of a client that stayed equals the one alone, otherwise it is a start of it."""
    alone, end = answer(client.job, context), client.end
    if end.reason in ("stop", "length"):
        assert (client.text, end.reason, end.completion_tokens) == (alone.text, alone.finish_reason, len(alone.tokens))
    else:
        assert end.reason in ("cancelled", "deadline") and alone.text.startswith(client.text)
    assert end.prompt_tokens == len(client.job.tokens) > end.cached_tokens
    assert end.image_tokens == (client.job.tokens == IMAGE_TOKEN_ID).sum()
    if client.job.logprobs and end.reason == "length":
        tokens = [logprob.token for event in client.events[:-1] for logprob in event.logprobs]
        assert tokens == alone.tokens[: len(tokens)] and len(tokens) == len(alone.tokens)


@pytest.mark.parametrize("seed", range(12))
def test_answers_equal_those_alone(seed, monkeypatch):
    rng, clock = random.Random(seed), [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(module, "MIN_SHARED_TOKENS", rng.choice((1, 4, 12)))
    engine = SlotOracle(slots=rng.choice((1, 3, 4)))
    scheduler = make_scheduler(engine, image_cache_bytes=rng.choice((100, 10**6)))
    images, prompts, clients = [make_image(name, 3 + 4 * k) for k, name in enumerate("abcd")], [], []
    while len(clients) < 60 or scheduler._waiting or scheduler.stats().busy_slots:
        clock[0] += 1
        while len(clients) < 60 and rng.random() < 0.3:
            group = [random_client(rng, prompts, images)]
            if rng.random() < 0.2:
                group[0].job.deadline = clock[0] + rng.randrange(30)
            if rng.random() < 0.2:  # n = 3
                job = group[0].job
                group += [Client((), job.max_new_tokens) for _ in range(2)]
                for k, client in enumerate(group):
                    events = client.events
                    client.job = Job(**{**vars(job), "seed": job.seed + k, "emit": events.append,
                                        "cancelled": threading.Event()})
            scheduler.submit(*[client.job for client in group])
            clients += group
        if clients and rng.random() < 0.1:
            scheduler.cancel(rng.choice(clients[-8:]).job)
        scheduler._round()
    for client in clients:
        check_ended(client, engine.context)
    stats = scheduler.stats()
    assert stats.busy_slots == stats.waiting == 0 and not scheduler._prompts
    assert sum(stats.finished.values()) == len(clients) and stats.finished["error"] == 0
    assert stats.finished["stop"] and stats.finished["length"] and stats.cached_tokens
    kinds = {call[0] for call in engine.log}
    assert kinds == {"write", "decode", "encode"} | ({"copy"} if engine.slots > 1 else set())


def test_threads_submit_and_cancel_while_it_runs():
    scheduler, clients, lock = make_scheduler(SlotOracle()), [], threading.Lock()
    scheduler.start()

    def work(seed):
        rng, images, prompts = random.Random(seed), [make_image(name, 7) for name in "ab"], []
        for _ in range(15):
            client, ended = random_client(rng, prompts, images), threading.Event()
            job, events = client.job, client.events
            job.emit = lambda event, events=events, ended=ended: (
                events.append(event), isinstance(event, Finished) and ended.set())
            scheduler.submit(job)
            if rng.random() < 0.3:
                scheduler.cancel(job)
            elif rng.random() < 0.7:
                assert ended.wait(60)
            with lock:
                clients.append(client)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    scheduler.drain(60)
    assert len(clients) == 120 and scheduler.stats().busy_slots == 0
    for client in clients:
        check_ended(client, 96)


def computed(engine):
    """The number of prompt tokens that the engine computed, and the images."""
    return (sum(sum(call[2]) for call in engine.log if call[0] == "write"),
            sum(call[0] == "encode" for call in engine.log))


def test_a_chat_computes_only_its_new_turn():
    engine, image = SlotOracle(), make_image("a", 9)
    scheduler = make_scheduler(engine)
    prompt = [1, 5, image, *range(3, 20)]
    run(scheduler, first := Client(prompt, 6))
    other = Client([1, 6, 7, 8, 9], 30)  # takes another slot, not that of the chat
    run(scheduler, other)
    before, written = computed(engine), answer(first.job, 96).tokens
    second = Client([*prompt, *written, 4, 5, 6, 7], 6)
    run(scheduler, second)
    assert computed(engine) == (before[0] + 1 + 4, 1)  # the answer's last token and the new turn
    assert second.end.cached_tokens == len(second.job.tokens) - 5
    check_ended(second, 96)
    run(scheduler, third := Client(prompt, 6, adapter=1))  # nothing is shared between adapters
    assert third.end.cached_tokens == 0 and computed(engine)[1] == 2
    check_ended(third, 96)


@pytest.mark.parametrize("count, slots", [(4, 4), (32, 4)])
def test_an_image_asked_by_many_at_once_is_computed_once(count, slots):
    engine, image = SlotOracle(slots), make_image("a", 40)
    scheduler = make_scheduler(engine)
    clients = [Client([1, image, *letters(random.Random(k), 4)], 5, seed=k, temperature=1.0) for k in range(count)]
    run(scheduler, *clients)
    tokens, images = computed(engine)
    assert images == 1 and tokens <= 45 + (count - 1) * 4 and scheduler.stats().image_hits == count - 1
    for client in clients:
        check_ended(client, 96)


def test_a_short_shared_prefix_is_not_waited_for():
    engine, prefix = SlotOracle(), letters(random.Random(0), 33)
    engine.max_chunk = 64
    clients = [Client([1, *prefix, *letters(random.Random(k), 50)], 5) for k in (1, 2)]
    run(make_scheduler(engine), *clients)
    assert engine.log[0] == ("write", [0, 1], [32, 32])
    for client in clients:
        check_ended(client, 96)


def test_long_prompts_do_not_stall_answers():
    engine = SlotOracle()
    scheduler = make_scheduler(engine)
    talking = Client([1, 3], 60, stop=())
    run(scheduler, talking, rounds=2)
    engine.log.clear()
    run(scheduler, *[Client([1, *letters(random.Random(k), 80)], 3) for k in range(3)], rounds=14)
    kinds = [call[0] for call in engine.log]
    assert kinds == ["write", "decode"] * 14  # one of each in a round
    assert all(sum(call[2]) <= engine.max_chunk for call in engine.log if call[0] == "write")


def test_a_cancelled_job_frees_its_slot_within_one_step():
    engine = SlotOracle(slots=1)
    scheduler = make_scheduler(engine)
    first, second = Client([1, 3], 90), Client([1, 4], 90)
    run(scheduler, first, second, rounds=3)
    assert second.events == []
    scheduler.cancel(first.job)
    before = len(engine.log)
    scheduler._round()
    assert first.end.reason == "cancelled" and [call[0] for call in engine.log[before:]] == ["write", "decode"]
    run(scheduler)
    check_ended(second, 96)


def test_deadlines_end_waiting_and_running_jobs(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    scheduler = make_scheduler(SlotOracle(slots=1))
    running, waiting = Client([1, 3], 90, deadline=5.0), Client([1, 4], 90, deadline=4.0)
    run(scheduler, running, waiting, rounds=3)
    clock[0] = 4.5
    scheduler._round()
    assert waiting.end == Finished("deadline", 2) and not any(isinstance(e, Finished) for e in running.events)
    clock[0] = 5.0
    scheduler._round()
    assert running.end.reason == "deadline" and running.end.completion_tokens > 0


def test_the_queue_is_bounded():
    scheduler = make_scheduler(SlotOracle(slots=2), Limits(queue=3))
    clients = [Client([1, 3, k]) for k in range(3, 9)]
    with pytest.raises(ApiError):  # all or none
        scheduler.submit(*[client.job for client in clients])
    run(scheduler, *clients[:5], rounds=0)
    with pytest.raises(ApiError) as refused:
        scheduler.submit(clients[5].job)
    assert refused.value.status == 429 and 1 <= refused.value.retry_after <= 60
    run(scheduler)
    run(scheduler, clients[5])
    for client in clients:
        check_ended(client, 96)
    assert scheduler.stats().rejected == 7


def test_the_images_of_the_queue_are_bounded():
    scheduler = make_scheduler(SlotOracle(), Limits(queue_bytes=2 * make_image("a", 9).tiles.nbytes))
    clients = [Client([1, make_image(name, 9), 3]) for name in "abc"]
    with pytest.raises(ApiError) as refused:
        scheduler.submit(*[client.job for client in clients])
    assert refused.value.status == 429
    run(scheduler, *clients[:2])
    with pytest.raises(ValueError, match="leaves no room"):  # the web side checks it
        scheduler.submit(Client([1] * 96).job)


class Stop(Exception):
    pass


def test_an_emit_that_raises_ends_its_job_alone():
    scheduler = make_scheduler(SlotOracle())

    def emit(event):
        raise Stop

    broken, other = Client([1, 3], 50), Client([1, 4], 50)
    broken.job.emit = emit
    run(scheduler, broken, other)
    check_ended(other, 96)
    assert scheduler.stats().finished["cancelled"] == 1


@pytest.mark.parametrize("call", ["write", "decode", "copy"])
def test_a_failing_engine_ends_the_jobs_in_slots(call, caplog):
    engine = SlotOracle(slots=2)
    engine.failures[call] = RuntimeError("secret")
    scheduler = make_scheduler(engine)
    image = make_image("a", 40)
    clients = [Client([1, image, k], 9) for k in range(3, 9)]
    scheduler.submit(*[client.job for client in clients])
    scheduler.start()
    scheduler.drain(60)
    errors = [client for client in clients if client.end.reason == "error"]
    assert 0 < len(errors) <= 2 and "secret" in caplog.text and not scheduler.failed
    for client in clients:
        if client not in errors:
            check_ended(client, 96)


def test_a_failing_tower_ends_its_job_alone():
    engine = SlotOracle()
    scheduler = make_scheduler(engine)
    clients = [Client([1, make_image("a", 9), 3]), Client([1, 4], 40)]
    run(scheduler, clients[1], rounds=2)
    engine.failures["encode"] = RuntimeError()
    run(scheduler, clients[0])
    assert clients[0].end.reason == "error"
    check_ended(clients[1], 96)
    run(scheduler, again := Client([1, make_image("a", 9), 3]))
    check_ended(again, 96)


def test_a_lost_device_ends_all_jobs():
    engine, told = SlotOracle(), []

    def decode(*args):
        raise RuntimeError("lost")

    engine.decode = decode
    scheduler = make_scheduler(engine, on_failure=lambda: told.append(scheduler.failed))
    clients = [Client([1, 3, k]) for k in range(3, 20)]
    scheduler.submit(*[client.job for client in clients])
    scheduler.start()
    scheduler._thread.join(60)
    assert told == [True] and not scheduler.ready
    assert {client.end.reason for client in clients} == {"error"}
    with pytest.raises(ApiError):
        scheduler.submit(clients[0].job)


def test_draining_answers_what_was_accepted():
    scheduler = make_scheduler(SlotOracle(slots=2))
    clients = [Client([1, 3, k]) for k in range(3, 20)]
    scheduler.submit(*[client.job for client in clients])
    assert not scheduler.ready
    scheduler.start()
    scheduler.drain(60)
    assert not scheduler.ready
    for client in clients:
        check_ended(client, 96)
    with pytest.raises(ApiError) as refused:
        scheduler.submit(clients[0].job)
    assert refused.value.status == 503


def test_draining_ends_jobs_after_its_time():
    engine = SlotOracle(slots=1)
    release, decode = threading.Event(), engine.decode
    engine.decode = lambda *args: release.wait(60) and decode(*args)
    scheduler = make_scheduler(engine)
    clients = [Client([1, 3], 90), Client([1, 4], 90)]
    scheduler.submit(*[client.job for client in clients])
    scheduler.start()
    drain = threading.Thread(target=scheduler.drain, args=(0.0,))
    drain.start()
    while not scheduler._is_stopped:
        time.sleep(0.001)
    release.set()
    drain.join()
    assert {client.end.reason for client in clients} == {"cancelled"}


def test_features_are_bounded_in_bytes():
    engine = SlotOracle(slots=1)
    images = [make_image(name, 10) for name in "abc"]  # 80 bytes each
    scheduler = make_scheduler(engine, image_cache_bytes=170)
    for k, image in enumerate([*images[:2], images[0], images[2], images[0], images[1]]):
        run(scheduler, client := Client([1, 3 + k, image, 9], 2))
        check_ended(client, 96)
    assert computed(engine)[1] == 4  # the second one was dropped
    stats = scheduler.stats()
    assert (stats.image_hits, stats.image_misses, stats.image_cache_bytes) == (2, 4, 160)


@pytest.fixture(scope="module")
def llava(talker):
    return llava_jax.load(talker, dtype="float32")


def chats(llava):
    """Chats about no, one or two pictures, some with the same beginning, one longer than a chunk."""
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 255, (20, 14 + 9 * k, 3), np.uint8)) for k in range(3)]
    for k in range(14):
        images = pictures[k % 3 : k % 3 + (1, 0, 1, 2)[k % 4]]
        parts = [{"type": "image"}] * len(images)
        text = f"What is this, seen from side {k // 3}?" + " Why?" * (40 if k == 5 else k % 3)
        yield [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}], images


def ask(llava, messages, images, **fields):
    prepared = [PreparedImage(image.tobytes(), llava.processor.tiles([image]), llava.processor.layout(*image.size))
                for image in images]
    client = Client((), **{"max_new_tokens": 24} | fields)
    client.job.tokens, client.job.images = llava.encode_chat(messages, [x.layout for x in prepared]), prepared
    return client


@pytest.mark.bits
def test_a_models_answers_alone_and_in_a_full_batch(llava):
    engine = SlotEngine(llava, slots=4, context=256)
    scheduler = Scheduler(engine, llava.detokenizer, Limits())
    clients = [ask(llava, *chat, temperature=0.8 * (k % 5 == 4), seed=k) for k, chat in enumerate(chats(llava))]
    run(scheduler, *clients)
    for client, (messages, images) in zip(clients, chats(llava), strict=True):
        content = [part if part["type"] == "text" else {"type": "image"} for part in messages[0]["content"]]
        alone = llava.generate([{"role": "user", "content": content}], images, 24, client.job.temperature,
                               seed=client.job.seed)
        assert (client.text, client.end.completion_tokens) == (alone.text, len(alone.tokens))
        assert client.job.tokens.tolist() == alone.prompt_tokens
    assert len({client.text for client in clients}) > 8
    assert sum(client.end.cached_tokens > 0 for client in clients) > 4
    run(scheduler, again := ask(llava, *list(chats(llava))[-1]))
    assert again.end.cached_tokens == len(again.job.tokens) - 1 and again.text == clients[-1].text
