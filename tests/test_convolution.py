"""Convolutions: every form computes one sum, and none sees the future."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import assert_close

import jvdit.models.convolution as convolution
from jvdit.models.convolution import causal_conv3d, conv2d, upsample_conv2d


def normal(*shape, seed=0):
    return jnp.asarray(np.random.RandomState(seed).standard_normal(shape), jnp.float32)


CASES = {
    "same": ((3, 3, 3), {}),
    "frame_by_frame": ((1, 3, 3), {}),
    "time_only": ((3, 1, 1), {}),
    "pointwise": ((1, 1, 1), {}),
    "strided": ((3, 3, 3), {"strides": (2, 2, 2), "padding": ((0, 1), (0, 1))}),
    "even_kernel": ((2, 2, 4), {}),
}


@pytest.mark.parametrize("past_frames", [None, 0, 1, 2])
@pytest.mark.parametrize("case", CASES)
def test_forms_agree_forward_and_backward(case, past_frames):
    size, options = CASES[case]
    x, kernel, bias = normal(2, 5, 6, 4, 3), normal(*size, 3, 7), normal(7)
    past = None if past_frames is None else normal(2, past_frames, 6, 4, 3, seed=1)

    @jax.jit
    def run(x, kernel, bias, past):
        def one(form):
            def loss(x, kernel, bias):
                y = causal_conv3d(
                    x, kernel, bias, past=past, implementation=form, **options
                )
                return jnp.sum(jnp.sin(y)), y

            return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(x, kernel, bias)

        return one("taps"), one("native")

    cpu, native = run(x, kernel, bias, past)
    assert cpu[0][1].shape == native[0][1].shape
    # Not the sum itself, whose terms cancel.
    for a, b in zip((cpu[0][1], *cpu[1]), (native[0][1], *native[1]), strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("form", ["taps", "native"])
@pytest.mark.parametrize("strides", [(1, 1, 1), (2, 1, 1)])
def test_an_image_is_the_first_frame_of_a_video(form, strides):
    """Though it is computed with the last tap alone."""
    x, kernel = normal(2, 4, 6, 4, 3), normal(3, 3, 3, 3, 7)
    weight = normal(2, 1, 6, 4, 7, seed=2)

    def loss(kernel, frames):
        y = causal_conv3d(x[:, :frames], kernel, strides=strides, implementation=form)
        return jnp.sum(weight * y[:, :1]), y[:, :1]

    image, video = (
        jax.value_and_grad(loss, has_aux=True)(kernel, frames) for frames in (1, 4)
    )
    for a, b in zip((image[0][1], image[1]), (video[0][1], video[1]), strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("form", ["taps", "native"])
def test_frames_depend_on_the_past_only(form):
    x, kernel = normal(1, 5, 4, 4, 2), normal(3, 3, 3, 2, 2)

    def frame(x):
        return causal_conv3d(x, kernel, implementation=form)[:, 2]

    seen = np.abs(jax.jacobian(frame)(x)).sum(axis=(0, 1, 2, 3, 4, 6, 7, 8))
    assert (seen[:3] > 0).all() and (seen[3:] == 0).all()


@pytest.mark.parametrize("form", ["taps", "native"])
def test_past_continues_a_video(form):
    x, kernel = normal(1, 7, 4, 4, 2), normal(3, 3, 3, 2, 2)
    whole = causal_conv3d(x, kernel, implementation=form)
    later = causal_conv3d(x[:, 4:], kernel, past=x[:, 2:4], implementation=form)
    assert_close(later, whole[:, 4:])


@pytest.mark.parametrize("form", ["taps", "native"])
def test_no_frames_where_the_kernel_never_fits(form):
    kernel = normal(3, 3, 3, 2, 5)
    few = causal_conv3d(
        normal(1, 2, 4, 4, 2), kernel, past=normal(1, 0, 4, 4, 2), implementation=form
    )
    assert few.shape == (1, 0, 4, 4, 5)


def test_upsampling_convolution_is_repetition_then_convolution():
    x, kernel, bias = normal(2, 5, 3, 4), normal(3, 3, 4, 6), normal(6)

    @jax.jit
    def both(x, kernel, bias):
        def repeated(x, kernel, bias):
            large = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
            y = conv2d(large, kernel, bias)
            return jnp.sum(jnp.sin(y)), y

        def folded(x, kernel, bias):
            y = upsample_conv2d(x, kernel, bias)
            return jnp.sum(jnp.sin(y)), y

        return [
            jax.value_and_grad(f, (0, 1, 2), has_aux=True)(x, kernel, bias)
            for f in (repeated, folded)
        ]

    a, b = both(x, kernel, bias)
    assert a[0][1].shape == (2, 10, 6, 6)
    for u, v in zip((a[0][1], *a[1]), (b[0][1], *b[1]), strict=True):
        assert_close(u, v)


@pytest.mark.parametrize(
    "device, form", [("cpu", "taps"), ("gpu", "taps"), ("tpu", "native")]
)
def test_each_device_gets_its_fastest_form(device, form, monkeypatch):
    monkeypatch.setattr(convolution, "platform", lambda: device)
    assert convolution.choose_implementation() == form


def test_unknown_form_is_named():
    with pytest.raises(ValueError, match="'fast'.*'native'"):
        causal_conv3d(
            normal(1, 1, 2, 2, 1), normal(1, 1, 1, 1, 1), implementation="fast"
        )
