"""Clips of any length, in constant memory, written while they are made.

Each window begins with the last latents of what is there, clean, as training gives them
with `extend`; a causal model streams chunk by chunk, see `streaming`. What is carried
are latents and the state of the autoencoder: no pixel is encoded again, so that neither
colours nor sharpness change at a seam. A model of sound carries that the same way.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from jvdit.data.conditions.known import Tail, to_pixels
from jvdit.generation.draft import passes
from jvdit.generation.following import FOLLOWED, Followed, complete_window
from jvdit.generation.footage import Pictures, footage_length, read_footage
from jvdit.generation.generator import Generator
from jvdit.generation.request import Request
from jvdit.generation.results import Latents
from jvdit.generation.settings import Settings
from jvdit.generation.streaming import NEXT, Stream, check_stream

# Of a request, that a film's windows make use of, or the first one does.
_FIELDS = {"image", "last_image", "keyframes", "references", *FOLLOWED}


class Scene(NamedTuple):
    """A part of a film.

    Attributes:
        start: seconds from the beginning of the film.
        prompt: what is to be seen.
    """

    start: float
    prompt: str


class FilmPiece(NamedTuple):
    """The next frames of a film, and the next samples of its sound.

    Attributes:
        video: RGB pixels in [0, 255].
        audio: samples in [-1, 1], which may lag behind the frames; None: it is silent.
        done, total: frames of the film so far, and in all.
    """

    video: UInt8[np.ndarray, "T H W 3"]
    audio: Float[np.ndarray, "a e"] | None
    done: int
    total: int


@dataclasses.dataclass(frozen=True)
class Film:
    """A clip that is made window by window.

    Attributes:
        request: what is asked for. Its `frames` are those of a window; its `edges`,
            `guide` and `camera` cover the whole film, footage included.
        frames: of the whole film.
        footage: video that it begins with, and goes on from.
        scenes: prompts and when they begin, in order; before the first, and if there is
            none, that of the request holds. What is to be seen in all of them can be
            kept by the request's `references`.
        carry: latent frames of a window that come from the one before, by default half
            of them; or that each chunk of a causal model sees before it, by default all
            but the chunk and the first latent frame of a clip.
        sink: first latent frames, which each chunk of a causal model sees, besides.

    Raises:
        ValueError: scenes are out of order, or begin after the end.
    """

    request: Request
    frames: int
    footage: Pictures | None = None
    scenes: Sequence[Scene] = ()
    carry: int | None = None
    sink: int = 0

    def __post_init__(self):
        starts = [scene.start for scene in self.scenes]
        if starts != sorted(set(starts)) or any(not s >= 0 for s in starts):
            raise ValueError(
                f"scenes begin at {', '.join(f'{s:g}' for s in starts)} s; each must "
                "begin after the one before, from 0 s on."
            )
        fps = self.request.fps
        if fps and starts and starts[-1] * fps >= self.frames:
            raise ValueError(
                f"a scene begins at {starts[-1]:g} s, and the film ends at "
                f"{self.frames / fps:g} s; make it longer."
            )

    def prompt(self, seconds: float) -> str:
        """What is to be seen at a time."""
        shown = [x.prompt for x in self.scenes if x.start <= seconds + 1e-6]
        return shown[-1] if shown else self.request.prompt


def check_film(generator: Generator, film: Film) -> Film:
    """A film, complete, that a model can make.

    Raises:
        ValueError: the model was trained neither with `extend` nor with `forcing`, or
            the window is too short, what it follows is shorter than the film, or it is
            given what a film can't make use of.
    """
    model = generator.model
    request = complete_window(generator, film.request)
    generator.check(request)
    after_first = model.vae.latent_shape(*request.size)[0] - 1
    streams, chunk = "stream" in model.conditions, model.dit.chunk_frames
    carry = film.carry
    if carry is None and streams:
        carry = max((after_first - chunk) // chunk, 1) * chunk
    elif carry is None:
        carry = after_first // 2
    film = dataclasses.replace(film, request=request, carry=carry)
    if streams:
        check_stream(generator, request, carry, film.sink)
    else:
        _check_windows(generator, film, carry, after_first)
    begins = chunk if streams else 1 + carry
    if film.footage is not None:
        fps = request.frame_rate
        length = footage_length(film.footage, "prefix", fps)
        least = 1 + (begins - 1) * model.vae.temporal_compression
        if not least <= length < film.frames:
            raise ValueError(
                f"the footage has {length} frames: give at least {least}, and fewer "
                f"than the {film.frames} of the film."
            )
    Followed(request, film.frames)  # which may be too short
    return film


def _check_windows(generator: Generator, film: Film, carry: int, most: int) -> None:
    """Raises a ValueError unless a model can make a film window after window.

    Args:
        generator: of the model.
        film: the film.
        carry: latent frames of a window that come from the one before.
        most: latent frames of a window after the first.
    """
    if "extend" not in generator.model.conditions:
        raise ValueError(
            "this model can't go on from what it made: train one with `given.extend` "
            "or `forcing.share`, or ask for clips of the length of a window."
        )
    if more := ", ".join(f"`{x}`" for x in sorted({*film.request.given} - _FIELDS)):
        raise ValueError(
            f"a film isn't given {more}, which each of its windows would have anew: "
            "leave it out; what a film goes on from is its `footage` (--extend)."
        )
    if film.sink:
        raise ValueError(f"`sink` (={film.sink}) is for models that stream.")
    if not 1 <= carry < most:
        raise ValueError(
            f"`carry` (={carry}) must leave something to make of the {most} latent"
            f" frames of a window of {film.request.frames} frames: 1 to {most - 1}."
        )


def make_film(
    generator: Generator,
    film: Film,
    settings: Settings = Settings(),  # noqa: B008
) -> Iterator[FilmPiece]:
    """Makes a film, and yields its pieces as soon as they are decoded.

    Args:
        generator: of a model that was trained with `extend` or `forcing`.
        film: what to make.
        settings: solver, number of steps, and guidance.

    Raises:
        ValueError: as of `check_film`; before anything is computed.
    """
    film = check_film(generator, film)
    settings = settings.complete(generator.model.defaults)
    return _Shooting(generator, film, settings).pieces()


class _Soundtrack:
    """The latents of a film's sound that are still needed, and its samples.

    Args:
        generator: of the film.
        seconds: that it lasts.
    """

    def __init__(self, generator: Generator, seconds: float):
        self._vae, self._codec = generator.model.audio_vae, generator.codec
        self._latents = np.zeros((0, self._vae.latent_channels), np.float32)
        self._start = self._samples = 0  # of the latents that are held; given out
        self._total = round(seconds * self._vae.sample_rate)

    def add(self, latents: np.ndarray) -> None:
        """Adds the latents that follow."""
        self._latents = np.concatenate([self._latents, latents])

    def since(self, origin: float) -> tuple[np.ndarray, float]:
        """The latents that begin at a time or later, and by how much the first does."""
        rate = self._vae.latent_rate
        first = math.ceil(origin * rate - 1e-6)
        return self._latents[first - self._start :], first / rate - origin

    def heard(self, last: bool) -> Float[np.ndarray, "a e"]:
        """The samples that no later latent changes; at the end all that are left."""
        vae, hop = self._vae, self._vae.hop
        margin, end = vae.margins[1], self._start + len(self._latents)
        until = self._total if last else min((end - margin) * hop, self._total)
        if until <= self._samples:
            return np.zeros((0, vae.channels), np.float32)
        first = max(self._samples // hop - margin, self._start)
        latents = self._latents[first - self._start :]
        audio = self._codec.decode_sound(latents, len(latents) * hop)
        audio = audio[self._samples - first * hop : until - first * hop]
        short = until - self._samples - len(audio)
        self._samples = until
        return np.pad(audio, ((0, short), (0, 0)))

    def forget(self, origin: float) -> None:
        """Drops what neither a window from this time on needs, nor the decoder."""
        first = min(
            math.floor(origin * self._vae.latent_rate),
            self._samples // self._vae.hop - self._vae.margins[1],
        )
        drop = max(first - self._start, 0)
        self._latents, self._start = self._latents[drop:], self._start + drop


class _Shooting:
    """A film that is being made.

    Args:
        generator: of its model.
        film: what to make, complete.
        settings: the same.
    """

    def __init__(self, generator: Generator, film: Film, settings: Settings):
        self._generator, self._film, self._settings = generator, film, settings
        self._request = request = film.request
        self._followed = Followed(request, film.frames)
        self._fps, self._carry = request.frame_rate, film.carry or 1
        self._each = generator.model.vae.temporal_compression
        self._tail: np.ndarray | None = None  # the last latents of the picture
        self._count = 0  # of the latents of the picture so far
        self._sound = None
        if request.sound:
            self._sound = _Soundtrack(generator, film.frames / self._fps)

    def pieces(self) -> Iterator[FilmPiece]:
        """The pieces of the film, in order."""
        total, done = self._film.frames, 0
        decode = self._generator.codec.decoder()
        for given, latents in self._latents():
            video = decode(latents)  # of footage, too: later pieces go on from there
            video = video if given is None else given
            video = video[: total - done]
            done += len(video)
            audio = None
            if self._sound is not None:
                audio = self._sound.heard(last=done == total)
                self._sound.forget(self._origin)
            yield FilmPiece(video, audio, done, total)

    def _latents(self) -> Iterator[tuple[np.ndarray | None, np.ndarray]]:
        """New latents of the picture, and the pixels that they were encoded from."""
        needed = 1 + math.ceil((self._film.frames - 1) / self._each)
        if "stream" in self._generator.model.conditions:
            yield from self._streamed(needed)
            return
        if self._film.footage is None:
            yield None, self._kept(self._solved(self._first()))
        else:
            video, latents = self._read(self._film.footage)
            yield video, self._kept(latents)
        while self._count < needed:
            request, known = self._next()
            picture, sound = self._solved(request)
            sound = None if sound is None else sound[known:]
            yield None, self._kept(Latents(picture[self._carry :], sound))

    def _streamed(self, needed: int) -> Iterator[tuple[np.ndarray | None, np.ndarray]]:
        """The latents of a causal model, chunk after chunk."""
        film, solving = self._film, self._settings.solving
        request = self._first() if film.footage is None else film.request
        stream = Stream(self._generator, request, solving, self._carry, film.sink)
        if film.footage is not None:
            video, (latents, _) = self._read(film.footage)
            count = len(latents) // stream.chunk * stream.chunk
            video = video[: 1 + (count - 1) * self._each]
            stream.take(latents[:count], film.prompt(0.0))
            yield video, latents[:count]
        while stream.count < needed:
            begins = max(self._each * (stream.count - 1), 0) / self._fps
            yield None, stream.next(film.prompt(begins))

    @property
    def _begins(self) -> int:
        """The film's frame that the next window counts as its first.

        It makes nothing of this one, which alone would be a latent by itself.
        """
        return self._each * (self._count - self._carry - 1)

    @property
    def _origin(self) -> float:
        """When the clock of the next window begins, in seconds of the film."""
        return self._begins / self._fps

    def _first(self) -> Request:
        """The first window; with a draft, the picture that it begins with is made."""
        fields = self._followed.window(0) | {"prompt": self._film.prompt(0.0)}
        window = dataclasses.replace(self._request, **fields)
        steps = passes(window, bool(self._settings.draft), sound_after=False)
        if (asked := next(steps)) is window:
            return window
        plain = dataclasses.replace(self._settings, draft=False)
        ((_, drawn),) = self._generator.painter.clips([asked], plain)
        return steps.send(drawn)

    def _next(self) -> tuple[Request, int]:
        """The window that follows what is there, and the latents of sound it begins."""
        middle = self._origin + self._each * self._carry / self._fps
        tail, known = Tail(np.asarray(self._tail)), 0
        if self._sound is not None:
            sound, late = self._sound.since(self._origin)
            tail, known = tail._replace(sound=sound, late=late), len(sound)
        fields = self._followed.window(self._begins)
        fields |= {"image": None, "last_image": None, "keyframes": (), "tail": tail}
        fields["prompt"] = self._film.prompt(middle)
        fields["seed"] = (self._request.seed + NEXT * self._count) % 2**32
        return dataclasses.replace(self._request, **fields), known

    def _solved(self, request: Request) -> Latents:
        (found,) = self._generator.solve([request], **self._settings.solving)
        return found[0]

    def _kept(self, latents: Latents) -> np.ndarray:
        """Keeps of new latents what is needed later; returns those of the picture."""
        picture, sound = latents
        before = picture[:0] if self._tail is None else self._tail
        self._tail = np.concatenate([before, picture])[-self._carry :]
        self._count += len(picture)
        if self._sound is not None and sound is not None:
            self._sound.add(sound)
        return picture

    def _read(self, footage: Pictures) -> tuple[np.ndarray, Latents]:
        """The pixels of footage, in whole latent frames, and their latents."""
        request, codec = self._request, self._generator.codec
        size = (self._film.frames, *request.size[1:])
        video = read_footage(footage, "prefix", size, self._fps)
        video = video[: 1 + (len(video) - 1) // self._each * self._each]
        latents = Latents(codec.encode(to_pixels(video)))
        if self._sound is None:
            return video, latents
        vae = self._generator.model.audio_vae
        given = dataclasses.replace(request, prefix=footage)
        audio = given.sound_of("prefix", vae.sample_rate, vae.channels)
        count = round(len(video) / self._fps * vae.sample_rate) // vae.hop
        if audio is None:  # silence
            audio = np.zeros((count * vae.hop, vae.channels), np.float32)
        return video, latents._replace(sound=codec.encode_sound(audio)[:count])
