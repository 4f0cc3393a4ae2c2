"""HDR video on a standard display: light instead of codes, and a curve for the rest.

Phones record HLG by default, films are mastered in PQ; both have the wide primaries of
BT.2020. FFmpeg's filters for it (libplacebo, zscale) are in no wheel of PyAV.
"""

import functools
from typing import Any

import numpy as np
from jaxtyping import UInt8, UInt16

TRANSFERS = {16: "PQ", 18: "HLG"}  # AVColorTransferCharacteristic
WIDE = "BT.2020"  # primaries of video that isn't HDR

_WHITE = 203.0  # cd/m2 of white in a standard picture (BT.2408)
_PEAK = 1000.0  # cd/m2 of what HDR is graded on
_MOST = 10_000.0  # cd/m2 at the PQ code 1
_GAMMA = 2.4  # of a standard display (BT.1886)
_STEPS = 8192  # of tables over the root of the light
# From BT.2020's primaries to BT.709's, of linear light (BT.2087).
_TO_709 = np.array(
    [
        [1.6605, -0.5876, -0.0728],
        [-0.1246, 1.1329, -0.0083],
        [-0.0182, -0.1006, 1.1187],
    ],
    np.float32,
)
_LUMA = np.array([0.2627, 0.6780, 0.0593], np.float32)  # BT.2020
# SMPTE ST 2084.
_M1, _M2 = 2610 / 16384, 2523 / 4096 * 128
_C1, _C2, _C3 = 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32
# HLG's inverse OETF (BT.2100).
_A, _B, _C = 0.17883277, 0.28466892, 0.55991073


def standard(
    codes: UInt16[np.ndarray, "H W 3"], transfer: str
) -> UInt8[np.ndarray, "H W 3"]:
    """Shows a picture with BT.2020 primaries on a display of BT.709 and gamma 2.4.

    Light of up to about 100 cd/m2 stays what it is; the curve of BT.2390 (section 5.4)
    bends what is brighter, by the largest of the three colours, so that hues stay.

    Args:
        codes: full-range R'G'B', 0 to 65535.
        transfer: "PQ", "HLG" or `WIDE`.
    """
    light = _light(transfer)[codes]
    if (
        transfer == "HLG"
    ):  # the display's part, BT.2100: its gamma is that of 1000 cd/m2
        light = light * (light @ _LUMA)[..., None] ** 0.2 * _PEAK
    light = np.maximum(light @ _TO_709.T, 0)
    if transfer != WIDE:
        light *= _curve()[_index(light.max(-1), _MOST)][..., None]
    return _codes()[_index(light, _WHITE)]


def _index(light: np.ndarray, most: float) -> np.ndarray:
    """The place of light in a table; its root, so that the dark has steps enough."""
    share = np.minimum(light / np.float32(most), 1)
    return np.rint(np.sqrt(share) * (_STEPS - 1)).astype(np.int32)


@functools.cache
def _light(transfer: str) -> np.ndarray:
    """Light of every code: cd/m2, of HLG that of the scene in [0, 1]."""
    code = np.arange(65536) / 65535
    if transfer == "PQ":
        root = code ** (1 / _M2)
        light = _MOST * (np.maximum(root - _C1, 0) / (_C2 - _C3 * root)) ** (1 / _M1)
    elif transfer == "HLG":
        light = np.where(code <= 0.5, code**2 / 3, (np.exp((code - _C) / _A) + _B) / 12)
    else:
        light = _WHITE * code**_GAMMA
    return light.astype(np.float32)


def _pq(light: Any) -> Any:
    """The PQ code of light in cd/m2."""
    power = (light / _MOST) ** _M1
    return ((_C1 + _C2 * power) / (1 + _C3 * power)) ** _M2


@functools.cache
def _curve() -> np.ndarray:
    """The factor of light by its brightest colour: the spline of BT.2390, in PQ."""
    light = (np.arange(_STEPS) / (_STEPS - 1)) ** 2 * _MOST
    code = np.minimum(_pq(light) / _pq(_PEAK), 1)
    most = _pq(_WHITE) / _pq(_PEAK)
    knee = 1.5 * most - 0.5
    t = np.maximum(code - knee, 0) / (1 - knee)
    bent = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee)
    bent += (3 * t**2 - 2 * t**3) * most
    shown = np.interp(bent * _pq(_PEAK), _pq(light), light)
    factor = np.where(code <= knee, 1, shown / np.maximum(light, 1e-6))
    return factor.astype(np.float32)


@functools.cache
def _codes() -> np.ndarray:
    """The 8-bit code of light up to white."""
    share = (np.arange(_STEPS) / (_STEPS - 1)) ** 2
    return np.rint(255 * share ** (1 / _GAMMA)).astype(np.uint8)
