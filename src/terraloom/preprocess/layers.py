"""Classification and quality layers of products, decoded to reasons per pixel.

One decoder per kind of layer, found by the name that the source table gives as ``codes``. Every
code a layer may hold is known; any other is an error that names it, because a layer that is read
wrongly looks like a good mask.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from terraloom.errors import SceneError
from terraloom.preprocess.reasons import Reason

__all__ = ["CLOUD_CODES", "DECODERS", "SHADOW_CODES", "LayerOptions", "layer_reasons"]

Codes = npt.NDArray[np.int32]
Reasons = npt.NDArray[np.uint8]

#: Kinds of layer that tell clouds, so that a product's own mask can be made of them.
CLOUD_CODES = frozenset({"scl", "qa_pixel", "fmask", "hls_fmask", "modis_reliability"})
#: Kinds of layer that tell cloud shadows, too; for the others shadows are projected from the sun.
SHADOW_CODES = frozenset({"scl", "qa_pixel", "fmask", "hls_fmask"})

_SATURATED, _NODATA = int(Reason.SATURATED), int(Reason.NODATA)
_CLOUD, _EDGE, _SHADOW = int(Reason.CLOUD), int(Reason.CLOUD_EDGE), int(Reason.SHADOW)
_SNOW, _WATER = int(Reason.SNOW), int(Reason.WATER)

#: Sentinel-2 L2A scene classification: 0 no data, 1 saturated, 2 dark, 3 shadow, 4 vegetation,
#: 5 bare, 6 water, 7 unclassified, 8 and 9 cloud, 10 cirrus, 11 snow.
_SCL = {
    0: _NODATA, 1: _SATURATED, 2: 0, 3: _SHADOW, 4: 0, 5: 0, 6: _WATER, 7: 0, 8: _CLOUD, 9: _CLOUD,
    10: _CLOUD, 11: _SNOW,
}  # fmt: skip
#: Fmask (Zhu and Woodcock 2012) as written by its own programs.
_FMASK = {0: 0, 1: _WATER, 2: _SHADOW, 3: _SNOW, 4: _CLOUD, 255: _NODATA}
#: MOD13 pixel reliability; 255 is -1 where bytes have no sign.
_MODIS = {-1: _NODATA, 255: _NODATA, 0: 0, 1: 0, 2: _SNOW, 3: _CLOUD}
_TABLES = {"scl": _SCL, "fmask": _FMASK, "modis_reliability": _MODIS}


@dataclass(frozen=True, slots=True)
class LayerOptions:
    """What of a layer counts.

    Attributes:
        dark: SCL class 2 (dark area) is shadow.
        unclassified: SCL class 7 is cloud.
        dilated: The product's own band around clouds is cloud edge (QA_PIXEL bit 1, HLS Fmask
            bit 2).
        cirrus: Cirrus is cloud (SCL class 10, QA_PIXEL bit 2).
        cloud_confidence: Least confidence of QA_PIXEL (bits 8-9) that is cloud: 3 high, which is
            what its cloud bit says; 2 medium, 1 low.
    """

    dark: bool = False
    unclassified: bool = False
    dilated: bool = True
    cirrus: bool = True
    cloud_confidence: int = 3


def layer_reasons(
    values: npt.ArrayLike,
    codes: str,
    *,
    nodata: float | None = None,
    where: str = "",
    options: LayerOptions | None = None,
) -> Reasons:
    """Reasons that a layer of a product gives.

    Args:
        values: (H, W) codes, of any integer type or as whole floats; NaN is no data.
        codes: Kind of layer, a key of :data:`DECODERS`.
        nodata: Code that the files at hand use for no data, where it is none of the kind's own.
        where: Name of the item and layer, for errors.
        options: What counts.

    Returns:
        (H, W) uint8 of :class:`~terraloom.preprocess.reasons.Reason` bits. Several layers of one
        product add up by ``|``.

    Raises:
        SceneError: An unknown kind, or codes that this kind of layer cannot hold.
    """
    if codes not in DECODERS:
        raise SceneError(
            f"there is no layer of codes {codes!r}", where=where, allowed=", ".join(DECODERS)
        )
    given = np.asarray(values)
    missing = np.isnan(given) if given.dtype.kind == "f" else np.zeros(given.shape, dtype=bool)
    if nodata is not None and not _knows(codes, nodata):
        missing |= given == nodata
    known = np.where(missing, 0, given)
    if known.dtype.kind == "f" and (known != np.rint(known)).any():
        raise SceneError(
            "the layer holds fractions",
            where=where or codes,
            allowed="whole codes",
            fix="layers are classes: they must be resampled by nearest neighbour",
        )
    out = DECODERS[codes](known.astype(np.int32), where or codes, options or LayerOptions())
    out[missing] = _NODATA
    return out


def _knows(codes: str, value: float) -> bool:
    """Whether a code means something of its own in a kind of layer."""
    if codes in _TABLES:
        return value in _TABLES[codes]
    return codes == "hls_fmask" or 0 <= value <= 0xFFFF


# --- tables ----------------------------------------------------------------------------------


def _by_table(values: Codes, table: Mapping[int, int], where: str) -> Reasons:
    low = min(table)
    lookup = np.full(max(table) - low + 1, -1, dtype=np.int16)
    for code, reason in table.items():
        lookup[code - low] = reason
    at = values - low
    inside = (at >= 0) & (at < lookup.size)
    found = np.where(inside, lookup[np.where(inside, at, 0)], -1)
    if (found < 0).any():
        _refuse(values[found < 0], where, ", ".join(map(str, sorted(table))))
    return found.astype(np.uint8)


def _refuse(values: Codes, where: str, allowed: str) -> None:
    some = np.unique(values)
    more = ", ..." if some.size > 5 else ""
    raise SceneError(
        f"{values.size} pixels have unknown codes {', '.join(map(str, some[:5]))}{more}",
        where=where,
        allowed=allowed,
        fix="check `codes` and `nodata` of the layer in the source table",
    )


def _scl(values: Codes, where: str, options: LayerOptions) -> Reasons:
    own = {2: _SHADOW if options.dark else 0, 7: _CLOUD if options.unclassified else 0}
    return _by_table(values, {**_SCL, **own, 10: _CLOUD if options.cirrus else 0}, where)


def _fmask(values: Codes, where: str, options: LayerOptions) -> Reasons:
    return _by_table(values, _FMASK, where)


def _modis(values: Codes, where: str, options: LayerOptions) -> Reasons:
    return _by_table(values, _MODIS, where)


# --- bits ------------------------------------------------------------------------------------


def _bit(values: Codes, number: int) -> npt.NDArray[np.bool_]:
    out: npt.NDArray[np.bool_] = (values >> number) & 1 != 0
    return out


def _within(values: Codes, most: int, where: str) -> None:
    bad = (values < 0) | (values > most)
    if bad.any():
        _refuse(values[bad], where, f"0 to {most}")


def _qa_pixel(values: Codes, where: str, options: LayerOptions) -> Reasons:
    """Landsat Collection 2 QA_PIXEL (USGS LSDS-1619 and LSDS-1618).

    Bits 0 fill, 1 dilated cloud, 2 cirrus (OLI), 3 cloud, 4 cloud shadow, 5 snow, 6 clear, 7 water,
    8-9 cloud confidence. Bit 6 may be set on shadow and snow, so it is not read. A pixel without
    any bit was never classified: real ones have their confidences.
    """
    _within(values, 0xFFFF, where)
    cloud = _bit(values, 3) | ((values >> 8) & 3 >= options.cloud_confidence)
    if options.cirrus:
        cloud |= _bit(values, 2)
    out = np.zeros(values.shape, dtype=np.uint8)
    out[cloud] |= _CLOUD
    if options.dilated:
        out[_bit(values, 1) & ~cloud] |= _EDGE
    for number, reason in ((4, _SHADOW), (5, _SNOW), (7, _WATER)):
        out[_bit(values, number)] |= reason
    out[_bit(values, 0) | (values == 0)] = _NODATA
    return out


def _qa_radsat(values: Codes, where: str, options: LayerOptions) -> Reasons:
    """Landsat Collection 2 QA_RADSAT: bits 0-6 and 8 a band saturated, 9 dropped, 11 occluded."""
    _within(values, 0x0FFF, where)
    defect = _bit(values, 9) | _bit(values, 11) | (values & 0x17F != 0)
    return np.where(defect, _SATURATED, 0).astype(np.uint8)


def _hls_fmask(values: Codes, where: str, options: LayerOptions) -> Reasons:
    """HLS 2.0 Fmask: bits 1 cloud, 2 next to cloud or shadow, 3 shadow, 4 snow, 5 water; 255 fill.

    Bit 0 (cirrus) is reserved and not used; bits 6-7 are the aerosol level, which is no reason.
    """
    _within(values, 255, where)
    out = np.zeros(values.shape, dtype=np.uint8)
    for number, reason in ((1, _CLOUD), (3, _SHADOW), (4, _SNOW), (5, _WATER)):
        out[_bit(values, number)] |= reason
    if options.dilated:
        out[_bit(values, 2) & ~_bit(values, 1)] |= _EDGE
    out[values == 255] = _NODATA
    return out


#: Decoder of each kind of layer, by the name that source tables use.
DECODERS: dict[str, Callable[[Codes, str, LayerOptions], Reasons]] = {
    "scl": _scl,
    "qa_pixel": _qa_pixel,
    "qa_radsat": _qa_radsat,
    "fmask": _fmask,
    "hls_fmask": _hls_fmask,
    "modis_reliability": _modis,
}
