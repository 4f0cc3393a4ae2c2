"""The kinds of training: what each reads, trains, measures and shows.

A task joins data, networks and an objective; the training loop (`loop.py`) knows only
the interface of `Task`.
"""

from jvdit.tasks.autoencoder import AudioVAETask, VAETask
from jvdit.tasks.flow import FlowTask
from jvdit.tasks.task import Task as Task

TASKS: dict[str, type[Task]] = {
    "video_vae": VAETask,
    "audio_vae": AudioVAETask,
    "flow": FlowTask,
}
