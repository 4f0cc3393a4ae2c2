"""What children of the supervisor are made to do in tests."""

import os
import signal
import time

from jvdit.data.ingest.clip_file import prepare_file


def slow(item, recipe):
    """Prepares a file, but takes its time."""
    time.sleep(0.15)
    yield from prepare_file(item, recipe)


def nasty(item, recipe):
    """Dies, hangs or raises if the name of the file says so."""
    misbehave(item.key)
    yield from prepare_file(item, recipe)


def count(number):
    """Yields as many results as the number says, the larger ones slowly."""
    for k in range(abs(number)):
        time.sleep(0.02 if number > 3 else 0)
        yield number, k
    if number < 0:
        misbehave({-1: "segv", -2: "hang", -3: "raise"}[number])


def meet(place):
    """Waits for a second worker in the folder, then yields its own number slowly."""
    folder, results = place
    (folder / str(os.getpid())).touch()
    while len(list(folder.iterdir())) < 2:
        time.sleep(0.02)
    for _ in range(results):
        time.sleep(0.02)
        yield os.getpid()


def killed(place):
    """Yields three results, or is killed after two, so many times.

    What is "never" killed ends before "once" is, and "first" is still at work then.
    """
    folder, name, times = place
    mine = folder / f"at-work-{name}"
    mine.touch()
    awaited = {"first": "tried-once-0", "never": mine.name}.get(name, "tried-never-0")
    while not (folder / awaited).exists():
        time.sleep(0.02)
    time.sleep(1 if name == "first" else 0)
    tries = len(list(folder.glob(f"tried-{name}-*")))
    for k in range(3):
        if k == 2:
            (folder / f"tried-{name}-{tries}").touch()
            mine.unlink()
        if k == 2 and tries < times:
            time.sleep(0.1)  # what it yielded is under way
            os.kill(os.getpid(), signal.SIGKILL)
        yield k, tries, (folder / "at-work-first").exists()


def misbehave(name):
    if "segv" in name:
        os.kill(os.getpid(), signal.SIGSEGV)
    if "leave" in name:
        os._exit(3)
    if "hang" in name:
        time.sleep(1000)
    if "raise" in name:
        raise RuntimeError("an unforeseen failure")
