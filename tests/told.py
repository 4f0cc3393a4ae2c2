"""One of several processes that tell each other what they were told."""

import sys

import jax

from jvdit.machine import cluster
from jvdit.machine.stop import StopRequest

coordinator, process, folder = sys.argv[1:]
cluster.connect(coordinator, 2, int(process))
assert cluster.from_lead(lambda: {"process": jax.process_index()}) == {"process": 0}
cluster.check_alike({"optim": {"lr": 1e-4}, "sources": ("a", "b")})
try:
    cluster.check_alike({"optim": {"lr": 0.5 if process == "1" else 1e-4}})
except ValueError as error:
    print(error)
with cluster.held(f"{folder}/free") as lock:
    print(lock.held)
with StopRequest() as stop:
    with stop.apart():
        pass
    print(stop.look())
try:
    with cluster.held(folder):
        pass
except ValueError as error:
    print(error)
