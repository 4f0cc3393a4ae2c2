"""Streams: chunk after chunk from a cache, as if the whole history were seen anew."""

import dataclasses

import jax
import numpy as np
import pytest
from closeness import assert_close

from jvdit.data.conditions.known import Known
from jvdit.data.items import item_of
from jvdit.generation import streaming
from jvdit.generation.batches import batches_of, texts_of
from jvdit.generation.films import Film, Scene, check_film, make_film
from jvdit.generation.generator import Generator
from jvdit.generation.request import Request
from jvdit.generation.sampling import start_noise
from jvdit.generation.settings import Settings
from jvdit.generation.streaming import Stream
from jvdit.sharding import rows_sharding

CLIP = Request("one object", frames=13, height=16, width=16, fps=8.0, seed=5)
BLACK = np.zeros((5, 16, 16, 3), np.uint8)
SETTINGS = Settings(steps=2, solver="unipc", guidance_scale=2.0)


@pytest.fixture(scope="module", params=[1, 2], ids=["frame", "chunk"])
def causal(generator, request):
    """A causal model that predicts something."""
    rng, model = np.random.default_rng(0), generator.model
    network = model.networks["dit"]
    fields = {"patterns": ("chunk_causal",), "chunk_frames": request.param}
    module = dataclasses.replace(network.module, **fields)
    params = jax.tree.map(lambda x: x + 0.2 * rng.normal(size=x.shape), network.params)
    networks = {**model.networks, "dit": dataclasses.replace(network, module=module)}
    model = dataclasses.replace(
        model, networks=networks, conditions=("first_frame", "stream")
    )
    return Generator(model.with_params({"dit": params}))


def stream_of(generator, window, sink=0, request=CLIP):
    request = generator.complete(request)
    return Stream(generator, request, SETTINGS.solving, window, sink)


def anew(stream, history, prompt):
    """The next chunk of a stream, with all before it seen anew, and no cache."""
    generator, model = stream._generator, stream._model
    blank = np.zeros((stream.chunk, *history.shape[1:]), np.float32)
    latents = np.concatenate([history, blank])
    clean = np.zeros(latents.shape[:3], bool)
    clean[: len(history)] = True
    texts = generator.inputs.texts([dataclasses.replace(CLIP, prompt=prompt)])
    item, null = (
        item_of(
            latents,
            patch_size=model.patch_size,
            fps=8.0,
            temporal_compression=model.vae.temporal_compression,
            known=Known(latents=latents, clean=clean),
            text_embeds=text,
        )
        for (text,) in texts
    )
    seed = (CLIP.seed + streaming.NEXT * len(history)) % 2**32
    (batch,) = batches_of([item], [null], [seed], 1, 1, 1, model.text_length)
    start = stream._start._replace(given=True)
    with jax.set_mesh(generator.mesh):
        running = generator.stepper(
            generator.experts.variables("dit"),
            start_noise(start, batch.arrays, batch.seeds),
            texts_of(batch, model.pad_text, rows_sharding(generator.mesh, 1)),
            span=(0, start.steps),
            solver=start.solver,
            guidance=SETTINGS.solving["guidance"],
        )
    (tokens,) = np.asarray(running.solution.tokens.latents)
    size = latents.shape[:3]
    return streaming.unpatchify(tokens, size, model.patch_size)[len(history) :]


def test_a_stream_is_what_no_cache_would_give(causal):
    chunk = causal.model.dit.chunk_frames
    stream = stream_of(causal, window=6)
    made = stream.next("one object")
    for _ in range(6 // chunk):
        found = stream.next("one object")
        assert np.abs(found).max() > 0.1
        assert_close(found, anew(stream, made, "one object"), 1024)
        made = np.concatenate([made, found])
    # By now the first chunk has left the window.
    found = stream.next("one object")
    other = anew(stream, made, "one object")
    assert np.abs(found - other).max() > 1e-3 * np.abs(other).max()


def test_a_stream_goes_on_from_latents_as_if_it_had_made_them(causal):
    chunk, one = causal.model.dit.chunk_frames, stream_of(causal, window=4)
    made = np.concatenate([one.next("dawn"), one.next("dawn")])
    other = stream_of(causal, window=4)
    other.take(made, "dawn")
    assert other.count == 2 * chunk
    assert_close(other.next("noon"), one.next("noon"))


def test_a_film_is_a_stream_decoded_at_once(causal, monkeypatch):
    """Its first frame is the given one, and no pixel of it is made twice."""
    image = np.random.default_rng(1).integers(0, 256, (16, 16, 3), np.uint8)
    made, usual = [], Stream.next

    def noted(self, prompt):
        found = usual(self, prompt)
        made.append((prompt, found))
        return found

    monkeypatch.setattr(Stream, "next", noted)
    request = dataclasses.replace(CLIP, image=image)
    film = Film(request, 30, scenes=[Scene(1.0, "noon")])
    pieces = [*make_film(causal, film, SETTINGS)]
    video = np.concatenate([x.video for x in pieces])
    latents = np.concatenate([x for _, x in made])
    assert video.shape == (30, 16, 16, 3)
    whole = causal.codec.decode(latents[None])[0]
    np.testing.assert_allclose(video, whole[:30], atol=1)
    given = causal.codec.encode(image[None].astype(np.float32) / 127.5 - 1)
    assert_close(latents[:1], given)
    chunk, each = causal.model.dit.chunk_frames, 4
    begins = [max(i * chunk - 1, 0) * each / 8.0 for i in range(len(made))]
    prompts = ["noon" if x >= 1 else "one object" for x in begins]
    assert [prompt for prompt, _ in made] == prompts


def test_footage_is_gone_on_from_in_whole_chunks(causal):
    footage = np.random.default_rng(0).integers(0, 256, (19, 16, 16, 3), np.uint8)
    chunk = causal.model.dit.chunk_frames
    kept = 1 + (5 // chunk * chunk - 1) * 4  # of its 5 latent frames
    pieces = [*make_film(causal, Film(CLIP, 27, footage), SETTINGS)]
    video = np.concatenate([x.video for x in pieces])
    np.testing.assert_array_equal(video[:kept], footage[:kept])
    assert len(video) == 27 and np.ptp(video[kept:].astype(int)) > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"carry": 3}, r"3 latent frames.*`carry`.*whole chunks of 2"),
        ({"sink": 1}, r"the 1 of its `sink` must be whole chunks of 2"),
        ({"request": dataclasses.replace(CLIP, prefix=BLACK)}, "`prefix` was given"),
    ],
)
@pytest.mark.parametrize("causal", [2], indirect=True)
def test_streams_that_cannot_be(causal, change, message):
    with pytest.raises(ValueError, match=message):
        check_film(causal, Film(**{"request": CLIP, "frames": 32, **change}))


def test_levels_of_ones_own_are_those_of_the_steps(causal):
    request, levels = causal.complete(CLIP), (0.9, 0.4)
    settings = dataclasses.replace(SETTINGS, levels=levels)
    made = [
        Stream(causal, request, each.solving, 4).next("dawn")
        for each in (settings, SETTINGS)
    ]
    assert np.abs(made[0] - made[1]).max() > 1e-3
    guided = dataclasses.replace(SETTINGS, control_guidance_scale=2.0)
    with pytest.raises(ValueError, match="control_guidance_scale.*=2"):
        Stream(causal, request, guided.solving, 4)


def test_a_model_that_does_not_stream(generator):
    with pytest.raises(ValueError, match=r"can't stream.*forcing\.share"):
        stream_of(generator, window=2)
