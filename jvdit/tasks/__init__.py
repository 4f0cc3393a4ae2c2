"""The kinds of training: what each reads, trains, measures and shows.

A task joins data, models and an objective; the loop in `train.py` knows nothing else.
"""

from jvdit.tasks.autoencoder import VAETask
from jvdit.tasks.flow import FlowTask
from jvdit.tasks.task import Task as Task

TASKS: dict[str, type[Task]] = {"video_vae": VAETask, "flow": FlowTask}
